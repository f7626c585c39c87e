"""Optimiser steps of a run on a throw-away model, and how long they take on this machine."""

import time
from collections.abc import Callable

import torch
from torch import Tensor

from tarflowlm.model import seeded
from tarflowlm.runs.checkpoint import build_model
from tarflowlm.runs.config import RunConfig
from tarflowlm.training.distributed import ALONE, Processes
from tarflowlm.training.optim import build_optimizers
from tarflowlm.training.parallel import Engine
from tarflowlm.training.run import freeze_below
from tarflowlm.training.step import optimizer_step

TIMED_STEPS = 6


class TrainingStep:
    """Optimiser steps of `stage` of a run on a throw-away model, over this process's tokens.

    `run.model.vocab_size` must be set.
    """

    def __init__(self, run: RunConfig, stage: int, device: torch.device, processes: Processes = ALONE) -> None:
        with seeded(run.seed):
            model = build_model(run.model_of_stage(stage))
        if processes.world == 1 or run.train.parallel == "ddp":
            model = model.to(device)
        freeze_below(model, stage)
        self.engine = Engine(model, run, processes, frozen=stage)
        self.optimizers = build_optimizers(run.optim, model)
        self.generator = torch.Generator(device=device).manual_seed(0)

    def __call__(self, tokens: Tensor) -> Tensor:
        """Takes a step and returns the loss."""
        return optimizer_step(self.engine, self.optimizers, tokens, generator=self.generator)[0]


def seconds_per_step(
    run: RunConfig, stage: int, batches: Callable[[], Tensor], device: torch.device, *, num_steps: int = TIMED_STEPS
) -> float:
    """Median seconds of an optimiser step of `stage` over `batches`. `run.model.vocab_size` must be set."""
    step = TrainingStep(run, stage, device)
    durations = []
    for _ in range(num_steps):
        start = time.perf_counter()
        step(batches().to(device)).item()
        durations.append(time.perf_counter() - start)
    return sorted(durations)[len(durations) // 2]
