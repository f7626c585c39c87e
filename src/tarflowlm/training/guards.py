"""Guards of the optimiser steps: skipping non-finite steps, and detecting spikes of the loss."""

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


def all_finite(loss: Tensor, norm: Tensor) -> Tensor:
    """Whether loss and gradient norm are finite: a bool scalar on the device."""
    return torch.isfinite(loss).all() & torch.isfinite(norm)


POLL = 16
"""Steps between reads of an accelerator's results; every read synchronises host and device."""


class Guard:
    """Decides before every optimiser step whether it is taken, and keeps a record of a step that is not.

    A `deferred` guard never waits for the device. It allows every step and sets `found_inf`, by which the optimisers
    take the step or change nothing. The host reads it later.
    """

    def __init__(self, *, deferred: bool = False) -> None:
        self.deferred = deferred
        self.found_inf: Tensor | None = None
        """Scalar on the device: 1 if the step must be skipped, else 0. None if the guard is not deferred."""
        self.broken: dict[str, dict[str, Any]] | None = None
        """Of the last step: the `gradient_range` of every parameter with a non-finite gradient; None if the step was
        allowed."""

    def allows(self, model: nn.Module, loss: Tensor, norm: Tensor) -> bool:
        """Whether the step may be taken. Call it after the backward pass, before gradients are clipped or used."""
        if self.deferred:
            self.found_inf = (~all_finite(loss, norm)).float()
            return True
        self.broken = None if all_finite(loss, norm) else broken_gradients(model)
        return self.broken is None


def broken_gradients(model: nn.Module) -> dict[str, dict[str, Any]]:
    """The `gradient_range` of every parameter with a non-finite gradient, by name. Collective under FSDP2."""
    found = {}
    for name, p in model.named_parameters():
        if p.grad is not None:
            gradient = p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad
            if not torch.isfinite(gradient).all():
                found[name] = gradient_range(gradient)
    return found


def gradient_range(gradient: Tensor) -> dict[str, Any]:
    """The numbers of non-finite elements and of all, and the range [min, max] of the finite ones (None if none)."""
    finite = gradient[torch.isfinite(gradient)]
    return {
        "not_finite": gradient.numel() - finite.numel(),
        "of": gradient.numel(),
        "range": [finite.min().item(), finite.max().item()] if finite.numel() else None,
    }


@torch.no_grad()
def broken_terms(model: LanguageModel, tokens: Tensor, generator: torch.Generator) -> list[str]:
    """Names of the terms of the loss that are not finite on `tokens` [B, T].

    `generator` must be in its state before the step, to draw the same noise.
    """
    # `Engine.whole` puts the copy of a sharded model on the CPU
    tokens = tokens.to(model.device)
    noise = model.draw_noise(tokens, generator)
    if isinstance(model, TarFlowLM):
        terms = model.elbo(tokens, noise)[0].by_name()
    else:
        terms = {"log_prob": model.bound(tokens, noise)}
    return [name for name, value in terms.items() if not torch.isfinite(value).all()]


def broken_parameters(model: nn.Module) -> list[str]:
    """Names of the parameters that are not finite."""
    return [name for name, p in model.named_parameters() if not torch.isfinite(p).all()]


def skipped_record(
    model: LanguageModel,
    tokens: Tensor,
    generator: torch.Generator,
    gradients: dict[str, dict[str, Any]],
    loss: Tensor,
) -> dict[str, Any]:
    """The record of a skipped step in metrics.jsonl, without its place (step, tokens, block).

    `tokens`, `generator`: see `broken_terms`; `gradients`: see `broken_gradients`; `loss` in nats per token.
    """
    value = loss.item()
    return {
        "nats_per_token": value if math.isfinite(value) else None,
        "terms": broken_terms(model, tokens, generator),
        "parameters": broken_parameters(model)[:NAMED],
        "gradients": dict(list(gradients.items())[:NAMED]),
        "num_gradients": len(gradients),
    }


def in_words(record: dict[str, Any]) -> str:
    """The record of a skipped step as one line: terms, parameters, and gradients with their ranges."""
    gradients = []
    for name, g in list(record["gradients"].items())[:2]:
        rest = "" if g["range"] is None else ", the others in [{:.3g}, {:.3g}]".format(*g["range"])
        gradients.append(f"{name} ({g['not_finite']} of {g['of']}{rest})")
    if record["num_gradients"] > len(gradients):
        gradients.append(f"{record['num_gradients'] - len(gradients)} more")
    return (
        f"the loss or gradient is not finite at step {record['step']}: "
        f"terms {', '.join(record['terms']) or 'all finite'}; "
        f"parameters {', '.join(record['parameters']) or 'all finite'}; "
        f"gradients {', '.join(gradients) or 'all finite'}"
    )


@dataclass
class RunningLoss:
    """Exponentially weighted mean and variance of the loss, in nats per token; saved with the run."""

    mean: float = 0.0
    variance: float = 0.0
    count: int = 0

    def take_in(self, loss: float) -> float:
        """Add `loss`; returns how many standard deviations it lies above the earlier mean, or 0 for the first 50."""
        deviation = loss - self.mean
        sigmas = 0.0
        if self.count >= MEMORY // 2 and self.variance > 0:
            sigmas = deviation / math.sqrt(self.variance)
        # a plain average for the first MEMORY losses
        weight = max(1 / (self.count + 1), 1 / MEMORY)
        self.mean += weight * deviation
        self.variance = (1 - weight) * (self.variance + weight * deviation**2)
        self.count += 1
        return sigmas
