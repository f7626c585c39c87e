"""Plans of the recipes, and on a tiny training: work is done once, resumed, and written down."""

import csv
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from docs_cases import ROOT
from helpers import FLOW
from reproduction import ablations, passes, patches
from reproduction.lengths import length_of
from reproduction.measures import gains, summary_row, with_curves
from reproduction.recipe import Recipe, trainings
from reproduction.recipes import RECIPES
from reproduction.records import Records, portable
from reproduction.running import estimate, finish, state_of
from reproduction.settings import Settings
from tarflowlm.config import DataConfig, RunConfig, TokenizerConfig, TrainConfig
from tarflowlm.errors import SILENT, Progress, UserError
from tarflowlm.model_config import FlowConfig
from tarflowlm.schema import to_dict

OF_ONE_SCALE = {name for name, recipe in RECIPES.items() if recipe.mini_only}
"""Experiments of ours with small models alone."""
MINI, PAPER = (Settings(scale=scale, out=Path("out")) for scale in ("mini", "paper"))


@pytest.mark.parametrize(("scale", "width"), [("mini", 128), ("paper", 768)])
def test_recipes_share_a_run_only_where_it_is_the_same(scale, width):
    settings, known, widths = Settings(scale=scale, out=Path("out"), seeds=2), {}, set()
    for recipe in RECIPES.values():
        plan = recipe.plan(settings)
        if recipe.name not in OF_ONE_SCALE:
            widths |= {training.run.model.trunk.width for training in plan}
        assert len({training.name for training in plan}) == len(plan) > 1
        for training in plan:
            assert known.setdefault(training.name, training.run) == training.run
    assert widths == {width}


@pytest.mark.parametrize(
    ("scale", "sources"), [("mini", {"mine.txt"}), ("paper", {"text8", "openwebtext"})]
)
def test_options_reach_the_runs(scale, sources):
    options = Settings(scale=scale, out=Path("out"), data="mine.txt", steps=9, precision="bfloat16")
    runs = [training.run for training in passes.plan_fig6(options) if training.label != "judge"]
    assert {(run.train.precision, run.train.num_steps) for run in runs} == {("bfloat16", 9)}
    assert {run.data.source for run in runs} == sources


@pytest.mark.parametrize("settings", [MINI, PAPER])
def test_fig4_is_without_the_channels_before(settings):
    plan = ablations.plan_fig4(settings)
    for training in plan:
        for block in training.run.model.blocks:
            assert (block.coupling, f"K = {block.components}") == ("mix1", training.label)
            assert not block.sees_channels
    assert [training.label for training in plan] == [f"K = {k}" for k in (1, 2, 8, 27)]
    assert len({(training.run.optim, training.run.train) for training in plan}) == 1


@pytest.mark.parametrize("settings", [MINI, PAPER])
def test_fig5_sets_two_tokens_per_position_next_to_one(settings):
    plan = [training for training in patches.plan_fig5(settings) if training.label != "judge"]
    one_token = ["AR", "Mix-1", "Mix-1, left to right", "Mix-d"]
    assert [training.label for training in plan[:4]] == one_token
    assert [training.run.model.patch for training in plan] == [1] * 4 + [2] * 5
    runs = {training.label: training.run for training in plan[4:]}
    one_way = runs["Mix-1, left to right, head over the patch"].model
    assert one_way == replace(plan[2].run.model, patch=2)
    assert (one_way.alternate, plan[1].run.model.alternate) == (False, True)
    mix1, one_token = runs["Mix-1, head over the patch"], settings.preset("mix1", "owt")
    assert replace(mix1, name=one_token.name, model=replace(mix1.model, patch=1)) == one_token
    with torch.device("meta"):
        model = replace(mix1.model, vocab_size=27).build()
        heads = [block.coupling.head for block in model.prior.blocks]
    # a group per channel of the patch, and each sees all before it
    channels = 2 * mix1.model.latent_dim
    assert [(head.groups, head.num_known) for head in heads] == [(channels, channels - 1)] * 3
    in_patch = {
        label: getattr(run.model, "in_patch", "") or run.model.blocks[0].in_patch
        for label, run in runs.items()
        if label.startswith(("Mix-d", "two"))
    }
    assert list(in_patch.values()) == ["autoregressive", "independent", "independent"]


@pytest.mark.parametrize("corpus", ["text8", "owt"])
def test_the_recipe_of_mdlm_is_one_for_all_models(corpus):
    settings = Settings(scale="paper", out=Path("out"), recipe="mdlm")
    runs = [settings.preset(kind, corpus) for kind in ("ar", "affine", "mix1", "mixd")]
    assert {run.name.removeprefix(corpus) for run in runs} >= {"-ar-adamw", "-mixd-adamw"}
    assert {run.train.num_steps for run in runs} == {1_000_000}
    assert {round(run.optim.warmup * run.train.stage_steps[0]) for run in runs} == {2500}
    assert len({replace(run.optim, codebook_lr_scale=1.0, warmup=0.0) for run in runs}) == 1
    assert {run.train.tokens_at_once for run in runs} == {65_536}
    for name in RECIPES.keys() - OF_ONE_SCALE:
        plan = RECIPES[name].plan(settings)
        assert [t.name for t in plan if "adamw" not in t.name] == []


@pytest.mark.parametrize("name", ["lengths", "text8-start"])
def test_every_length_has_a_baseline_with_any_number_of_steps(name):
    for steps in (None, 100):
        plan = RECIPES[name].trainings(replace(MINI, steps=steps))
        keys = {(length_of(one), one.run.seed) for one in plan}
        assert keys == {(length_of(one), one.run.seed) for one in plan if one.label == "AR"}


@pytest.mark.parametrize(("settings", "layers"), [(MINI, 6), (PAPER, 12)])
@pytest.mark.parametrize("name", ["fig2", "fig3", "fig4", "table2"])
def test_compared_models_have_one_depth(name, settings, layers):
    models = {training.label: training.run.model for training in RECIPES[name].plan(settings)}
    flows = {label: model for label, model in models.items() if isinstance(model, FlowConfig)}
    depths = {label: sum(block.layers for block in model.blocks) for label, model in flows.items()}
    depths |= {label: model.layers for label, model in models.items() if label not in flows}
    deeper = {"Mix-d with two layers more": 8} if name == "table2" and settings is MINI else {}
    assert depths == dict.fromkeys(depths, layers) | deeper


STEPS = TrainConfig(
    stage_steps=(3, 3), batch_size=2, evaluate_windows=2, checkpoint_every=2, log_every=1
)
TINY = RunConfig(name="tiny", model=replace(FLOW, blocks=FLOW.blocks[:2]), train=STEPS)
TINY_RECIPE = Recipe(
    name="tiny",
    title="A tiny table",
    claim="nothing.",
    measure=lambda _settings, finished: [summary_row(done) for done in finished],
    plan=lambda settings: trainings(settings, {"tiny": TINY}),
    below=lambda rows, folder: f"{len(rows)} rows, {folder.name}.\n",
)


@pytest.mark.parametrize(
    ("scale", "asked", "seeds"), [("mini", 1, 2), ("mini", 3, 3), ("paper", 1, 1)]
)
def test_recipes_of_small_differences_have_several_seeds(scale, asked, seeds):
    settings = Settings(scale=scale, out=Path("out"), seeds=asked)
    recipe = replace(TINY_RECIPE, seeds=2)
    assert [t.run.seed for t in recipe.trainings(settings)] == list(range(seeds))
    assert [t.run.seed for t in replace(recipe, clear=("tiny",)).trainings(settings)] == list(
        range(asked)
    )


@pytest.fixture
def settings(tmp_path, corpus_file) -> Settings:
    return Settings(scale="mini", out=tmp_path / "out", data=str(corpus_file), seeds=2)


class StopAt5(Progress):
    def record(self, record) -> None:
        if record["step"] == 5:
            raise EOFError


@pytest.mark.slow
def test_trainings_are_resumed_and_done_once(settings, tmp_path):
    plan = TINY_RECIPE.plan(settings)
    with pytest.raises(EOFError):
        finish(settings, plan, StopAt5())
    assert [state_of(settings, training, Records(settings.out)) for training in plan] == [
        "stopped",
        "new",
    ]
    done = finish(settings, plan, SILENT)
    assert [state_of(settings, training, Records(settings.out)) for training in plan] == [
        "finished"
    ] * 2
    whole = finish(replace(settings, out=tmp_path / "whole"), plan, SILENT)
    weights = [load_file(d.directory / "model.safetensors") for d in (*done, *whole)]
    for resumed, straight in zip(weights[:2], weights[2:], strict=True):
        assert all(torch.equal(tensor, straight[name]) for name, tensor in resumed.items())
    times = [(d.directory / "model.safetensors").stat().st_mtime_ns for d in done]
    again = finish(settings, plan, SILENT)
    assert [(d.directory / "model.safetensors").stat().st_mtime_ns for d in again] == times
    other = trainings(settings, {"tiny": replace(TINY, optim=replace(TINY.optim, lr=1e-3))})
    with pytest.raises(UserError, match=r"optim.lr 0.001: tiny-s0 in .*records.jsonl has"):
        finish(settings, other, SILENT)


@pytest.mark.slow
def test_a_page_is_printed_from_records_without_the_runs(settings):
    plan = TINY_RECIPE.plan(settings)
    finished = finish(settings, plan, SILENT)
    rows = with_curves(settings, finished)
    gained = gains(finished[0])
    shutil.rmtree(settings.out / "runs")
    again = finish(settings, plan, SILENT)
    assert with_curves(settings, again) == rows
    assert gains(again[0]) == gained
    assert again[1].record == finished[1].record
    with pytest.raises(UserError, match="tiny-s1 is on record, but this page needs its weights"):
        again[1].load()
    (settings.out / "records.jsonl").write_text("{", encoding="utf-8")
    with pytest.raises(UserError, match=r"records.jsonl is damaged .*: restore or remove it"):
        finish(settings, plan, SILENT)


def test_records_are_found_again_elsewhere_and_by_later_code(tmp_path):
    text = DataConfig(source=str(tmp_path / "here" / "words.txt"))
    here = replace(TINY, data=text)
    elsewhere = replace(here, data=replace(text, source=str(tmp_path / "there" / "words.txt")))
    records = Records(tmp_path)
    config = to_dict(portable(here))
    assert config["data"]["source"] == "words.txt"
    # a field that did not exist then had its default value
    del config["train"]["keep_idle"]
    line = {"name": "tiny-s0", "config": config, "summary": {}, "machine": "", "hashes": {}}
    records.path.write_text(json.dumps(line), encoding="utf-8")
    assert Records(tmp_path).find("tiny-s0", elsewhere) is not None
    other = replace(here, data=replace(text, source=str(tmp_path / "other.txt")))
    with pytest.raises(UserError, match=r"data.source other.txt: tiny-s0 in .* has words.txt"):
        Records(tmp_path).find("tiny-s0", other)
    # two commands that measure at once lose nothing of each other
    for one in [Records(tmp_path), Records(tmp_path)]:
        [record] = one
        one.measured(record, f"by {id(one)}", lambda: 1)
    [record] = Records(tmp_path)
    assert len(record.measured) == 2


def test_files_of_one_name_are_told_apart_where_they_are_at_hand(tmp_path):
    def run_in(name: str, text: str, tokenizer: str = "{}") -> RunConfig:
        folder = tmp_path / name
        folder.mkdir()
        paths = folder / "words.txt", folder / "pieces.json"
        for path, content in zip(paths, (text, tokenizer), strict=True):
            path.write_text(content, encoding="utf-8")
        pieces = TokenizerConfig(kind="bpe", source=str(paths[1]))
        return replace(TINY, data=DataConfig(source=str(paths[0]), tokenizer=pieces))

    run = run_in("here", "one text")
    for file in ("summary.json", "config.json", "model.safetensors"):
        (tmp_path / file).write_text("{}", encoding="utf-8")
    Records(tmp_path).add("tiny-s0", run, tmp_path, torch.device("cpu"))
    records = Records(tmp_path)
    assert records.find("tiny-s0", run).config["data"]["tokenizer"]["source"] == "pieces.json"
    assert records.find("tiny-s0", run_in("clone", "one text")) is not None
    for field, other in (
        ("data.source words.txt", run_in("b", "another")),
        ("data.tokenizer.source pieces.json", run_in("c", "one text", tokenizer="[]")),
    ):
        with pytest.raises(UserError, match=f"{field}: tiny-s0 in .* has another file of this"):
            records.find("tiny-s0", other)
    # the text is not at hand
    (tmp_path / "here" / "words.txt").unlink()
    assert records.find("tiny-s0", run) is not None


def test_estimates_count_all_tokens_and_time_every_shape_once(settings, monkeypatch):
    timed = []

    def two_seconds(run, stage, batches, device, num_steps):
        timed.append((stage, tuple(batches().shape)))
        return 2.0

    monkeypatch.setattr("reproduction.running.seconds_per_step", two_seconds)
    planned = estimate(settings, TINY_RECIPE.plan(settings))
    assert [(p.state, p.tokens, p.seconds) for p in planned] == [("new", 6 * 2 * 16, 12.0)] * 2
    assert timed == [(0, (2, 16)), (1, (2, 16))]
    paper = replace(settings, scale="paper")
    # one sequence is timed, so two of them take twice as long
    assert estimate(paper, TINY_RECIPE.plan(paper))[0].seconds == 24.0


@pytest.mark.slow
def test_command_writes_results_with_provenance(settings, run, run_json, monkeypatch):
    pytest.importorskip("matplotlib")

    def draw(figure, rows):
        figure.subplots().plot([row["test bpc"] for row in rows])

    recipe = replace(TINY_RECIPE, draw=draw)
    for name in list(RECIPES):
        monkeypatch.delitem(RECIPES, name)
    for name in ("first", "second"):
        monkeypatch.setitem(RECIPES, name, replace(recipe, name=name))
    argv = [
        "all",
        "--out",
        settings.out,
        "--data",
        settings.data,
        "--seeds",
        2,
        "--device",
        "cpu",
    ]
    monkeypatch.setattr(sys, "argv", ["__main__.py", *map(str, argv)])
    # recipes share trainings
    assert [planned["run"] for planned in run_json(*argv, "--dry-run")["runs"]] == [
        "tiny-s0",
        "tiny-s1",
    ]
    first, second = run_json(*argv)["recipes"]
    assert first["rows"] == second["rows"]
    assert [Path(p).name for p in first["files"]] == [
        "first.csv",
        "first.md",
        "first.png",
    ]
    with (settings.out / "first.csv").open(encoding="utf-8") as file:
        table = list(csv.DictReader(file))
    assert [float(row["test bpc"]) for row in table] == [row["test bpc"] for row in first["rows"]]
    assert "ppl" in table[0]
    page = (settings.out / "first.md").read_text(encoding="utf-8")
    parts = [
        "| tiny | 0 | <= |",
        "2 rows, out.",
        "python -m reproduction all",
    ]
    assert [part for part in parts if part not in page] == []
    with (settings.out / "runs.csv").open(encoding="utf-8") as file:
        runs = {row["run"]: row for row in csv.DictReader(file)}
    assert runs["tiny-s1"]["text"].startswith("words.txt")
    assert "PyTorch" in runs["tiny-s1"]["machine"]
    assert "ppl" not in page
    assert (settings.out / "first.png").read_bytes()[:4] == b"\x89PNG"
    assert run(*argv, "--dry-run").out.count("finished") == 2


def test_wrong_requests_are_named(refused, tmp_path):
    argv = ["--dry-run", "--out", tmp_path / "out"]
    refused("table9", names=["'table9'", "table2"])
    refused("table2", "--seeds", "0", names=["seeds 0"])
    refused("fig2", "--second-text", "a.txt", names=["--second-text a.txt", "table2"])
    refused("table2", "--scale", "paper", "--data", "a.txt", names=["--data a.txt", "paper"])
    refused(*argv, "fig3", "--steps", "0", names=["steps 0"])
    refused("fig3", "--recipe", "mdlm", names=["--recipe mdlm", "--scale mini"])
    refused(*argv, "fig3", "--judge-data", "a.txt", names=["--judge-data a.txt", "no judge"])
    refused(*argv, "lottery", "--scale", "paper", names=["lottery with --scale paper"])
    for recipe, option in (
        ("fig3", "--data"),
        ("table2", "--second-text"),
        ("table6", "--judge-data"),
    ):
        refused(*argv, recipe, option, "no-such.txt", names=["'no-such.txt'"])


def test_the_help_page_comes_without_torch():
    code = "import sys, reproduction.__main__; assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
