"""One optimiser step, and timed steps on a throw-away model."""

import time
from collections.abc import Callable

import torch
from jaxtyping import Int
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from tarflowlm.config import RunConfig
from tarflowlm.language_model import seeded
from tarflowlm.training.distributed import ALONE, Processes
from tarflowlm.training.guards import Guard
from tarflowlm.training.optim import build_optimizers
from tarflowlm.training.parallel import Engine

TIMED_STEPS = 6
"""Steps that `seconds_per_step` takes by default."""


def optimizer_step(
    engine: Engine,
    optimizers: list[torch.optim.Optimizer],
    tokens: Int[Tensor, "B T"],
    *,
    generator: torch.Generator,
    guard: Guard | None = None,
) -> tuple[Tensor, Tensor]:
    """Take one step on a global batch, of which `tokens` are this process's rows. Collective.

    Returns the loss, in nats per token, and the gradient norm of the whole batch, both on the device. If `guard` does
    not allow the step, parameters and optimisers stay as they are. The guard decides by these two numbers, so all
    processes agree. A deferred guard decides on the device, through `found_inf` (as in torch.amp, which fused AdamW
    and our Muon support).
    """
    loss = engine.backward(tokens, generator)
    trained = [p for p in engine.model.parameters() if p.grad is not None]
    gradients = [p.grad for p in trained if p.grad is not None]
    norm = get_total_norm(gradients)
    if isinstance(norm, DTensor):
        norm = norm.full_tensor()
    if guard is None or guard.allows(engine.model, loss, norm):
        clip_grads_with_norm_(trained, engine.run.optim.grad_clip, norm)
        for optimizer in optimizers:
            optimizer.found_inf = None if guard is None else guard.found_inf  # type: ignore[attr-defined]
            optimizer.step()
    for optimizer in optimizers:
        optimizer.zero_grad(set_to_none=True)
    return loss, norm


class TrainingStep:
    """Optimiser steps of stage `stage` (0-based) of a run, on a throw-away model.

    `run.model.vocab_size` must be set.
    """

    def __init__(self, run: RunConfig, stage: int, device: torch.device, processes: Processes = ALONE) -> None:
        with seeded(run.seed):
            model = run.model_of_stage(stage).build()
        if processes.world == 1 or run.train.parallel == "ddp":
            model = model.to(device)
        model.train_only(stage)
        self.engine = Engine(model, run, processes, frozen=stage)
        self.optimizers = build_optimizers(run.optim, model)
        self.generator = torch.Generator(device=device).manual_seed(0)

    def __call__(self, tokens: Tensor) -> Tensor:
        """Take a step on this process's rows `tokens` [B, T]; returns the loss, in nats per token."""
        return optimizer_step(self.engine, self.optimizers, tokens, generator=self.generator)[0]


def seconds_per_step(
    run: RunConfig, stage: int, batches: Callable[[], Tensor], device: torch.device, *, num_steps: int = TIMED_STEPS
) -> float:
    """Median seconds of an optimiser step of `stage`; every step takes its tokens from a call of `batches`.

    `run.model.vocab_size` must be set.
    """
    step = TrainingStep(run, stage, device)
    durations = []
    for _ in range(num_steps):
        start = time.perf_counter()
        step(batches().to(device)).item()
        durations.append(time.perf_counter() - start)
    return sorted(durations)[len(durations) // 2]
