"""Optimiser steps of a run on a throw-away model, and how long they take on this machine."""

import time
from collections.abc import Callable

import torch
from torch import Tensor

from tarflowlm.checkpoint import build_model
from tarflowlm.model import seeded
from tarflowlm.training.config import RunConfig
from tarflowlm.training.distributed import ALONE, Processes
from tarflowlm.training.optim import build_optimizers
from tarflowlm.training.parallel import Engine
from tarflowlm.training.progressive import freeze_below
from tarflowlm.training.step import optimizer_step

TIMED_STEPS = 6


def training_step(
    run: RunConfig, stage: int, device: torch.device, processes: Processes = ALONE
) -> Callable[[Tensor], Tensor]:
    """A function that takes an optimiser step of `stage` over this process's tokens and returns the loss.

    `run.model.vocab_size` must be set.
    """
    with seeded(run.seed):
        model = build_model(run.model_of_stage(stage))
    if processes.world == 1 or run.train.parallel == "ddp":
        model = model.to(device)
    freeze_below(model, stage)
    engine, optimizers = Engine(model, run, processes, frozen=stage), build_optimizers(run.optim, model)
    generator = torch.Generator(device=device).manual_seed(0)
    return lambda tokens: optimizer_step(engine, optimizers, tokens, generator=generator)[0]


def seconds_per_step(
    run: RunConfig, stage: int, batches: Callable[[], Tensor], device: torch.device, *, num_steps: int = TIMED_STEPS
) -> float:
    """Median seconds of an optimiser step of `stage` over `batches`. `run.model.vocab_size` must be set."""
    step = training_step(run, stage, device)
    durations = []
    for _ in range(num_steps):
        start = time.perf_counter()
        step(batches().to(device)).item()
        durations.append(time.perf_counter() - start)
    return sorted(durations)[len(durations) // 2]
