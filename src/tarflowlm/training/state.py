"""A training run, and its progress in plain numbers."""

import math
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Generator, Tensor, nn

from tarflowlm.config import RunConfig
from tarflowlm.data import Corpus, WindowSampler
from tarflowlm.data.windows import EVALUATED
from tarflowlm.model import LanguageModel
from tarflowlm.processes import Processes
from tarflowlm.training.metrics import MetricsLog


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
    valid_bpc: list[float] = field(default_factory=list)  # bits per character of what was kept

    # the steps since the last line of the log
    window_losses: list[float] = field(default_factory=list)  # nats per token
    window_norms: list[float] = field(default_factory=list)  # of the gradient
    window_tokens: int = 0
    window_seconds: float = 0.0
    window_waited: float = 0.0  # seconds of these in which the next batch was not there yet

    # wall-clock seconds
    training: float = 0.0  # without evaluations and checkpoints
    total: float = 0.0  # from the start to the newest checkpoint; a kill loses what came after it
    stage_start: float = 0.0  # `total` when the stage began
    evaluation: float = 0.0  # duration of the newest validation
    per_window: float = 0.0  # of it, for one window

    @property
    def stage_is_over(self) -> bool:
        """Whether the steps or the time of the stage are used up; the first one takes a step."""
        return self.step > 0 and self.share >= 1

    def place(self) -> dict[str, int]:
        """Where the run is, as a line of the log says it."""
        return {"step": self.step, "tokens": self.tokens, "block": self.stage + 1}


@dataclass
class Run:
    """A training run. All processes hold the same; only the first one writes files."""

    # never change
    config: RunConfig
    out: Path
    corpus: Corpus
    device: torch.device
    processes: Processes
    compiles: bool  # whether Transformer layers are compiled
    log: MetricsLog
    stop_signal: Callable[[], str | None]  # why this process was asked to stop, or None
    writer: ThreadPoolExecutor  # one thread, which writes checkpoints while training continues
    writes: list[Future[None]]  # what the thread has not been seen to finish
    group: dist.ProcessGroup | None
    """The processes once more, for collectives of that thread; those of training must not mix.
    None for a single process.
    """

    # change with every step or stage: all of it is in a checkpoint, or follows from what is
    counters: Counters = field(init=False)
    model: LanguageModel = field(init=False)  # with the blocks of the stages so far
    bound: nn.Module = field(init=False)  # its negative bound as DDP or FSDP2 wrap it for the stage
    optimizers: list[torch.optim.Optimizer] = field(init=False)
    copies: dict[str, dict[str, Tensor]] = field(init=False)
    """Copies of the weights that train, the "average" and the "best" by validation, by parameter;
    each only if the configuration asks for it.
    """
    sampler: WindowSampler = field(init=False)  # the place in the text
    generator: Generator = field(init=False)  # of the noise
    began: float = field(init=False)
    """When the run began, on the clock of `time.monotonic`, less pauses and compilation."""

    @property
    def is_sharded(self) -> bool:
        return self.processes.shards(self.config.train)

    @property
    def num_test_windows(self) -> int:
        """Windows of the test split that a run without a time limit evaluates at its end."""
        context = self.config.model.context
        available = self.corpus.num_tokens("test") // context
        wanted = self.config.train.test_windows or EVALUATED // context
        return min(wanted, available)

    def seconds(self) -> float:
        """Wall-clock seconds since the run began, without pauses and compilation. Collective."""
        return self.processes.from_first(time.monotonic() - self.began)
