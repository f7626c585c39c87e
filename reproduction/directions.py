"""The paper's first claim: blocks of alternating direction give context from both sides."""

from collections.abc import Sequence
from functools import partial

from reproduction import measures, tables
from reproduction.lengths import lengthened
from reproduction.measures import JUDGED
from reproduction.passes import FILLING, judged_passes
from reproduction.plots import bits_error, plot_models
from reproduction.recipe import (
    RUN_DETAILS,
    Finished,
    Recipe,
    Row,
    Training,
    trainings,
    variant,
    without,
)
from reproduction.settings import Kind, Settings, as_flow_config
from tarflowlm.config import RunConfig
from tarflowlm.presets import preset
from tarflowlm_apps.report.style import Figure

ALTERNATING, ONE_WAY = "alternating", "left to right"


def plan_directions(settings: Settings) -> list[Training]:
    """Stacks with every second block right to left, and with all blocks left to right."""
    labels = "affine", "Mix-1"
    runs = {label: _shortened(settings, tables.FAMILIES[label]) for label in labels}
    if settings.scale == "mini":
        runs[FILLING] = preset("mini-passes")
    found = {}
    for label, run in runs.items():
        for alternate, directions in ((True, ALTERNATING), (False, ONE_WAY)):
            is_given = as_flow_config(run.model).alternate == alternate
            suffix = "both-ways" if alternate else "one-way"
            found[f"{label}, {directions}"] = (
                run if is_given else variant(run, suffix, alternate=alternate)
            )
    return trainings(settings, found) + measures.judge_training(settings)


def _shortened(settings: Settings, kind: Kind) -> RunConfig:
    run = settings.preset(kind, "text8")
    return run if settings.scale == "paper" else lengthened(run, "1/4")


def measure_directions(settings: Settings, finished: Sequence[Finished]) -> list[Row]:
    """The bound, the nats that each block takes off, and the judge's bits of the final text."""
    judge, models = measures.judge_of(settings, finished)
    rows = []
    for done in models:
        *_, final = judged_passes(done, judge)
        found = {JUDGED: final[JUDGED], "±": final["±"]}
        rows.append(
            measures.summary_row(done) | tables.weighted_bound(done) | found | measures.gains(done)
        )
    return rows


def draw_directions(figure: Figure, rows: Sequence[Row]) -> None:
    """The bits that alternation saves in each model.

    The error is that of independent windows, which is too large: both models read the same.
    """
    pairs: dict[tuple[str, int], dict[str, Row]] = {}
    for row in rows:
        label, _, directions = row["model"].rpartition(", ")
        pairs.setdefault((label, row["seed"]), {})[directions] = row
    gains = []
    for (label, seed), pair in pairs.items():
        one_way, both = pair[ONE_WAY], pair[ALTERNATING]
        error = (bits_error(one_way) ** 2 + bits_error(both) ** 2) ** 0.5
        gain = one_way["test bpc"] - both["test bpc"]
        gains.append({"model": label, "seed": seed, "gain": gain, "gain ±": error})
    plot_models(
        figure,
        gains,
        column="gain",
        error="gain ±",
        label="bits per character that alternating directions take off",
    )
    figure.axes[0].axhline(0.0, color="gray", linewidth=0.8)


DIRECTIONS = Recipe(
    name="directions",
    title="Alternating directions",
    claim=(
        "The paper: blocks of alternating direction give bi-directional context. Do they fit a "
        "text better, or write a better one, than blocks that all run left to right? (At mini "
        "size a quarter of the presets' steps for affine and Mix-1. The judge reads the samples of "
        "the whole stack. The one direction of the stack that fills in was chosen, on another "
        "text.)"
    ),
    plan=plan_directions,
    measure=measure_directions,
    table=partial(without, columns=(*RUN_DETAILS, *tables.WINDOWED, tables.SPREAD)),
    draw=draw_directions,
    seeds=2,
)
