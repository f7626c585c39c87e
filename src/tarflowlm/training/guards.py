"""Guards of the optimiser steps: what is not finite in a step that was skipped, and spikes of the loss."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from tarflowlm.language_model import LanguageModel
from tarflowlm.model import TarFlowLM

NAMED = 8
"""Parameters listed by name in a record or message."""
MEMORY = 100
"""Steps that the running loss averages over; spikes are detected once it has seen half as many."""


def broken_gradients(model: nn.Module) -> dict[str, dict[str, Any]]:
    """The parameters with a non-finite gradient, by name. Collective under FSDP2.

    The values count the non-finite elements and all, and give the range [min, max] of the finite ones.
    """
    found = {}
    for name, p in model.named_parameters():
        if p.grad is None:
            continue
        gradient = p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad
        finite, total = gradient[torch.isfinite(gradient)], gradient.numel()
        if finite.numel() < total:
            span = [finite.min().item(), finite.max().item()] if finite.numel() else None
            found[name] = {"not_finite": total - finite.numel(), "of": total, "range": span}
    return found


@torch.no_grad()
def skipped_record(
    model: LanguageModel, tokens: Tensor, generator: torch.Generator, gradients: dict[str, Any], loss: float
) -> dict[str, Any]:
    """The record of a skipped step in metrics.jsonl, without its place (step, tokens, block).

    It names the terms of the loss on `tokens` [B, T] and the parameters that are not finite. `generator` must be in
    its state before the step, to draw the same noise; `gradients`: see `broken_gradients`; `loss` in nats per token.
    """
    tokens = tokens.to(model.device)  # the copy of a sharded model is on the CPU
    noise = model.draw_noise(tokens, generator)
    if isinstance(model, TarFlowLM):
        terms = model.elbo(tokens, noise)[0].by_name()
    else:
        terms = {"log_prob": model.bound(tokens, noise)}
    broken = [name for name, p in model.named_parameters() if not torch.isfinite(p).all()]
    return {
        "nats_per_token": loss if math.isfinite(loss) else None,
        "terms": [name for name, value in terms.items() if not torch.isfinite(value).all()],
        "parameters": broken[:NAMED],
        "gradients": dict(list(gradients.items())[:NAMED]),
        "num_gradients": len(gradients),
    }


def in_words(record: dict[str, Any]) -> str:
    """The record of a skipped step as one line: terms, parameters, and gradients with their ranges."""
    gradients = []
    for name, g in list(record["gradients"].items())[:2]:
        others = ", the others in [{:.3g}, {:.3g}]".format(*g["range"]) if g["range"] else ""
        gradients.append(f"{name} ({g['not_finite']} of {g['of']}{others})")
    if record["num_gradients"] > len(gradients):
        gradients.append(f"{record['num_gradients'] - len(gradients)} more")
    parts = {"terms": record["terms"], "parameters": record["parameters"], "gradients": gradients}
    found = "; ".join(f"{part} {', '.join(names) or 'all finite'}" for part, names in parts.items())
    return f"the loss or gradient is not finite at step {record['step']}: {found}"


@dataclass
class RunningLoss:
    """Exponentially weighted mean and variance of the loss, in nats per token; saved with the run."""

    mean: float = 0.0
    variance: float = 0.0
    count: int = 0

    def update(self, loss: float) -> float:
        """Add `loss`; returns how many standard deviations it lies above the earlier mean, or 0 for the first 50."""
        deviation, sigmas = loss - self.mean, 0.0
        if self.count >= MEMORY // 2 and self.variance > 0:
            sigmas = deviation / math.sqrt(self.variance)
        # a plain average for the first MEMORY losses
        weight = max(1 / (self.count + 1), 1 / MEMORY)
        self.mean += weight * deviation
        self.variance = (1 - weight) * (self.variance + weight * deviation**2)
        self.count += 1
        return sigmas
