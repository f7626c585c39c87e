"""A training run: its constants, its state, and the progress of its stage."""

import math
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Generator, Tensor, nn

from tarflowlm.config import RunConfig, TrainConfig
from tarflowlm.data import Corpus, WindowSampler
from tarflowlm.data.windows import EVALUATED
from tarflowlm.model import LanguageModel
from tarflowlm.processes import Processes
from tarflowlm.training.log import MetricsLog

TEST_SHARE = 0.15
"""The largest share of a run's time that the final test may take."""
LEAST_STEPS = 36
"""A stage after the first needs time for this many steps, or it is left out: fewer do harm."""


@dataclass
class Counters:
    """The progress of a run in plain numbers, which counters.json of a checkpoint holds."""

    step: int = 0  # optimiser steps of all stages
    tokens: int = 0  # of all steps, over all processes
    saved_step: int = -1  # of the newest checkpoint

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
    per_window: float = 0.0  # of it, for one window

    @property
    def stage_is_over(self) -> bool:
        """Whether the steps or the time of the stage are used up; the first one takes a step."""
        return self.step > 0 and self.share >= 1

    def place(self) -> dict[str, int]:
        """The place of the run for a line of the log; `block` also counts blocks that left."""
        return {"step": self.step, "tokens": self.tokens, "block": self.stage + self.idle + 1}

    def progress(self, train: TrainConfig) -> tuple[int, int]:
        """How much of the stage is done, and of how much: in steps, or thousandths of its time."""
        if train.minutes:
            return int(1000 * self.share), 1000
        return self.stage_step, train.stage_steps[self.stage]


@dataclass(frozen=True)
class Run:
    """The constants of a run. All processes hold the same; only the first one writes files."""

    out: Path
    corpus: Corpus
    device: torch.device
    processes: Processes
    compiles: bool  # whether Transformer layers are compiled
    log: MetricsLog
    stop_signal: Callable[[], str | None]  # why this process was asked to stop, or None
    writer: ThreadPoolExecutor  # one thread, which writes checkpoints while training continues
    writes: list[Future[None]]  # work of the thread that may be unfinished
    group: dist.ProcessGroup | None
    """The same processes, for collectives of that thread, which must not mix with the training's.
    None for a single process.
    """

    def stop_requested(self) -> str | None:
        """Why this process or another one was asked to stop, or None. Collective."""
        asked = self.stop_signal()
        if self.processes.any(asked is not None):
            return asked or "a signal to another process"
        return None


@dataclass
class State:
    """The values that change with a step or a stage. A checkpoint restores them all."""

    config: RunConfig  # with the blocks of all stages; one that gained nothing leaves it
    counters: Counters
    model: LanguageModel  # with the blocks of the stages so far
    sampler: WindowSampler  # the place in the text
    generator: Generator  # of the noise

    # set by `built_state`
    began: float = field(init=False)
    """When the run began, on the clock of `time.monotonic`, less pauses and compilation."""
    # made by `enter_stage`
    bound: nn.Module = field(init=False)  # the model's negative bound as DDP or FSDP2 wrap it
    optimizers: list[torch.optim.Optimizer] = field(init=False)
    copies: dict[str, dict[str, Tensor]] = field(init=False)
    """Copies of the trained weights by parameter: the "average", and the "best" by validation, each
    only if the configuration asks for it.
    """
    validated: nn.Module | None = None
    """The `bound` that this process has evaluated, which may compile it."""

    @property
    def stage_name(self) -> str:
        """The stage in words, such as "stage 2/3: block 2 mix1"."""
        model, counters = self.config.model, self.counters
        count = self.config.num_stages + counters.idle
        if count > 1:
            number = counters.stage + counters.idle + 1
            return f"stage {number}/{count}: {model.describe(counters.stage)}"
        return model.describe(0) if model.num_blocks == 1 else "all blocks"


def seconds(run: Run, state: State) -> float:
    """Wall-clock seconds since the run began, without pauses and compilation. Collective."""
    return run.processes.from_first(time.monotonic() - state.began)


def update_pace(run: Run, state: State) -> None:
    """Let the counters say how much of the stage is done. Collective."""
    train, counters = state.config.train, state.counters
    if train.minutes:
        windows = num_test_windows(run.corpus, state.config)
        measure_pace(train, counters, seconds(run, state), windows)
    else:
        steps = train.stage_steps[counters.stage]
        counters.expected_steps = steps
        counters.share = counters.stage_step / steps if steps else 1.0


def num_test_windows(corpus: Corpus, config: RunConfig) -> int:
    """Windows of the test split that a run without a time limit evaluates at its end."""
    context = config.model.context
    available = corpus.num_tokens("test") // context
    wanted = config.train.test_windows or EVALUATED // context
    return min(wanted, available)


def is_time_to_save(run: Run, state: State) -> bool:
    """Whether a checkpoint is due, by steps or under a time limit once a minute. Collective."""
    train, counters = state.config.train, state.counters
    if counters.step % train.checkpoint_every == 0:
        return True
    return train.minutes > 0 and seconds(run, state) - counters.total > 60.0


def measure_pace(train: TrainConfig, counters: Counters, now: float, test_windows: int) -> None:
    """Update the counters of a run with a time limit, which began `now` seconds ago.

    `train.stage_steps` are the shares of the stages in the remaining time. Time is reserved for the
    evaluation that ends every remaining stage, and for the `test_windows` at the end of the run.
    """
    step = counters.stage_step
    passed = now - counters.stage_start
    limit = 60 * train.minutes
    test = TEST_SHARE * limit
    if counters.per_window:
        test = min(test, 1.2 * test_windows * counters.per_window)
    left = limit - test - counters.stage_start
    shares = [*train.stage_steps[counters.stage :]]
    least = LEAST_STEPS * now / max(counters.step, 1)
    # a stage without time for these steps gets none, the last stage first; a begun one continues
    has_begun = step > 0 or counters.stage == 0
    for index in reversed(range(int(has_begun), len(shares))):
        if left * shares[index] < least * sum(shares):
            shares[index] = 0
    own = (left - len(shares) * counters.evaluation) * shares[0] / max(sum(shares), 1)
    # the share never falls, even if an evaluation is shorter than estimated
    counters.share = max(counters.share, min(1.0, passed / own) if own > 0 else 1.0)
    # the first step may compile, which does not count: expect a thousand until one is timed
    counters.expected_steps = step / max(counters.share, 1e-9) if step > 1 else 1000.0
