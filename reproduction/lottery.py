"""Which block of a Mix-1 stack becomes the language model, by seed and by start."""

from collections.abc import Sequence
from functools import partial

import numpy as np

from reproduction import measures
from reproduction.lengths import lengthened
from reproduction.plots import plot_models
from reproduction.recipe import Finished, Recipe, Row, Training, trainings, variant
from reproduction.settings import Settings

SHIPPED = "Mix-1"
FIRST_STARTS = "Mix-1, the first block starts"
WRITER = "language model"


def plan_lottery(settings: Settings) -> list[Training]:
    """Mix-1 as it ships, and with the start of a stack that grows block by block."""
    run = lengthened(settings.preset("mix1", "text8"), "1/4")
    other = variant(run, "first-starts", starts="first")
    return trainings(settings, {SHIPPED: run, FIRST_STARTS: other})


def measure_lottery(_settings: Settings, finished: Sequence[Finished]) -> list[Row]:
    """The bound on test and validation, the nats that each block takes off, and the block that
    takes off most.
    """
    rows = []
    for done in finished:
        gains = measures.gains(done)
        row = measures.summary_row(done)
        row["valid bpc"] = done.record.summary["stage_valid_bpc"][-1]
        row[WRITER] = f"block {1 + np.argmax([*gains.values()])}"
        rows.append(row | gains)
    return rows


LOTTERY = Recipe(
    name="lottery",
    mini_only=True,
    title="Which block becomes the language model",
    claim=(
        "In three Mix-1 blocks of 1, 1 and 4 layers, which are trained together, one block becomes "
        "the language model: it takes most off the KL divergence. Which, and what does it cost if "
        "it is not the deep one? As shipped, block 3 starts as a wide mixture that reads the "
        "features a little, and the other blocks start as the identity. In the second model block "
        "1 starts as that mixture. (A quarter of the steps of the preset.)"
    ),
    plan=plan_lottery,
    measure=measure_lottery,
    draw=partial(plot_models, label="bits per character (bounds)"),
    seeds=4,
)
