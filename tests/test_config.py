"""Configurations: strict translation to and from JSON, and contradictions that are caught by
name.
"""

import copy
import json
from dataclasses import replace
from functools import reduce

import pytest

from tarflowlm.config import RunConfig, TrainConfig
from tarflowlm.errors import UserError
from tarflowlm.model_config import BaselineConfig, FlowConfig, Mix1, MixD
from tarflowlm.presets import PRESETS, preset, with_steps
from tarflowlm.schema import from_dict, to_dict


@pytest.mark.parametrize("name", PRESETS)
def test_presets_survive_json(name):
    run = preset(name)
    assert run.name == name
    again = from_dict(RunConfig, json.loads(json.dumps(to_dict(run))))
    assert again == run
    assert to_dict(again) == to_dict(run)


def changed(path: str, value: object) -> dict:
    """The preset mini-mixd as JSON values with one of them replaced; `...` removes it."""
    data = copy.deepcopy(to_dict(preset("mini-mixd")))
    *parents, last = path.split(".")
    inner = reduce(dict.__getitem__, parents, data)
    if value is ...:
        del inner[last]
    else:
        inner[last] = value
    return data


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("nmae", "x", "config.nmae: unknown key; did you mean name\\? known keys are data, model"),
        (
            "model.trunk.heads",
            4,
            "config.model.trunk.heads: unknown key; did you mean num_heads\\? known keys are",
        ),
        ("name", ..., "config.name: missing key"),
        ("model", ..., "config.model: missing key"),
        ("model.family", ..., "config.model.family None: choose one of flow, ar"),
        ("model.family", "rnn", "config.model.family 'rnn': choose one of"),
        ("model.trunk", 3, "config.model.trunk 3 of type int: give TransformerConfig"),
        ("model.latent_dim", None, "config.model.latent_dim None .*: give an integer"),
        ("model.channel_mix", 1, "config.model.channel_mix 1 .*: give True or False"),
        ("model.blocks", "mixd", "config.model.blocks 'mixd' .*: give a list"),
        (
            "model.blocks",
            [{"coupling": "mixx"}],
            "blocks.0.coupling 'mixx': did you mean mix.* choose one of affine.* import your own",
        ),
        (
            "model.blocks",
            [{"coupling": "mixd"}, {"coupling": "mix1", "layers": 2.0}],
            "config.model.blocks.1.layers 2.0 .*: give an integer",
        ),
        (
            "model.blocks",
            [{"coupling": "mix1", "layer": 2}],
            "config.model.blocks.0.layer: unknown key",
        ),
        ("train.batch_size", 1.5, "config.train.batch_size 1.5 .*: give an integer"),
        ("train.batch_size", True, "config.train.batch_size True .*: give an integer"),
        ("optim.lr", "fast", "config.optim.lr 'fast' .*: give a number"),
        ("data.source", None, "config.data.source None .*: give a text"),
        ("train.precision", "float16", "config.train.precision 'float16': choose one of"),
        # contradictions, by the configurations themselves
        ("model.patch", 3, "patch 3: does not divide context 256"),
        ("train.stage_steps", [10], r"train.stage_steps \(10,\): 1 entry for 3 stages"),
        ("model.blocks", [], "model.blocks .*: needs at least one block"),
    ],
)
def test_errors_name_the_wrong_field(path, value, message):
    with pytest.raises(UserError, match=message):
        from_dict(RunConfig, changed(path, value))


def test_defaults_fill_what_is_left_out():
    run = from_dict(
        RunConfig, {"name": "x", "model": {"family": "ar"}, "train": {"stage_steps": [7]}}
    )
    assert run == RunConfig(name="x", model=BaselineConfig(), train=TrainConfig(stage_steps=(7,)))


FLOW = {"blocks": (MixD(), Mix1())}
TWO_STAGES = TrainConfig(stage_steps=(1, 1), mode="joint")
FILLING = FlowConfig(blocks=(MixD(certainty=0.9), MixD()), channel_mix=False)


@pytest.mark.parametrize(
    ("cls", "fields", "message"),
    [
        (
            FlowConfig,
            FLOW | {"context": 10, "patch": 4},
            "patch 4: does not divide context 10",
        ),
        (FlowConfig, {"blocks": ()}, "at least one block"),
        (FlowConfig, {"blocks": (Mix1(), MixD())}, "model.blocks.1.components 0: ties it"),
        (
            FlowConfig,
            {"blocks": (MixD(certainty=0.9, components=3),)},
            "model.blocks.0.certainty 0.9: needs components 0",
        ),
        (
            FlowConfig,
            {"blocks": (MixD(certainty=0.9), Mix1())},
            r"model.blocks.1 Mix1\(layers=1.*: above a block with cert",
        ),
        (
            RunConfig,
            {"name": "x", "model": FILLING, "train": TrainConfig(mode="joint")},
            "train it progressively",
        ),
        (
            RunConfig,
            {
                "name": "x",
                "model": FlowConfig(starts="last"),
                "train": TrainConfig(stage_steps=(1,) * 3),
            },
            "model.starts 'last': a block that joins .* choose first",
        ),
        (TrainConfig, {"stage_steps": ()}, "train.stage_steps"),
        (TrainConfig, {"stage_steps": (0, 10)}, "the first stage needs at least 1 step"),
        (RunConfig, {"name": "x", "model": FlowConfig(**FLOW)}, "1 entry for 2 stages"),
        (
            RunConfig,
            {"name": "x", "model": BaselineConfig(), "train": TWO_STAGES},
            "2 entries for 1 stage",
        ),
        (
            RunConfig,
            {"name": "x", "model": FlowConfig(**FLOW), "train": TWO_STAGES},
            "2 entries for 1 stage",
        ),
    ],
)
def test_contradictions_are_refused(cls, fields, message):
    with pytest.raises(UserError, match=message):
        cls(**fields)


@pytest.mark.parametrize(
    ("cls", "fields", "message"),
    [
        (FlowConfig, {"trunk": 5}, "model.trunk 5 of type int: give TransformerConfig"),
        (FlowConfig, {"blocks": ("mixd",)}, "model.blocks.0 'mixd' of type str: give BlockConfig"),
        (FlowConfig, {"channel_mix": 1}, "model.channel_mix 1 of type int: give True or False"),
        (
            FlowConfig,
            {"blocks": (MixD(), Mix1(layers="2"))},
            "model.blocks.1.layers '2' of type str: give an integer",
        ),
        (TrainConfig, {"stage_steps": "10"}, "train.stage_steps '10' of type str: give a list"),
        (TrainConfig, {"stage_steps": (1.5,)}, "train.stage_steps.0 1.5 of type float"),
        (RunConfig, {"name": "x", "model": None}, "give FlowConfig or BaselineConfig"),
    ],
)
def test_a_value_of_another_type_is_refused(cls, fields, message):
    with pytest.raises(UserError, match=message):
        cls(**fields)


def test_an_unknown_preset_is_answered_with_the_known_ones():
    with pytest.raises(
        UserError, match=r"preset 'mini' is unknown: did you mean .* choose one of quickstart"
    ):
        preset("mini")


@pytest.mark.parametrize("steps", [3, 4, 5, 17, 180, 1800, 12_345])
def test_steps_are_shared_out_among_the_stages(steps):
    run = replace(preset("mini-mixd"), train=TrainConfig(stage_steps=(1400, 200, 200)))
    stages = with_steps(run, steps).train.stage_steps
    assert sum(stages) == steps
    assert all(
        a == pytest.approx(b * steps / 1800, abs=2)
        for a, b in zip(stages, (1400, 200, 200), strict=True)
    )
    assert min(stages) >= 1


def test_a_stage_without_steps_stays_without():
    for before, steps, after in (((1400, 200, 0), 16, (14, 2, 0)), ((3, 0, 0), 2, (2, 0, 0))):
        run = replace(preset("mini-mixd"), train=TrainConfig(stage_steps=before))
        assert with_steps(run, steps).train.stage_steps == after
