"""Figure 4: the number of mixture components."""

from collections.abc import Sequence
from dataclasses import replace

from tarflowlm.model import FlowConfig
from tarflowlm.reproduce.measures import bits_by, short, summary_row
from tarflowlm.reproduce.recipe import Finished, Recipe, Row, Settings, Training, trainings
from tarflowlm.runs.config import RunConfig
from tarflowlm.runs.presets import preset

COMPONENTS = (1, 2, 4, 8, 16, 27)


def plan(settings: Settings) -> list[Training]:
    return trainings(settings, {f"K = {k}": _run(settings, k) for k in COMPONENTS})


def _run(settings: Settings, components: int) -> RunConfig:
    """Mix-1 with K components in every block; the codebook learns at one rate for all K."""
    mini = settings.scale == "mini"
    run = preset("mini-mix1" if mini else "text8-mix1")
    assert isinstance(run.model, FlowConfig)
    model = replace(run.model, components=(components,) * len(run.model.couplings))
    run = replace(run, name=f"{run.name}-k{components}", model=model, optim=replace(run.optim, codebook_lr_scale=1.0))
    return short(run) if mini else run


def measure(settings: Settings, finished: Sequence[Finished]) -> list[Row]:
    rows = []
    for done in finished:
        assert isinstance(done.training.run.model, FlowConfig)
        rows.append({"K": done.training.run.model.components[0], **summary_row(done)})
    return rows


RECIPE = Recipe(
    name="fig4",
    title="Mixture components",
    claim="The paper: K = 1 is far worse than any K above 1, and all of those work. (Here block 1 starts from the "
    "codebook with K = 27, the size of the vocabulary, but not with other K.)",
    plan=plan,
    measure=measure,
    draw=lambda figure, rows: bits_by(figure, rows, "K", "mixture components K"),
)
