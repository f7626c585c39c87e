"""The baseline with codes, and ratios to the best baseline of a place."""

from dataclasses import replace

import pytest
import torch

from helpers import TRUNK
from reproduction import inputs
from reproduction.coded import CodedConfig
from reproduction.recipe import Finished
from reproduction.records import Record
from reproduction.settings import Settings
from tarflowlm import generate
from tarflowlm.config import RunConfig
from tarflowlm.presets import preset
from tarflowlm.schema import from_dict, to_dict

KINDS = {
    "fixed": {"table": 0.0, "code_dim": 3},
    "both": {"code_dim": 3},
    "third": {"table": 1 / 3},
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_coded_baseline_trains_its_input_and_samples_from_a_cache(kind):
    config = CodedConfig(vocab_size=5, context=8, trunk=TRUNK, layers=1, **KINDS[kind])
    run = replace(preset("mini-ar"), model=config)
    assert from_dict(RunConfig, to_dict(run)) == run
    assert run.model.bound == "exact"
    model = config.build()
    torch.nn.init.normal_(model.head.weight)
    tokens = torch.tensor([[0, 3, 1, 4]])
    model(tokens).sum().backward()
    trained = {name for name, p in model.named_parameters() if p.grad is not None}
    assert ("input.table.weight" in trained) == (kind in ("both", "third"))
    assert "input.codebook.mean" not in trained
    assert ("input.map.lift.weight" in trained) == (kind != "third")
    cache = model.allocate_cache(1, 4)
    features = [model.features_at(cache, None)]
    features += [model.features_at(cache, tokens[:, t : t + 1]) for t in range(3)]
    torch.testing.assert_close(model.head(torch.stack(features, 1)), model.logits(tokens))
    one, two = (generate(model, num_tokens=8, num=2, generator=seed()) for _ in range(2))
    assert torch.equal(one.tokens, two.tokens)


def seed() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def test_ratios_are_to_the_best_input_of_the_same_place_length_and_seed():
    """The table is better on the test split, codes on the validation split, which chooses."""
    place, steps = inputs.NO_TAPS, inputs.SHORT["letters"]
    cells = [inputs.baseline(place, kind, steps) for kind in ("table", "fixed")]
    cells.append(inputs.block_1(place, 5, steps, linear=True))
    found = []
    for cell, valid, test in zip(cells, (2.0, 1.0, 3.0), (1.0, 2.0, 3.0), strict=True):
        found += [finished(cell, seed, valid, test + seed) for seed in (0, 1)]
    rows = inputs.measure(None, found, lambda: cells)
    assert {row["best AR"] for row in rows} == {cells[1].reads}
    assert [row["test bpc over AR"] for row in rows] == [1 / 2, 2 / 3, 1, 1, 3 / 2, 4 / 3]
    assert [row["test bpc over the table"] for row in rows] == [1, 1, 2, 3 / 2, 3, 2]
    assert [row["valid bpc over the table"] for row in rows[::2]] == [1, 0.5, 1.5]
    [line, *_, text8, owt] = inputs.explained(rows)
    assert line["reads"] == "latents, d = 5, linear map"
    assert line["over the best AR, short"] == pytest.approx(17 / 12)
    assert line["over AR with a table, short"] == pytest.approx(5 / 2)
    # the paper's baseline has a table
    published = [row["over AR with a table, long"] for row in (text8, owt)]
    assert published == pytest.approx([1.057, 1.089], abs=5e-4)


def finished(cell, seed, valid, test):
    [*_, training] = inputs.plan(replace(Settings(), seeds=seed + 1), lambda: [cell])
    test = {"bound": "exact", "bpc": test, "ppl": 1.0, "stderr": 0.0}
    counts = {"seed": seed, "tokens": 1, "seconds": 1.0, "stage_valid_bpc": [valid], "test": test}
    record = Record(training.name, {}, counts, "", {})
    return Finished(training, None, None, None, record)
