"""Figure 3: affine against Mix-1 in six blocks."""

from dataclasses import replace

from tarflowlm.model import CouplingName, FlowConfig
from tarflowlm.reproduce.measures import dots, short, summaries
from tarflowlm.reproduce.recipe import Recipe, Settings, Training, trainings
from tarflowlm.runs.config import RunConfig
from tarflowlm.runs.presets import preset

BLOCKS = 6


def plan(settings: Settings) -> list[Training]:
    return trainings(settings, {"affine": _six(settings, "affine"), "Mix-1": _six(settings, "mix1")})


def _six(settings: Settings, coupling: CouplingName) -> RunConfig:
    """Six blocks of two layers; of one layer at mini scale, the depth of the baseline."""
    mini = settings.scale == "mini"
    run = preset(f"{'mini' if mini else 'text8'}-{coupling}")
    assert isinstance(run.model, FlowConfig)
    components = (1,) * BLOCKS if coupling == "affine" else (27, *[2 if mini else 27] * (BLOCKS - 1))
    layers = (1 if mini else 2,) * BLOCKS
    model = replace(run.model, couplings=(coupling,) * BLOCKS, layers=layers, components=components)
    run = replace(run, name=f"{run.name}-six", model=model)
    return short(run) if mini else run


RECIPE = Recipe(
    name="fig3",
    title="Affine against Mix-1, six blocks",
    claim="The paper: with six blocks of two layers, Mix-1 reaches a clearly better bound than affine couplings.",
    plan=plan,
    measure=summaries,
    draw=lambda figure, rows: dots(figure, rows, "test bpc", unit="bits per character, <="),
)
