"""Recipes: their plans, and on a tiny training that work is done once, goes on, and is written down."""

import csv
import random
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tarflowlm.config import RunConfig, TrainConfig
from tarflowlm.data import TEXT8_ALPHABET
from tarflowlm.errors import UserError
from tarflowlm.files import writer_lock
from tarflowlm.flow.transformer import TransformerConfig
from tarflowlm.model import FlowConfig, stack
from tarflowlm.reproduce import RECIPES, passes
from tarflowlm.reproduce.measures import summary_row
from tarflowlm.reproduce.recipe import Recipe, Settings, directory_of, estimate, finish, state_of, trainings
from tarflowlm.training.metrics import Reporter

NAMES = {
    "table2",
    "fig2",
    "fig3",
    "fig4",
    "fig5",
    "fig6",
    "fig7",
    "table6",
    "progressive",
    "patches",
    "one-block",
    "frontier",
}


def test_every_table_and_figure_has_a_recipe():
    assert RECIPES.keys() == NAMES


@pytest.mark.parametrize("scale", ["mini", "paper"])
def test_plans_share_a_run_only_where_it_is_the_same(scale):
    settings, known = Settings(scale=scale, out=Path("out"), seeds=2), {}
    for recipe in RECIPES.values():
        plan = recipe.plan(settings)
        assert len({training.name for training in plan}) == len(plan) > 1
        for training in plan:
            assert known.setdefault(training.name, training.run) == training.run
    sizes = {run.model.trunk.width for run in known.values()}
    assert sizes == {128 if scale == "mini" else 768}


def test_the_users_text_and_steps_reach_the_mini_runs_and_not_the_papers():
    for scale, sources in (("mini", {"mine.txt"}), ("paper", {"text8", "openwebtext"})):
        plan = passes.plan_fig6(
            Settings(scale=scale, out=Path("out"), data="mine.txt", steps=9, precision="bfloat16")
        )
        assert {training.run.train.precision for training in plan} == {"bfloat16"}
        assert {training.run.data.source for training in plan} == sources
        assert {training.run.train.num_steps for training in plan} == {9}


TRUNK = TransformerConfig(width=8, num_heads=2, mlp_ratio=2)
TINY = RunConfig(
    name="tiny",
    model=FlowConfig(context=16, latent_dim=2, trunk=TRUNK, blocks=stack(("mixd", "mix1"), (1, 1), (0, 2))),
    train=TrainConfig(stage_steps=(3, 3), batch_size=2, evaluate_windows=2, checkpoint_every=2, log_every=1),
)


def tiny_plan(settings: Settings):
    return trainings(settings, {"tiny": TINY})


TINY_RECIPE = Recipe(
    name="tiny",
    title="A tiny table",
    claim="nothing.",
    plan=tiny_plan,
    measure=lambda _settings, finished: [summary_row(done) for done in finished],
    text=lambda _settings, finished, rows: f"{len(finished)} runs, {len(rows)} rows.\n",
)


@pytest.fixture(autouse=True)
def private_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("TARFLOWLM_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def settings(tmp_path) -> Settings:
    rng = random.Random(1)
    text = tmp_path / "text.txt"
    text.write_text("".join(rng.choices(TEXT8_ALPHABET, k=1500)), encoding="utf-8")
    return Settings(scale="mini", out=tmp_path / "out", data=str(text), seeds=2)


@pytest.mark.parametrize(
    ("scale", "asked", "seeds"), [("mini", 1, [0, 1]), ("mini", 3, [0, 1, 2]), ("paper", 1, [0])]
)
def test_a_recipe_of_small_differences_has_more_than_one_seed(scale, asked, seeds):
    settings = Settings(scale=scale, out=Path("out"), seeds=asked)
    assert [t.run.seed for t in replace(TINY_RECIPE, seeds=2).trainings(settings)] == seeds
    assert [t.run.seed for t in TINY_RECIPE.trainings(settings)] == list(range(asked))
    clear = replace(TINY_RECIPE, seeds=2, clear=("tiny",))
    assert [t.run.seed for t in clear.trainings(settings)] == list(range(asked))


@pytest.mark.parametrize("name", RECIPES)
def test_the_recipes_of_small_differences(name):
    seeds = {training.run.seed for training in RECIPES[name].trainings(Settings(scale="mini", out=Path("out")))}
    assert seeds == ({0, 1} if name in ("table2", "fig2", "progressive") else {0})


class Notices(Reporter):
    def __init__(self) -> None:
        self.said: list[str] = []

    def notice(self, text: str) -> None:
        self.said.append(text)


def test_what_is_done_is_not_done_again(settings):
    first, second = Notices(), Notices()
    done = finish(settings, tiny_plan(settings), first)
    weights = [(d.directory / "model.safetensors").read_bytes() for d in done]
    again = finish(settings, tiny_plan(settings), second)
    assert [d.directory.name for d in again] == ["tiny-s0", "tiny-s1"]
    assert weights[0] != weights[1]
    assert second.said == ["tiny-s0 is done", "tiny-s1 is done"]
    assert [(d.directory / "model.safetensors").read_bytes() for d in again] == weights


class Stop(Exception):
    pass


class StopAt(Reporter):
    def __init__(self, step: int) -> None:
        self.at = step

    def record(self, record) -> None:
        if record["step"] == self.at:
            raise Stop


@pytest.mark.parametrize(("step", "state"), [(1, "stopped"), (5, "stopped")])
def test_what_was_stopped_goes_on_to_the_same_end(settings, tmp_path, step, state):
    [training, _] = tiny_plan(settings)
    with pytest.raises(Stop):
        finish(settings, [training], StopAt(step))
    assert state_of(settings, training) == state
    [done] = finish(settings, [training], Reporter())
    [whole] = finish(replace(settings, out=tmp_path / "whole"), [training], Reporter())
    assert state_of(settings, training) == "finished"
    # not byte by byte: the order of the file's metadata is free
    ours, theirs = (load_file(d.directory / "model.safetensors") for d in (done, whole))
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


def test_a_run_of_another_configuration_is_left_alone(settings):
    [done, _] = finish(settings, tiny_plan(settings), Reporter())
    before = (done.directory / "model.safetensors").read_bytes()
    other = replace(TINY, optim=replace(TINY.optim, lr=1e-3))
    with pytest.raises(UserError, match=r"tiny-s0 .*another configuration"):
        finish(settings, trainings(settings, {"tiny": other}), Reporter())
    assert (done.directory / "model.safetensors").read_bytes() == before


def test_a_run_that_another_process_has_just_begun_is_left_alone(settings):
    [training, _] = tiny_plan(settings)
    with pytest.raises(Stop):
        finish(settings, [training], StopAt(1))
    directory = directory_of(settings, training)
    with writer_lock(directory), pytest.raises(UserError, match="being written"):
        finish(settings, [training], Reporter())
    assert (directory / "config.json").is_file()


def test_what_would_stop_a_later_recipe_stops_all_of_them_at_once(settings, refused, monkeypatch):
    finish(settings, tiny_plan(settings)[:1], Reporter())
    other = replace(TINY, optim=replace(TINY.optim, lr=1e-3))
    good = replace(TINY_RECIPE, plan=lambda settings: trainings(settings, {"good": replace(TINY, name="good")}))
    bad = replace(TINY_RECIPE, plan=lambda settings: trainings(settings, {"tiny": other}))
    foreign = replace(TINY_RECIPE, needs=(("no_such_module", "quality"),))
    for name in list(RECIPES):
        monkeypatch.delitem(RECIPES, name)
    monkeypatch.setitem(RECIPES, "good", good)
    argv = ["reproduce", "all", "--out", settings.out, "--data", settings.data, "--device", "cpu"]
    for recipe, words in ((bad, "another configuration"), (foreign, "tarflowlm[quality]")):
        monkeypatch.setitem(RECIPES, "later", recipe)
        refused(*argv, names=[words])
    assert [path.name for path in (settings.out / "runs").iterdir()] == ["tiny-s0"]


def test_estimates_count_all_tokens_and_time_every_shape_once(settings, monkeypatch):
    timed = []

    def two_seconds(run, stage, batches, device, *, num_steps):
        timed.append((stage, tuple(batches().shape)))
        return 2.0

    monkeypatch.setattr("tarflowlm.reproduce.recipe.seconds_per_step", two_seconds)
    planned = estimate(settings, tiny_plan(settings))
    assert [(p.state, p.tokens, p.seconds) for p in planned] == [("new", 6 * 2 * 16, 12.0)] * 2
    assert timed == [(0, (2, 16)), (1, (2, 16))]
    paper = replace(settings, scale="paper")
    # of one sequence, so for two of them twice as long
    assert estimate(paper, tiny_plan(paper))[0].seconds == 24.0


def test_estimates_are_timed_on_the_models_themselves(settings):
    [planned, _] = estimate(settings, tiny_plan(settings))
    assert 0 < planned.seconds < 60
    assert not settings.out.exists()


def test_results_say_how_they_were_made(settings, run, run_json, monkeypatch):
    recipe = replace(
        TINY_RECIPE,
        draw=lambda figure, rows: figure.subplots().plot([row["test bpc"] for row in rows]),
        page=lambda rows: f"<p>{len(rows)} rows</p>",
        csv_only=("ppl",),
    )
    if "matplotlib" not in sys.modules:
        pytest.importorskip("matplotlib")
    monkeypatch.setitem(RECIPES, "tiny", recipe)
    monkeypatch.setattr("tarflowlm.cli.arguments.RECIPE_NAMES", ("tiny",))
    argv = ["reproduce", "tiny", "--out", settings.out, "--data", settings.data, "--seeds", 2, "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["tarflowlm", *map(str, argv)])
    result = run_json(*argv)
    assert [Path(p).name for p in result["files"]] == ["tiny.csv", "tiny.png", "tiny.html", "tiny.md"]
    with (settings.out / "tiny.csv").open(encoding="utf-8") as file:
        table = list(csv.DictReader(file))
    assert [float(row["test bpc"]) for row in table] == [row["test bpc"] for row in result["rows"]]
    assert "ppl" in table[0]
    assert (settings.out / "tiny.html").read_text(encoding="utf-8") == "<p>2 rows</p>"
    page = (settings.out / "tiny.md").read_text(encoding="utf-8")
    for part in (
        "| tiny | 0 | <= |",
        "2 runs, 2 rows.",
        "tarflowlm reproduce tiny",
        "tiny-s1",
        "text.txt: `",
        "PyTorch",
    ):
        assert part in page
    assert "ppl" not in page
    assert "[tiny.html](tiny.html)" in page
    assert (settings.out / "tiny.png").read_bytes()[:4] == b"\x89PNG"
    # the plan says what is done, and a second run needs no training
    assert run(*argv, "--dry-run").out.count("finished") == 2


def test_all_recipes_are_run_and_what_they_share_is_planned_once(settings, run_json, monkeypatch):
    for name in list(RECIPES):
        monkeypatch.delitem(RECIPES, name)
    for name in ("first", "second"):
        monkeypatch.setitem(RECIPES, name, replace(TINY_RECIPE, name=name))
    monkeypatch.setitem(RECIPES, "third", replace(TINY_RECIPE, name="third", seeds=2))
    argv = ["reproduce", "all", "--out", settings.out, "--data", settings.data, "--device", "cpu"]
    assert [planned["run"] for planned in run_json(*argv, "--dry-run")["runs"]] == ["tiny-s0", "tiny-s1"]
    results = run_json(*argv)["recipes"]
    assert [result["name"] for result in results] == ["first", "second", "third"]
    assert results[0]["rows"] == results[1]["rows"] == results[2]["rows"][:1]
    assert [row["seed"] for row in results[2]["rows"]] == [0, 1]
    assert all(Path(path).is_file() for result in results for path in result["files"])


@pytest.mark.parametrize(
    ("argv", "names"),
    [
        (["fig9"], ["'fig9'", "table2"]),
        (["fig3", "--seeds", "0"], ["seeds 0"]),
        (["fig3", "--steps", "0"], ["steps 0"]),
        (["fig3", "--scale", "huge"], ["'huge'", "mini"]),
        (["fig3", "--data", "no-such.txt"], ["'no-such.txt'"]),
        (["table2", "--data", "no-such.txt", "--dry-run"], ["'no-such.txt'"]),
        (["table2", "--second-text", "no-such.txt", "--dry-run"], ["'no-such.txt'"]),
        (["table6", "--judge-data", "no-such.txt", "--dry-run"], ["'no-such.txt'"]),
        (["fig3", "--data", "x.txt", "--scale", "paper"], ["--data x.txt", "no effect", "paper"]),
        (["fig3", "--second-text", "x.txt"], ["--second-text x.txt", "no effect", "table2"]),
    ],
)
def test_wrong_requests_are_named(refused, tmp_path, monkeypatch, argv, names):
    # whatever a recipe needs counts as installed
    monkeypatch.setattr("tarflowlm.cli.reproduce.find_spec", lambda name: name)
    refused("reproduce", *argv, "--out", tmp_path / "out", names=names)


def test_results_need_a_directory(refused, tmp_path):
    (tmp_path / "file").write_text("mine", encoding="utf-8")
    refused("reproduce", "fig3", "--dry-run", "--out", tmp_path / "file", names=["file is a file", "--out"])
