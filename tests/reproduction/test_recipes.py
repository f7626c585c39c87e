"""Every recipe measures, draws and writes, on untrained miniatures of its trainings."""

import json
import math
import re
from dataclasses import replace
from html import unescape
from itertools import pairwise

import pytest
import torch

from docs_cases import ROOT
from reproduction import (
    ablations,
    bounds,
    geometry,
    lottery,
    measures,
    passes,
    patches,
    tables,
)
from reproduction.recipe import Finished, Training
from reproduction.recipes import RECIPES
from reproduction.records import Records
from reproduction.results import write_results
from reproduction.running import recorded
from reproduction.settings import Settings
from tarflowlm.data import TEXT8_ALPHABET, CharTokenizer
from tarflowlm.files import write_json
from tarflowlm.model_config import BaselineConfig, FlowConfig, TransformerConfig
from tarflowlm.presets import preset
from tarflowlm.runs import WEIGHTS
from tarflowlm.runs.checkpoint import write_run
from tarflowlm.runs.records import read_record
from tarflowlm.runs.weights import write_weights

CONTEXT = 16


@pytest.fixture(scope="module")
def settings(tmp_path_factory, corpus_file) -> Settings:
    out, text = tmp_path_factory.mktemp("recipes"), str(corpus_file)
    with pytest.MonkeyPatch.context() as patch:
        for module, name, value in (
            (tables, "WINDOWS", 3),
            (tables, "SAMPLES", 2),
            (tables, "SECOND_WINDOWS", 3),
            (tables, "MINI_SAMPLES", 20),
            (patches, "PROMPTS", 2),
            (patches, "PREFIXES", (0, 4)),
            (passes, "SAMPLES", 2),
            (geometry, "SAMPLES", 2),
            (measures, "LATENT_WINDOWS", 4),
            (bounds, "WINDOWS", 2),
            (bounds, "SAMPLES_OF", {"affine": 16, "Mix-1": 16, "Mix-d": 4}),
        ):
            patch.setattr(module, name, value)
        yield Settings(scale="mini", out=out, data=text, judge_data=text, second_text=text)


def untrained(settings: Settings, training: Training) -> Finished:
    """A directory as `train` leaves it, of a small model that was not trained."""
    directory, run = settings.out / "runs" / training.name, training.run
    small = {"context": CONTEXT, "trunk": TransformerConfig(width=8, num_heads=2, mlp_ratio=1)}
    if isinstance(run.model, FlowConfig):
        blocks = tuple(replace(block, layers=1) for block in run.model.blocks)
        model = replace(
            run.model,
            vocab_size=27,
            blocks=blocks,
            head_hidden=2,
            latent_dim=min(2, run.model.latent_dim),
            **small,
        )
    else:
        model = replace(run.model, vocab_size=27, layers=1, **small)
    run = replace(run, model=model)
    if not directory.exists():
        directory.mkdir(parents=True)
        write_run(directory, run, CharTokenizer(TEXT8_ALPHABET))
        built = model.build()
        write_weights(
            directory / WEIGHTS,
            built.state_dict(),
            {"blocks": str(getattr(built, "num_blocks", 0))},
        )
        exact = "exact" if isinstance(run.model, BaselineConfig) else "elbo"
        test = {"bound": exact, "bpc": 4.5, "ppl": math.exp(3), "stderr": 0.01}
        test |= {"nats_per_token": 3.0, "windows": 1}
        counts = {
            "seed": run.seed,
            "steps": 1,
            "tokens": 16,
            "seconds": 1.0,
            "stage_valid_bpc": [4.5],
            "source": run.data.source,
        }
        write_json(directory / "summary.json", counts | {"test": test})
        fields = {"split": "train"} | dict.fromkeys(
            ("tokens", "block", "lr", "grad_norm", "tokens_per_second"), 1
        )
        lines = [fields | {"step": 20 * i, "bpc": 5.0 - i / 10} for i in range(1, 41)]
        lines.append({"split": "valid", "step": 800, "tokens": 1, "bpc": 1.5})
        (directory / "metrics.jsonl").write_text(
            "".join(f"{json.dumps(line)}\n" for line in lines), encoding="utf-8"
        )
    training = replace(training, run=run)
    return recorded(Records(settings.out), training, directory, torch.device("cpu"))


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_recipe_measures_draws_and_writes(settings, name):
    pytest.importorskip("matplotlib")
    if name == "table6":
        pytest.importorskip("mauve")
    recipe = RECIPES[name]
    finished = [untrained(settings, training) for training in recipe.plan(settings)]
    rows = recipe.measure(settings, finished)
    assert {done.training.label for done in finished} - {"judge"} <= {row["model"] for row in rows}
    numbers = [
        math.isfinite(value) for row in rows for value in row.values() if isinstance(value, float)
    ]
    assert set(numbers) == {True}
    command = ["python", "-m", "reproduction", name]
    written = write_results(recipe, settings, rows, finished, command=command)
    expected = {".csv", ".md"}
    if recipe.draw is not None:
        expected.add(".png")
    if name == "fig6":
        expected.add(".html")
    assert {path.suffix for path in written} == expected
    page = (settings.out / f"{name}.md").read_text(encoding="utf-8")
    assert recipe.claim in page
    assert f"python -m reproduction {name}" in page
    assert "seconds |" not in page.partition("##")[0]
    assert "--dry-run" in page


@pytest.mark.slow
def test_table2(settings):
    finished = [untrained(settings, training) for training in tables.plan_table2(settings)]
    rows = {row["model"]: row for row in tables.measure_table2(settings, finished)}
    assert (rows["AR"][""], rows["Mix-d"][""]) == ("=", "<=")
    # the baseline is exact, whatever the number of samples
    assert rows["AR"]["3 windows: bpc"] == rows["AR"]["iw-2 bpc"]
    for label in rows.keys() - {"AR"}:
        assert rows[label]["iw-2 bpc"] < rows[label]["3 windows: bpc"]
    # our variant has none
    assert [rows[label]["paper, text8"] for label in rows] == [1.23, 1.54, 1.37, 1.30, None]


@pytest.mark.slow
def test_bounds_tighten(settings):
    finished = [untrained(settings, training) for training in bounds.plan_bounds(settings)]
    rows = {row["model"]: row for row in bounds.measure_bounds(settings, finished)}
    for label, most in (("affine", 16), ("Mix-d", 4)):
        row = rows[label]
        assert row["iw-1 bpc"] == row["test bpc"] > row["iw-4 bpc"]
        half, *others = (row[name] for name in bounds.TERMS)
        assert half == pytest.approx(row[tables.SPREAD] ** 2 / 2)
        # the limit is left out where the series does not begin to converge
        assert (bounds.NORMAL in row) == (sum(map(abs, others)) < bounds.SMALL * half)
        assert row["iw-4 bpc"] > row.get(bounds.NORMAL, -math.inf)
        assert row["over AR"] == row[f"iw-{most} bpc"] / rows["AR"]["test bpc"]
    weighted = tables.weighted_bound(finished[-1])
    # two estimates from a few windows
    assert 0.1 < weighted[tables.SPREAD] / rows["Mix-d"][tables.SPREAD] < 10


def test_work_of_a_block_is_what_it_adds_below_the_frequencies_of_the_letters():
    """The second block makes narrow codes normal, the third knows more than pairs of letters."""
    uniform, pairs = math.log2(27), 3.2
    nats = [20 * math.log(2), (12 - uniform) * math.log(2), (uniform - pairs) * math.log(2)]
    assert lottery.bits_after_blocks(pairs, nats) == pytest.approx([12.0, uniform, pairs])
    assert lottery.work(pairs, nats) == pytest.approx([0.0, 0.0, lottery.COUNTING - pairs])
    # two blocks that know something share the work
    shares = lottery.work(2.0, [5.0, 1.5 * math.log(2), 0.5 * math.log(2)])
    assert shares == pytest.approx([lottery.COUNTING - 4.0, 1.5, 0.5])


@pytest.mark.slow
def test_progressive_curve(settings):
    finished = [untrained(settings, training) for training in ablations.plan_progressive(settings)]
    rows = ablations.measure_progressive(settings, finished)
    # lines fall by 0.1 every 20 steps, so the mean of five is that of the middle
    points = measures.training_curve(read_record(finished[0].directory))
    assert points[100] == pytest.approx(4.5)
    # the last mean has three lines
    assert (rows[0]["train bpc at 800"], rows[0]["valid bpc at 800"]) == (pytest.approx(1.1), 1.5)
    assert not any("bpc at" in name for row in measures.without_curves(rows) for name in row)


@pytest.mark.slow
def test_fig6_marks_the_edits_of_every_block(settings):
    finished = [untrained(settings, training) for training in passes.plan_fig6(settings)]
    rows = passes.measure_fig6(settings, finished)
    labels = [
        "Mix-1",
        "affine",
        "Mix-d",
        passes.FILLING,
    ]
    assert list(dict.fromkeys(row["model"] for row in rows)) == labels
    assert [row["state"] for row in rows[:4]] == [
        "noise",
        "block 3 inverted",
        "block 2 inverted",
        "block 1 inverted",
    ]
    assert rows[3]["tokens as in the end"] == 1
    for before, after in pairwise(rows):
        if before["model"] == after["model"]:
            # one character per token, so that edits are read off the texts
            edits = [
                i
                for i, (old, new) in enumerate(zip(before["text"], after["text"], strict=True))
                if old != new
            ]
            assert [i for start, stop in after["edited"] for i in range(start, stop)] == edits
            assert (after["edits"], after["tokens"]) == (len(edits), CONTEXT)
    page = passes.page_fig6(rows)
    shown = re.findall('class="tl-text">(.*?)</div>', page, re.DOTALL)
    assert [unescape(re.sub("<[^>]*>", "", text)) for text in shown] == [
        row["text"] for row in rows
    ]
    assert not re.search("https?:|<script|<link|src=|url[(]", page)


def test_directions_of_the_paper():
    """Numbers as in the paper's figure: outputs from the noise down, the right-to-left block
    second. Layer 0, which belongs to none of them, does not count.
    """
    rows = [
        {"layer": layer, "block": block, "sequences": 4}
        for layer, block in enumerate((None, 3, 2, 1))
    ]
    columns = {"norm": (0.0, 3.0, 2.5, 2.0), "cosine": (9.0, 0.1, 0.2, 0.3)}
    columns |= {
        "participation_ratio": (0.0, 9.5, 5.0, 6.0),
        "centroid_shift": (None, 3.0, 2.0, 1.0),
    }
    for row, *values in zip(rows, *columns.values(), strict=True):
        row |= dict(zip(columns, values, strict=True)) | {f"{name} ±": 0.05 for name in columns}
    assert set(geometry.directions(rows).values()) == {"yes"}
    upside_down = [
        rows[0],
        *(row | {"block": block} for row, block in zip(rows[:0:-1], (1, 2, 3), strict=True)),
    ]
    # a drop and a rise are the same from either end
    assert list(geometry.directions(upside_down).values()) == ["no", "no", "no", "yes"]
    # two standard errors of 0.5 exceed all steps but those of the participation ratio
    unsure = [row | {f"{name} ±": 0.5 for name in columns} for row in rows]
    assert list(geometry.directions(unsure).values()) == ["yes", "no", "yes", "yes"]


def test_operations_of_a_flow_over_a_transformer_at_four_sizes():
    """By hand from appendix H: what patches save, and that one token at a time saves less with
    size. With the heads of three blocks patches of four save little over two.
    """
    rows = geometry.flops_by_size()
    found = [row["operations"] / row["of the LM"] for row in rows]
    by_hand = [0.74, 0.39, 0.27, 0.88, 0.43, 0.24, 0.93, 0.46, 0.24, 0.95, 0.47, 0.24]
    assert found == pytest.approx(by_hand, abs=0.006)
    three = [row["with three heads"] / row["of the LM"] for row in rows[:3]]
    assert three == pytest.approx([0.80, 0.50, 0.47], abs=0.006)


@pytest.mark.parametrize("patch", [1, 2, 4])
def test_operations_of_a_flow_are_those_of_appendix_h(patch):
    """The body of a Transformer LM over S' positions, and one masked autoregressive head."""
    L, d, S, K, D_m = 12, 768, 1024, 64, 128
    c = 16 * patch
    positions = S // patch
    E = min(max(1, int(9 * D_m / (16 * (c - 1)))), 96)
    head = 6 * E * (c - 1) ** 2 + D_m * c * (d + E * (c - 1)) + D_m * c**2 * 3 * K
    flow = 4 * d * positions + L * (24 * d**2 * positions + 2 * d * positions**2) + positions * head
    config = replace(preset("owt-mix1").model, vocab_size=50_257, patch=patch)
    assert geometry.flow_flops(config, L) == flow


def test_operations_of_the_baseline_are_those_of_appendix_h():
    """With its own numbers: GPT-2 small on 1,024 tokens."""
    L, d, S, V = 12, 768, 1024, 50_257
    body = 6 * L * d**2 * S + 2 * L * d * S**2 + 2 * L * d**2 * S + 16 * L * d**2 * S
    assert geometry.baseline_flops(d, L, S) == 4 * d * S + body + 2 * d * V * S


def test_verdicts_of_the_claims_are_those_of_the_tables(script):
    with pytest.raises(SystemExit) as ended:
        script("docs/reproduce/claims").main(["--check"])
    assert ended.value.code == 0


def test_trainings_of_the_present_recipes_are_on_record():
    """A record of another configuration would be refused. (Older recipes have records, too.)"""
    records = Records(ROOT / "docs" / "reproduce")
    for recipe in RECIPES.values():
        for training in recipe.trainings(Settings()):
            assert records.find(training.name, training.run) is not None, training.name
