"""Figure 2: the ladder of ablations."""

from dataclasses import replace

from tarflowlm.model import CouplingName, FlowConfig
from tarflowlm.reproduce.measures import dots, summaries
from tarflowlm.reproduce.recipe import Recipe, Settings, Training, trainings
from tarflowlm.runs.config import RunConfig
from tarflowlm.runs.presets import preset


def plan(settings: Settings) -> list[Training]:
    prefix = "mini" if settings.scale == "mini" else "text8"
    affine, progressive = preset(f"{prefix}-affine"), preset(f"{prefix}-mixd")
    assert isinstance(affine.model, FlowConfig)
    token: CouplingName = "token-affine"
    couplings = (token,) * len(affine.model.couplings)
    return trainings(
        settings,
        {
            "base": replace(affine, name=f"{prefix}-base", model=replace(affine.model, couplings=couplings)),
            "+ channel-wise": affine,
            "+ Mix-1": preset(f"{prefix}-mix1"),
            "+ Mix-d": joint(progressive),
            "+ progressive": progressive,
        },
    )


def joint(progressive: RunConfig) -> RunConfig:
    """The same steps in all, every block in each of them."""
    train = replace(progressive.train, mode="joint", stage_steps=(sum(progressive.train.stage_steps),))
    return replace(progressive, name=f"{progressive.name}-joint", train=train)


RECIPE = Recipe(
    name="fig2",
    title="Ladder of ablations",
    claim="The paper: every addition improves the model: base (one affine map for all channels of a token), + "
    "channel-wise affine, + Mix-1, + Mix-d, + progressive training.",
    plan=plan,
    measure=summaries,
    draw=lambda figure, rows: dots(figure, rows, "test bpc", unit="bits per character, <="),
)
