"""Patch size 1, 2, 4 and 8 at one depth."""

from collections.abc import Sequence
from dataclasses import replace

from tarflowlm.model import FlowConfig
from tarflowlm.reproduce.measures import bits_by, summary_row
from tarflowlm.reproduce.recipe import Finished, Recipe, Row, Settings, Training, trainings
from tarflowlm.runs.config import RunConfig
from tarflowlm.runs.presets import preset

PATCHES = (1, 2, 4, 8)


def plan(settings: Settings) -> list[Training]:
    return trainings(settings, {f"P = {patch}": _run(settings, patch) for patch in PATCHES})


def _run(settings: Settings, patch: int) -> RunConfig:
    """In-patch weights; everything but the patch as with one token at a time."""
    run = preset("mini-mixd" if settings.scale == "mini" else "text8-mixd")
    assert isinstance(run.model, FlowConfig)
    name = run.name if patch == 1 else f"{run.name}-p{patch}"
    return replace(run, name=name, model=replace(run.model, patch=patch))


def measure(settings: Settings, finished: Sequence[Finished]) -> list[Row]:
    rows = []
    for done in finished:
        assert isinstance(done.training.run.model, FlowConfig)
        rows.append({"P": done.training.run.model.patch, **summary_row(done)})
    return rows


RECIPE = Recipe(
    name="patches",
    title="Patch size at one depth",
    claim="Patches of several tokens shorten the sequence. What does each size cost? The paper does not say.",
    plan=plan,
    measure=measure,
    draw=lambda figure, rows: bits_by(figure, rows, "P", "tokens per position P"),
)
