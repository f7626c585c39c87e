"""Run directories: loading gives the saved model, or one line says why not."""

import json
import os
import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import tarflowlm
from helpers import FLOW, TRUNK, flip, stack
from tarflowlm.config import RunConfig, TrainConfig
from tarflowlm.data import CharTokenizer
from tarflowlm.errors import UserError, command
from tarflowlm.model_config import BaselineConfig, FlowConfig, Mix1, MixD
from tarflowlm.presets import PRESETS
from tarflowlm.runs import WEIGHTS
from tarflowlm.runs.checkpoint import (
    load_checkpoint,
    read_run,
    read_summary,
    resume_command,
    write_run,
)
from tarflowlm.runs.weights import is_whole, write_manifest, write_weights

CONFIGS = {
    "flow": FLOW,
    "flow-patch": replace(
        FLOW,
        patch=2,
        blocks=(MixD(in_patch="independent"), Mix1(), Mix1()),
        channel_mix=False,
    ),
    "own-components": replace(FLOW, blocks=stack(("affine", "mixd", "mix1"), (1, 1, 1), (1, 4, 3))),
    "ar": BaselineConfig(context=8, trunk=TRUNK, layers=1),
    "ar-patch": BaselineConfig(
        context=8, patch=2, in_patch="autoregressive", trunk=TRUNK, layers=1
    ),
}
INFO = {"step": "5", "tokens": "160"}


def write_checkpoint(out: Path, config: FlowConfig | BaselineConfig, blocks: int | None = None):
    """A run directory with random weights of `config`, or of its first blocks; returns the
    model.
    """
    run = RunConfig(name="tiny", model=config, train=TrainConfig(stage_steps=(3,), mode="joint"))
    tokenizer = CharTokenizer(" abcdefghijklmnopqrstuvwxyz")
    full = replace(config, vocab_size=tokenizer.vocab_size)
    model = (full if blocks is None else full.first_blocks(blocks)).build()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    out.mkdir(exist_ok=True)
    write_run(out, run, tokenizer)
    write_weights(out / WEIGHTS, model.state_dict(), INFO | {"blocks": str(model.num_blocks)})
    return model


@pytest.fixture
def directory(tmp_path) -> Path:
    write_checkpoint(tmp_path / "run", FLOW)
    return tmp_path / "run"


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_loaded_model_equals_the_saved_one(tmp_path, config):
    saved = write_checkpoint(tmp_path / "run", config)
    checkpoint = load_checkpoint(tmp_path / "run")
    assert checkpoint.run.model == config
    assert {name: checkpoint.info[name] for name in INFO} == INFO
    assert checkpoint.tokenizer.alphabet == " abcdefghijklmnopqrstuvwxyz"
    loaded = checkpoint.model
    assert type(loaded) is type(saved)
    assert not loaded.training
    expected = saved.state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.state_dict().items())
    tokens = torch.arange(16).view(2, 8)
    ours, theirs = (
        tarflowlm.importance_weighted_bound(
            m, tokens, samples=1, generator=torch.Generator().manual_seed(0)
        )
        for m in (saved.eval(), loaded)
    )
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("blocks", [1, 2, 3])
def test_unfinished_progressive_run_gives_its_blocks(tmp_path, blocks):
    saved = write_checkpoint(tmp_path / "run", FLOW, blocks)
    model = load_checkpoint(tmp_path / "run").model
    assert model.num_blocks == blocks
    assert all(torch.equal(t, saved.state_dict()[name]) for name, t in model.state_dict().items())


def test_tied_codebook_is_stored_once_and_stays_tied(directory):
    names = [name for name in load_file(directory / "model.safetensors") if name.endswith("mean")]
    assert names == ["codebook.mean"]
    model = load_checkpoint(directory).model
    assert model.prior.blocks[0].coupling.components is model.codebook


class Exploit:
    """A pickle of it would write a file when read."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return Path.touch, (self.target,)


@pytest.mark.parametrize(
    "write", [lambda o, p: p.write_bytes(pickle.dumps(o)), lambda o, p: torch.save(o, p)]
)
def test_pickle_is_refused_and_not_run(directory, write, tmp_path):
    target = tmp_path / "was-run"
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        path = directory / name
        before = path.read_bytes()
        write(Exploit(target), path)
        with pytest.raises(UserError, match=name):
            load_checkpoint(directory)
        path.write_bytes(before)
    assert not target.exists()


@pytest.mark.parametrize("keep", [0, 7, 100, -1])
def test_truncated_weights_are_refused(directory, keep):
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UserError, match=r"model\.safetensors is damaged"):
        load_checkpoint(directory)


def test_flipped_bit_in_the_weights_is_refused_with_a_remedy(directory):
    flip(directory / "model.safetensors")
    with pytest.raises(UserError, match=r"model\.safetensors is damaged .*train again"):
        load_checkpoint(directory)


@pytest.mark.parametrize(
    "damage",
    [
        lambda p: os.truncate(p, 3),
        flip,
        Path.unlink,
        lambda p: p.with_name("manifest.json").write_text("[]"),
    ],
)
def test_damaged_folder_is_not_whole(tmp_path, damage):
    path = tmp_path / "a.bin"
    path.write_bytes(b"abcdefgh")
    write_manifest(tmp_path, ["a.bin"])
    assert is_whole(tmp_path)
    damage(path)
    assert not is_whole(tmp_path)


def test_summary_is_read_where_there_is_one(directory):
    assert read_summary(directory) is None
    test = dict.fromkeys(("bpc", "bound", "nats_per_token", "stderr", "windows"), 2.0)
    summary = {"test": test, "tokens": 3, "seconds": 1.0, "stage_valid_bpc": [2.0]}
    (directory / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
    assert read_summary(directory)["test"]["bpc"] == 2.0


def test_imports_of_another_kind_are_named(directory):
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    wrong = json.dumps(config | {"imports": ["my.bends"]})
    (directory / "config.json").write_text(wrong, encoding="utf-8")
    with pytest.raises(UserError, match=r"config\.json is not the configuration"):
        read_run(directory)


def test_commands_are_for_the_shell_of_the_system(monkeypatch):
    words = ["--resume", r"runs\mine", "a b", "pyarrow>=15"]
    assert command(words) == r"--resume 'runs\mine' 'a b' 'pyarrow>=15'"
    with monkeypatch.context() as patch:
        patch.setattr(os, "name", "nt")
        assert command(words) == r'--resume runs\mine "a b" "pyarrow>=15"'


def test_resume_command_imports_the_modules_of_the_run(directory):
    plain = f"tarflowlm train --resume {directory}"
    assert resume_command(directory) == plain
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    own = {"imports": {"bent": "my.bends", "curved": "my.bends", "odd": "odds"}}
    (directory / "config.json").write_text(json.dumps(config | own), encoding="utf-8")
    assert resume_command(directory) == f"{plain} --import my.bends --import odds"
    # the command is a part of messages about damaged runs
    for text in ("[]", "{"):
        (directory / "config.json").write_text(text, encoding="utf-8")
        assert resume_command(directory) == plain


ALTERED = {
    "renamed": (lambda t: t.update(other=t.pop("codebook.mean")), r"codebook\.mean"),
    "extra": (lambda t: t.update(extra=torch.zeros(1)), r"does not fit config\.json: .*extra"),
    "reshaped": (
        lambda t: t.update({"codebook.mean": torch.zeros(3, 2)}),
        r"does not fit config\.json: .*codebook\.mean",
    ),
    "not-finite": (
        lambda t: t["codebook.mean"].fill_(float("nan")),
        r"codebook\.mean is not finite",
    ),
}


@pytest.mark.parametrize(("change", "message"), ALTERED.values(), ids=ALTERED.keys())
def test_weights_that_do_not_fit_are_refused(directory, change, message):
    path = directory / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata=INFO | {"blocks": "3"})  # without a checksum
    with pytest.raises(UserError, match=message):
        load_checkpoint(directory)


def edit_config(directory: Path, change) -> None:
    path = directory / "config.json"
    value = json.loads(path.read_text(encoding="utf-8"))
    change(value)
    path.write_text(json.dumps(value), encoding="utf-8")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["model"].update(widht=3), r"config\.json\.model\.widht: unknown key"),
        (lambda c: c["model"].update(family=[]), r"family \[\]"),
        (lambda c: c["model"].update(latent_dim=5), r"does not fit config\.json"),
        (lambda c: c["train"].update(stage_steps=[]), "stage_steps"),
        (lambda c: c.update(train=[1, 2]), r"train \[1, 2\] of type list: give TrainConfig"),
        (lambda c: c.update(model_type="gpt2"), "not the configuration of a run"),
    ],
)
def test_invalid_config_is_refused(directory, change, message):
    edit_config(directory, change)
    with pytest.raises(UserError, match=message) as raised:
        load_checkpoint(directory)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        (["config.json"], "config.json is missing"),
        (["tokenizer.json"], "tokenizer.json is no"),
        (["model.safetensors"], "model.safetensors is missing: .* holds no trained weights"),
        (["model.safetensors", "tokenizer.json"], "holds no trained weights"),
    ],
)
def test_missing_file_is_named(directory, missing, message):
    for name in missing:
        (directory / name).unlink()
    with pytest.raises(UserError, match=message):
        load_checkpoint(directory)


def test_another_tokenizer_is_refused(directory):
    CharTokenizer("ab", "none").save(directory / "tokenizer.json")
    with pytest.raises(UserError, match=r"does not fit config\.json"):
        load_checkpoint(directory)


def test_missing_directory_is_refused(tmp_path):
    (tmp_path / "file").write_text("text", encoding="utf-8")
    for path in (tmp_path / "missing", tmp_path / "file"):
        with pytest.raises(UserError, match="is not a run directory"):
            load_checkpoint(path)


def test_a_loaded_model_and_its_texts_do_not_depend_on_the_default_type():
    lm = tarflowlm.load("english-mini")
    text = lm.write("the", length=12, seed=5)
    try:
        torch.set_default_dtype(torch.float64)
        assert lm.write("the", length=12, seed=5) == text
        assert tarflowlm.load("english-mini").write("the", length=12, seed=5) == text
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("layer", ["gpt", "qwen3"])
def test_a_model_has_at_least_the_weights_that_its_sizes_ask_for(layer):
    names = ("token-affine", "mix1", "mixd")
    flows = [replace(FLOW, blocks=stack(names, (1, 2, 1), (0, 3, 4)))]
    presets = [tarflowlm.preset(name).model for name in PRESETS]
    for config in (*CONFIGS.values(), *flows, *presets):
        full = replace(config, vocab_size=27, trunk=replace(config.trunk, layer=layer))
        with torch.device("meta"):
            tensors = full.build().state_dict()
        assert full.num_layers <= len(tensors)
        assert 0 < full.least_size <= sum(tensor.numel() for tensor in tensors.values())


IMPOSSIBLE = {
    "layers": lambda m: m["blocks"][0].update(layers=10**9),
    "some-layers": lambda m: m["blocks"][0].update(layers=4000),
    "width": lambda m: m["trunk"].update(width=2**30),
    "mlp": lambda m: m["trunk"].update(mlp_ratio=2**30),
    "taps": lambda m: m["trunk"].update(input_taps=2**40),
    "latents": lambda m: m.update(latent_dim=2**40),
    "hidden": lambda m: m.update(head_hidden=2**40),
    "components": lambda m: m["blocks"][1].update(components=2**40),
    "patch": lambda m: m.update(patch=2**40, context=2**41),
}


@pytest.mark.parametrize("change", IMPOSSIBLE.values(), ids=IMPOSSIBLE.keys())
def test_sizes_that_the_weights_do_not_have_are_refused_before_anything_is_built(
    directory, change, monkeypatch
):
    edit_config(directory, lambda c: change(c["model"]))
    monkeypatch.setattr(tarflowlm.runs.checkpoint, "TarFlowLM", None)
    with pytest.raises(UserError, match=r"does not fit config|at most 4,096"):
        load_checkpoint(directory)


@pytest.mark.parametrize("kind", [torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn])
def test_weights_that_are_no_floats_are_refused(directory, kind):
    path = directory / "model.safetensors"
    tensors = {name: tensor.to(kind) for name, tensor in load_file(path).items()}
    write_weights(path, tensors, INFO | {"blocks": "3"})
    with pytest.raises(UserError, match=r"in \w+: give weights in one of F64, F32"):
        load_checkpoint(directory)


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_in_other_floats_are_converted(directory, kind):
    path = directory / "model.safetensors"
    tensors = {name: tensor.to(kind) for name, tensor in load_file(path).items()}
    write_weights(path, tensors, INFO | {"blocks": "3"})
    assert next(load_checkpoint(directory).model.parameters()).dtype == torch.float32


def test_a_changed_configuration_is_said(trained, tmp_path, caplog):
    folder = tarflowlm.load(trained).save_pretrained(tmp_path / "own")
    load_checkpoint(folder)
    edit_config(folder, lambda c: c["data"].update(source="elsewhere.txt"))
    load_checkpoint(folder)
    assert not caplog.records
    for change in (lambda c: c.update(temperature=0.2), lambda c: c["model"].update(context=8)):
        edit_config(folder, change)
        load_checkpoint(folder)
        assert "was changed after the weights were saved" in caplog.records[-1].message
        caplog.clear()
    # what is written again fits again
    again = tarflowlm.load(folder).save_pretrained(tmp_path / "again")
    caplog.clear()
    load_checkpoint(again)
    assert not caplog.records
