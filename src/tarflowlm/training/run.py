"""The state of a training run: its counters, and all that its loop holds."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Generator, Tensor, nn

from tarflowlm.config import RunConfig, TrainConfig
from tarflowlm.data import Corpus, WindowSampler
from tarflowlm.model import LanguageModel
from tarflowlm.processes import Processes
from tarflowlm.training.log import MetricsLog
from tarflowlm.training.writer import Writer


@dataclass
class Counters:
    """The progress of a run in plain numbers, which counters.json of a checkpoint holds."""

    step: int = 0  # optimiser steps of all stages
    tokens: int = 0  # of all steps, over all processes
    saved_step: int = -1  # of the newest checkpoint
    flat_step: int = -1  # of the newest one from before the rate fell, by which a run is extended

    # the current stage
    stage: int = 0  # from 0
    stage_step: int = 0
    share: float = 0.0  # how much of the stage is done, by its steps or by its time
    expected_steps: int | float = 1  # of the stage; an estimate if its time is limited
    evaluation_is_due: bool = False  # before the next step
    lowest: float = math.inf  # validation bound of the stage, in nats per token: that of best/
    lowest_at: int = 0  # the step of the stage that has it
    stalled: int = 0  # evaluations since

    # the stages that have ended
    stage_steps: list[int] = field(default_factory=list)
    valid_bpc: list[float] = field(default_factory=list)  # bits per character of kept weights
    idle: int = 0  # stages that left the run together with their block

    # wall-clock seconds
    training: float = 0.0  # without evaluations and checkpoints
    total: float = 0.0  # from the start to the newest checkpoint; a kill loses the time after it
    stage_start: float = 0.0  # `total` when the stage began
    evaluation: float = 0.0  # duration of the newest validation
    evaluated: float = 0.0  # from the start to its end
    per_window: float = 0.0  # of it, for one window

    @property
    def stage_is_over(self) -> bool:
        """Whether the steps or the time of the stage are used up; the first one takes a step."""
        return self.step > 0 and self.share >= 1

    def place(self) -> dict[str, int | float]:
        """The place of the run for a line of the log; `block` also counts blocks that left."""
        return {
            "step": self.step,
            "tokens": self.tokens,
            "seconds": round(self.training, 2),
            "block": self.stage + self.idle + 1,
        }

    def progress(self, train: TrainConfig) -> tuple[int, int]:
        """How much of the stage is done, and of how much: in steps, or thousandths of its time."""
        if train.minutes:
            return int(1000 * self.share), 1000
        return self.stage_step, train.stage_steps[self.stage]


@dataclass(eq=False)
class Run:
    """A training run in one of its processes, of which only the first one writes files."""

    # constants, the same in all processes
    out: Path
    corpus: Corpus
    device: torch.device
    processes: Processes
    compiles: bool  # whether Transformer layers are compiled
    log: MetricsLog
    writer: Writer  # of weights and states, while training continues
    stop_signal: Callable[[], str | None]  # why this process was asked to stop, or None

    # saved in a checkpoint, which restores it
    config: RunConfig  # with the blocks of all stages; one that gained nothing leaves it
    counters: Counters = field(default_factory=Counters)
    model: LanguageModel = field(init=False)  # with the blocks of the stages so far
    optimizers: list[torch.optim.Optimizer] = field(init=False)  # of the stage
    copies: dict[str, dict[str, Tensor]] = field(init=False)
    """Copies of the trained weights by parameter: the "average", and the "best" by validation, each
    only if the configuration asks for it.
    """
    sampler: WindowSampler = field(init=False)  # the place in the text
    generator: Generator = field(init=False)  # of the noise

    # made again by every process that begins or resumes
    bound: nn.Module = field(init=False)  # the model's negative bound as DDP or FSDP2 wrap it
    validated: nn.Module | None = None
    """The `bound` that this process has evaluated, which may compile it."""
    began: float = field(init=False)
    """When the run began, on the clock of `time.monotonic`, less pauses and compilation."""

    @property
    def is_sharded(self) -> bool:
        """Whether FSDP2 divides the trained parameters among the processes."""
        return self.processes.shards(self.config.train)

    @property
    def has_full_rate(self) -> bool:
        """Whether the rate has not begun to fall."""
        return self.counters.share <= 1 - self.config.optim.decay

    @property
    def stage_name(self) -> str:
        """The stage in words, such as "stage 2/3: block 2 mix1"."""
        model, counters = self.config.model, self.counters
        count = self.config.num_stages + counters.idle
        if count > 1:
            number = counters.stage + counters.idle + 1
            return f"stage {number}/{count}: {model.describe(counters.stage)}"
        return model.describe(0) if model.num_blocks == 1 else "all blocks"

    def stop_requested(self) -> str | None:
        """Why this process or another one was asked to stop, or None. Collective."""
        asked = self.stop_signal()
        if self.processes.any(asked is not None):
            return asked or "a signal to another process"
        return None
