"""What watches over the optimiser steps: steps that must not be taken, and losses that jump."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from tarflowlm.language_model import LanguageModel

NAMED = 8
"""Parameters listed in a record; the rest are counted."""
MEMORY = 100
"""Steps that weigh in the running loss; a jump is judged once half as many are in."""


def all_finite(loss: Tensor, norm: Tensor) -> Tensor:
    """Whether loss and gradient norm are finite, as a bool on the device."""
    return torch.isfinite(loss).all() & torch.isfinite(norm)


POLL = 16
"""Steps between two looks at an accelerator: it would wait for the host, and the host for it, at every look."""


class Guard:
    """Says before every optimiser step whether it may be taken, and keeps what was wrong with one that may not.

    A `deferred` guard never waits for the device. It allows every step and leaves a number in `found_inf`, by which
    the optimisers take the step or leave everything as it was; the number is read when the host next looks.
    """

    def __init__(self, *, deferred: bool = False) -> None:
        self.deferred = deferred
        self.found_inf: Tensor | None = None
        """On the device: 1 where the step must not be taken, otherwise 0. None where the host has decided."""
        self.broken: dict[str, dict[str, Any]] | None = None
        """Of the last step: for every parameter whose gradient is not finite, its `gradient_range`; None if it
        could be taken."""

    def allows(self, model: nn.Module, loss: Tensor, norm: Tensor) -> bool:
        """Call it between the backward pass and everything that changes gradients, parameters or optimisers."""
        if self.deferred:
            self.found_inf = (~all_finite(loss, norm)).float()
            return True
        self.broken = None if all_finite(loss, norm) else broken_gradients(model)
        return self.broken is None


def broken_gradients(model: nn.Module) -> dict[str, dict[str, Any]]:
    """`gradient_range` of every parameter whose gradient is not finite, by name; all processes take part."""
    found = {}
    for name, p in model.named_parameters():
        if p.grad is not None:
            gradient = p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad
            if not torch.isfinite(gradient).all():
                found[name] = gradient_range(gradient)
    return found


def gradient_range(gradient: Tensor) -> dict[str, Any]:
    """How many elements are not finite, of how many, and the range [min, max] of the others (None without any)."""
    finite = gradient[torch.isfinite(gradient)]
    return {
        "not_finite": gradient.numel() - finite.numel(),
        "of": gradient.numel(),
        "range": [finite.min().item(), finite.max().item()] if finite.numel() else None,
    }


@torch.no_grad()
def broken_terms(model: LanguageModel, tokens: Tensor, generator: torch.Generator) -> list[str]:
    """The terms of the loss that are not finite on a batch; `generator` as it was before the step."""
    # a sharded model was put together on the CPU for this
    tokens = tokens.to(model.device)
    terms = model.terms(tokens, model.draw_noise(tokens, generator))
    return [name for name, value in terms.items() if not torch.isfinite(value).all()]


def broken_parameters(model: nn.Module) -> list[str]:
    return [name for name, p in model.named_parameters() if not torch.isfinite(p).all()]


def skipped_record(
    model: LanguageModel,
    tokens: Tensor,
    generator: torch.Generator,
    gradients: dict[str, dict[str, Any]],
    loss: Tensor,
) -> dict[str, Any]:
    """What metrics.jsonl holds about a step that was not taken, besides its place."""
    value = loss.item()
    return {
        "nats_per_token": value if math.isfinite(value) else None,
        "terms": broken_terms(model, tokens, generator),
        "parameters": broken_parameters(model)[:NAMED],
        "gradients": dict(list(gradients.items())[:NAMED]),
        "num_gradients": len(gradients),
    }


def in_words(record: dict[str, Any]) -> str:
    """The record of a skipped step in one line: terms, parameters, gradients with their ranges."""
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
    """Mean and variance of the loss, exponentially weighted; it is saved with a run."""

    mean: float = 0.0
    variance: float = 0.0
    count: int = 0

    def take_in(self, loss: float) -> float:
        """By how many standard deviations `loss` lies above the mean of those before it; 0 while they are few."""
        deviation = loss - self.mean
        sigmas = 0.0
        if self.count >= MEMORY // 2 and self.variance > 0:
            sigmas = deviation / math.sqrt(self.variance)
        # a plain average until there is enough for a weighted one
        weight = max(1 / (self.count + 1), 1 / MEMORY)
        self.mean += weight * deviation
        self.variance = (1 - weight) * (self.variance + weight * deviation**2)
        self.count += 1
        return sigmas
