"""Which block of a Mix-1 stack becomes the language model, seed by seed; and two other starts."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from reproduction import measures
from reproduction.lengths import lengthened
from reproduction.plots import plot_models
from reproduction.recipe import (
    Finished,
    Recipe,
    Row,
    Training,
    trainings,
    variant,
)
from reproduction.settings import Settings, as_flow_config
from tarflowlm.flow.channelwise import Mix1Coupling
from tarflowlm.flow.couplings import Coupling, Features, Latents
from tarflowlm.flow.plan import BlockShape
from tarflowlm.model_config import BlockConfig, Mix1, coupling
from tarflowlm.schema import from_dict, to_dict

STARTING, IDENTITY, WAITING = "mix1-starting", "mix1-identity", "mix1-waiting"
SHIPPED = "Mix-1"
LAST_STARTS = "the last block starts"
LOWER_WAIT = "the lower blocks wait"
SEEDS, SEEDS_OF_STARTS = 8, 4
STEPS = 200
"""Forward passes in training, over which the features of a waiting block grow from 0 to 1: a step
has one for each part of its batch that is computed alone.
"""
WRITER = "language model"


def started(shape: BlockShape, *, as_first: bool) -> BlockShape:
    """The shape with the start of block 1: wide mixtures, which read the features a little.

    Or with that of a block above it, the identity.
    """
    head = replace(shape.head, noise=0.1 if as_first else 0.0)
    return replace(shape, is_first=as_first, head=head)


@coupling(STARTING, Mix1)
class StartingMix1(Mix1Coupling):
    """Mix-1 with the start of block 1 in any block."""

    @classmethod
    def build(cls, options: Any, shape: BlockShape) -> Coupling:
        return super().build(options, started(shape, as_first=True))


@coupling(IDENTITY, Mix1)
class IdentityMix1(Mix1Coupling):
    """Mix-1 that starts as the identity, in block 1 as well."""

    @classmethod
    def build(cls, options: Any, shape: BlockShape) -> Coupling:
        return super().build(options, started(shape, as_first=False))


@coupling(WAITING, Mix1)
class WaitingMix1(Mix1Coupling):
    """Mix-1 whose features grow from 0 to 1 over the first steps, for blocks below the last.

    At first it does not know the past, so it cannot become the language model before others can.
    """

    steps: Tensor

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.register_buffer("steps", torch.zeros(()))

    def channels(self, z: Latents, features: Features) -> tuple[Latents, Latents]:
        if self.training:
            self.steps += 1
        return super().channels(z, features * (self.steps / STEPS).clamp(max=1.0))


def as_kind(name: str, block: BlockConfig) -> BlockConfig:
    """The block with another coupling that has the same options."""
    return from_dict(BlockConfig, to_dict(block) | {BlockConfig.KEY: name})


def plan_lottery(settings: Settings) -> list[Training]:
    """Mix-1 as it ships with many seeds, and with each other start with a few."""
    run = settings.preset("mix1", "text8")
    if settings.scale == "mini":
        run = lengthened(run, "1/4")
    *lower, last = as_flow_config(run.model).blocks
    starting = (*(as_kind(IDENTITY, block) for block in lower), as_kind(STARTING, last))
    waiting = (*(as_kind(WAITING, block) for block in lower), last)
    starts = {
        LAST_STARTS: variant(run, "last-starts", blocks=starting),
        LOWER_WAIT: variant(run, "lower-wait", blocks=waiting),
    }
    few = replace(settings, seeds=min(settings.seeds, SEEDS_OF_STARTS))
    return trainings(settings, {SHIPPED: run}) + trainings(few, starts)


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
    title="Which block becomes the language model",
    claim=(
        "In three Mix-1 blocks of 1, 1 and 4 layers, which are trained together, the seed decides "
        "which block becomes the language model: it takes most off the KL divergence. How often is "
        "it the deep one, what does it cost if not, and does another start decide it? As shipped, "
        "block 1 starts as a wide mixture that reads the features a little, the others as the "
        "identity. In the second model block 3 starts so, and the others as the identity; in the "
        f"third the features of blocks 1 and 2 grow from zero over the first {STEPS} steps. (A "
        "quarter of the steps of the preset.)"
    ),
    plan=plan_lottery,
    measure=measure_lottery,
    draw=partial(plot_models, label="bits per character (bounds)"),
    seeds=SEEDS,
)
