"""Figure 4: the number of mixture components."""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from tarflowlm.model import FlowConfig
from tarflowlm.presets import preset, with_steps
from tarflowlm.reproduce.measures import summary_row
from tarflowlm.reproduce.recipe import Finished, Recipe, Row, Settings, Training, trainings
from tarflowlm.training.config import RunConfig

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COMPONENTS = (1, 2, 4, 8, 16, 27)
MINI_STEPS = 400
"""The order shows early: K = 1 and K > 1 are whole bits apart."""


def plan(settings: Settings) -> list[Training]:
    return trainings(settings, {f"K = {k}": _run(settings, k) for k in COMPONENTS})


def _run(settings: Settings, components: int) -> RunConfig:
    """Mix-1 with K components in every block; the codebook learns at one rate for all K."""
    mini = settings.scale == "mini"
    run = preset("mini-mix1" if mini else "text8-mix1")
    assert isinstance(run.model, FlowConfig)
    model = replace(run.model, components=(components,) * len(run.model.couplings))
    run = replace(run, name=f"{run.name}-k{components}", model=model, optim=replace(run.optim, codebook_lr_scale=1.0))
    return with_steps(run, MINI_STEPS) if mini else run


def measure(settings: Settings, finished: Sequence[Finished]) -> list[Row]:
    rows = []
    for done in finished:
        assert isinstance(done.training.run.model, FlowConfig)
        rows.append({"K": done.training.run.model.components[0], **summary_row(done)})
    return rows


def draw(figure: "Figure", rows: Sequence[Row]) -> None:
    axes = figure.subplots()
    axes.plot([row["K"] for row in rows], [row["test bpc"] for row in rows], "o")
    axes.set_xscale("log", base=2)
    axes.set_xticks(COMPONENTS, [str(k) for k in COMPONENTS])
    axes.set_xlabel("mixture components K")
    axes.set_ylabel("bits per character, <=")
    axes.grid(alpha=0.3)


RECIPE = Recipe(
    name="fig4",
    title="Mixture components",
    claim="K = 1 is far worse than any K above 1, which all work. (With K = 27, the vocabulary, block 1 starts from "
    "the codebook here, and with other K it does not.)",
    plan=plan,
    measure=measure,
    draw=draw,
)
