"""How long the optimiser steps of a run take on this machine."""

import time
from collections.abc import Callable

import torch
from torch import Tensor

from tarflowlm.checkpoint import Model, build_model
from tarflowlm.model import FlowConfig, seeded
from tarflowlm.training.config import RunConfig
from tarflowlm.training.optim import build_optimizers
from tarflowlm.training.parallel import Engine
from tarflowlm.training.progressive import freeze_below
from tarflowlm.training.step import optimizer_step

TIMED_STEPS = 6


def seconds_per_step(
    run: RunConfig, stage: int, batches: Callable[[], Tensor], device: torch.device, *, num_steps: int = TIMED_STEPS
) -> float:
    """Median seconds of an optimiser step of `stage` over `batches`, on a throw-away model.

    `run.model.vocab_size` must be set.
    """
    model = _model_of_stage(run, stage).to(device)
    freeze_below(model, stage)
    engine, optimizers = Engine(model, run, frozen=stage), build_optimizers(run.optim, model)
    generator = torch.Generator(device=device)
    durations = []
    for _ in range(num_steps):
        start = time.perf_counter()
        loss, _ = optimizer_step(engine, optimizers, batches().to(device), generator=generator)
        loss.item()
        durations.append(time.perf_counter() - start)
    return sorted(durations)[len(durations) // 2]


def _model_of_stage(run: RunConfig, stage: int) -> Model:
    config = run.model
    if isinstance(config, FlowConfig) and run.num_stages > 1:
        config = config.first_blocks(stage + 1)
    with seeded(run.seed):
        return build_model(config)
