"""The families compared after more and more training."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from reproduction import tables
from reproduction.measures import summary_row
from reproduction.recipe import RUN_DETAILS, Finished, Recipe, Row, Training, trainings, without
from reproduction.settings import Settings
from tarflowlm.config import RunConfig
from tarflowlm_apps.report.style import Figure

LENGTHS = {"1/4": 0.25, "1/2": 0.5, "1": 1.0, "2": 2.0}
"""Multiples of the steps of a preset."""
GREATEST = {"AR": "2", "affine": "2", "Mix-1": "1", "Mix-d": "2"}
"""The greatest length of each family."""
TOKENS = "tokens of block 1"
RATIO = "over AR"


def plan_lengths(settings: Settings) -> list[Training]:
    """Every family for every length, with the schedule of that length."""
    plan = []
    for label, kind in tables.FAMILIES.items():
        for name, factor in LENGTHS.items():
            if factor > LENGTHS[GREATEST[label]]:
                continue
            run = lengthened(settings.preset(kind, "text8"), name)
            # only the length of the presets has further seeds, which table2 shares
            few = settings if factor == 1 else replace(settings, seeds=1)
            plan += trainings(few, {label: run})
    return plan


def lengthened(run: RunConfig, name: str) -> RunConfig:
    """The run with every stage as long as LENGTHS says under this name."""
    factor = LENGTHS[name]
    if factor == 1:
        return run
    steps = tuple(max(1, round(count * factor)) for count in run.train.stage_steps)
    name = f"{run.name}-x{name.replace('/', 'of')}"
    return replace(run, name=name, train=replace(run.train, stage_steps=steps))


def length_of(training: Training) -> str:
    """What the name of a run says of its length; empty for that of the preset."""
    return training.run.name.partition("-x")[2]


def tokens_of(done: Finished) -> int:
    """The tokens that block 1 was trained on."""
    run = done.training.run
    return run.train.stage_steps[0] * run.train.batch_size * run.model.context


def measure_lengths(_settings: Settings, finished: Sequence[Finished]) -> list[Row]:
    """The bound, the importance-weighted bound, and their ratios to the baseline's."""
    rows = []
    for done in finished:
        row = summary_row(done)
        row[TOKENS] = tokens_of(done)
        row |= tables.weighted_bound(done)
        rows.append(row)
    keys = [(length_of(done.training), done.training.run.seed) for done in finished]
    baselines = {key: row for key, row in zip(keys, rows, strict=True) if row["model"] == "AR"}
    weighted = f"iw-{tables.SAMPLES}"
    for key, row in zip(keys, rows, strict=True):
        baseline = baselines[key]
        row[RATIO] = row["test bpc"] / baseline["test bpc"]
        row[f"{weighted} {RATIO}"] = tables.tightened(row) / baseline["test bpc"]
    return rows


def draw_lengths(figure: Figure, rows: Sequence[Row]) -> None:
    """The ratio to the baseline over the tokens seen: the bound, and dashed the weighted bound.

    The lines join seed 0, which has every length; the other seeds are points.
    """
    axes = figure.subplots()
    for index, label in enumerate(label for label in tables.FAMILIES if label != "AR"):
        own = [row for row in rows if row["model"] == label]
        first = sorted((row for row in own if not row["seed"]), key=lambda row: row[TOKENS])
        for column, style in ((RATIO, "-"), (f"iw-{tables.SAMPLES} {RATIO}", "--")):
            axes.plot(
                [row[TOKENS] for row in first],
                [row[column] for row in first],
                style,
                color=f"C{index}",
                label=label if style == "-" else None,
            )
            axes.plot(
                [row[TOKENS] for row in own],
                [row[column] for row in own],
                "o",
                color=f"C{index}",
                markersize=4,
                fillstyle="full" if style == "-" else "none",
            )
    axes.axhline(1.0, color="gray", linewidth=0.8)
    axes.set_xscale("log", base=2)
    ticks = sorted({row[TOKENS] for row in rows})
    axes.set_xticks(ticks, [f"{count / 1e6:.1f} M" for count in ticks])
    axes.set(xlabel=f"{TOKENS} (characters)", ylabel="bits per character over the baseline's")
    axes.legend(title=f"dashed: iw-{tables.SAMPLES}")


LENGTHS_RECIPE = Recipe(
    name="lengths",
    title="Ratios over training length",
    claim=(
        "The paper, at one length: Mix-d 1.06, Mix-1 1.11 and affine 1.25 times the bits of the "
        "baseline on TEXT8. Are these where the ratios go with more training? (Every length has "
        f"its own schedule. iw-{tables.SAMPLES} is a tighter bound: what it takes off over "
        f"{tables.WINDOWS} windows is subtracted from the bound of the test. "
        "One length has seeds 0 and 1, every other length seed 0 alone.)"
    ),
    plan=plan_lengths,
    measure=measure_lengths,
    table=partial(without, columns=(*RUN_DETAILS, *tables.WINDOWED)),
    draw=draw_lengths,
    seeds=2,
)
