"""Which blocks of a Mix-1 stack do the work of a language model, by seed and by start."""

import math
from collections.abc import Sequence
from functools import partial
from itertools import pairwise

from reproduction import measures
from reproduction.lengths import lengthened
from reproduction.plots import plot_models
from reproduction.recipe import Finished, Recipe, Row, Training, trainings, variant
from reproduction.settings import Settings

SHIPPED = "Mix-1"
FIRST_STARTS = "Mix-1, the first block starts"
COUNTING = 4.042
"""Bits of a letter of tales by its frequency alone (`python -m reproduction.ngrams`)."""
WRITER = "does most"


def plan_lottery(settings: Settings) -> list[Training]:
    """Mix-1 as it ships, and with the start of a stack that grows block by block."""
    run = lengthened(settings.preset("mix1", "text8"), "1/4")
    other = variant(run, "first-starts", starts="first")
    return trainings(settings, {SHIPPED: run, FIRST_STARTS: other})


def measure_lottery(_settings: Settings, finished: Sequence[Finished]) -> list[Row]:
    """The bound on test and validation, the nats that each block takes off, the bits of the priors
    that end after each block, what these have below counting letters, and the block that adds most
    to it.
    """
    rows = []
    for done in finished:
        gains = measures.gains(done)
        row = measures.summary_row(done)
        row["valid bpc"] = done.record.summary["stage_valid_bpc"][-1]
        nats = [*gains.values()]
        ends = bits_after_blocks(row["test bpc"], nats)
        shares = work(row["test bpc"], nats)
        row |= gains
        row |= {f"bpc up to block {number}": bits for number, bits in enumerate(ends[:-1], 1)}
        row["bits below letters, by block"] = ", ".join(f"{share + 0.0:.2f}" for share in shares)
        row[WRITER] = f"block {1 + shares.index(max(shares))}"
        rows.append(row)
    return rows


def bits_after_blocks(bits: float, nats: Sequence[float]) -> list[float]:
    """Bits per token of the priors that end after block 1, 2, ..., from those of the whole stack
    and the nats per token that every block takes off the KL divergence.
    """
    return [bits + sum(nats[number:]) / math.log(2) for number in range(1, len(nats) + 1)]


def work(bits: float, nats: Sequence[float]) -> list[float]:
    """The bits per letter that every block adds to what a stack has below `COUNTING`.

    Most nats that a block takes off only make the narrow codes normal. What a prior knows of the
    text is what it has below the frequencies of the letters.
    """
    ends = [COUNTING, *(min(end, COUNTING) for end in bits_after_blocks(bits, nats))]
    return [before - after for before, after in pairwise(ends)]


LOTTERY = Recipe(
    name="lottery",
    mini_only=True,
    title="Which blocks do the work",
    claim=(
        "Three Mix-1 blocks of 1, 1 and 4 layers are trained together. Which of them knows the "
        "language, and what does it cost if it is not the deep one? As shipped, block 3 starts as "
        "a wide mixture that reads the features a little, and the other blocks start as the "
        "identity. In the second model block 1 starts as that mixture. (Most of the KL divergence "
        "that a block takes off only makes the narrow codes normal, which needs no knowledge of "
        "language. So the work of a block is what it adds to the bits per letter that a stack has "
        f"below the frequencies of the letters, {COUNTING}. A prior that ends after a block has "
        "the bits of the stack and what the blocks above take off. A quarter of the steps of the "
        "preset.)"
    ),
    plan=plan_lottery,
    measure=measure_lottery,
    draw=partial(plot_models, label="bits per character (bounds)"),
    seeds=4,
)
