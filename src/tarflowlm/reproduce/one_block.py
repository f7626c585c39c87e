"""One Mix-1 block with few components: a sanity check."""

from dataclasses import replace

from tarflowlm.model import FlowConfig
from tarflowlm.reproduce.measures import dots, short, summaries
from tarflowlm.reproduce.recipe import Recipe, Settings, Training, trainings
from tarflowlm.runs.config import RunConfig
from tarflowlm.runs.presets import preset

COMPONENTS = (2, 3, 4)


def plan(settings: Settings) -> list[Training]:
    return trainings(settings, {f"K = {k}": _run(settings, k) for k in COMPONENTS})


def _run(settings: Settings, components: int) -> RunConfig:
    """All layers of the three blocks in one."""
    mini = settings.scale == "mini"
    run = preset("mini-mix1" if mini else "text8-mix1")
    assert isinstance(run.model, FlowConfig)
    model = replace(run.model, couplings=("mix1",), layers=(sum(run.model.layers),), components=(components,))
    optim = replace(run.optim, codebook_lr_scale=1.0)
    run = replace(run, name=f"{run.name}-one-k{components}", model=model, optim=optim)
    return short(run) if mini else run


RECIPE = Recipe(
    name="one-block",
    title="One Mix-1 block with few components",
    claim="In the paper any K above 1 works in three blocks. Are two to four components enough in one?",
    plan=plan,
    measure=summaries,
    draw=lambda figure, rows: dots(figure, rows, "test bpc", unit="bits per character, <="),
)
