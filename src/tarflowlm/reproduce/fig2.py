"""Figure 2: the ladder of ablations."""

from collections.abc import Sequence
from dataclasses import replace

from tarflowlm.presets import preset
from tarflowlm.reproduce.measures import dots, summary_row
from tarflowlm.reproduce.recipe import Finished, Recipe, Row, Settings, Training, trainings


def plan(settings: Settings) -> list[Training]:
    prefix = "mini" if settings.scale == "mini" else "text8"
    progressive = preset(f"{prefix}-mixd")
    # the same steps in all, every block in each of them
    stages = progressive.train.stage_steps
    joint = replace(
        progressive,
        name=f"{progressive.name}-joint",
        train=replace(progressive.train, mode="joint", stage_steps=(sum(stages),)),
    )
    return trainings(
        settings,
        {
            "affine": preset(f"{prefix}-affine"),
            "+ Mix-1": preset(f"{prefix}-mix1"),
            "+ Mix-d": joint,
            "+ progressive": progressive,
        },
    )


def measure(settings: Settings, finished: Sequence[Finished]) -> list[Row]:
    return [summary_row(done) for done in finished]


RECIPE = Recipe(
    name="fig2",
    title="Ladder of ablations",
    claim="each rung is better than the last: base, + channel-wise affine, + Mix-1, + Mix-d, + progressive training. "
    "(The base, affine without the autoregression over channels, is not in this package; the ladder begins above.)",
    plan=plan,
    measure=measure,
    draw=lambda axes, rows: dots(axes, rows, "test bpc", unit="bits per character, <="),
)
