"""The losses and gradient norms of steps, which a device holds until the host reads them."""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from tarflowlm.training.optim import norms, trained_parameters
from tarflowlm.training.pace import STEPS_BETWEEN_READS
from tarflowlm.training.run import Run

NAMED = 8
"""The most parameters that a message names."""


class PendingStep(NamedTuple):
    """A step whose numbers are still on the device."""

    step: int
    numbers: Tensor  # loss in nats per token and norm of the whole gradient, [2]
    names: list[str]  # of the parameters with a gradient
    norms: Tensor  # of their gradients


class Losses:
    """The numbers of the steps of a stage, on their way to the log.

    Waiting for them would stall a GPU, so there they are read every 16 steps, and before anything
    is logged or saved. Weights may be bad by then, but are not saved.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self.every = STEPS_BETWEEN_READS.get(run.device.type, 1)
        self.pending = list[PendingStep]()

    def add(self, loss: Tensor, trained: dict[str, nn.Parameter]) -> Tensor:
        """Add a step before its weights change; returns the norm of the whole gradient.

        `trained` are the parameters with a gradient. Raises as `read` does. Collective.
        """
        each = norms({name: p.grad for name, p in trained.items() if p.grad is not None})
        norm = torch.linalg.vector_norm(each)
        step = self.run.counters.step + 1
        self.pending.append(PendingStep(step, torch.stack((loss, norm)), [*trained], each))
        if len(self.pending) >= self.every:
            self.read()
        return norm

    def read(self) -> None:
        """Add the numbers of all pending steps to the log; one transfer from the device.

        FloatingPointError for the first step that is not finite. It names the gradients that are
        not, and such parameters, if they have not changed since. Collective.
        """
        rows = torch.stack([each.numbers for each in self.pending]).tolist() if self.pending else []
        for each, (loss, norm) in zip(self.pending, rows, strict=True):
            if not math.isfinite(loss + norm):
                raise FloatingPointError(self._what_is_wrong(each, loss))
            self.run.log.window.losses.append(loss)
            self.run.log.window.norms.append(norm)
        self.pending.clear()

    def _what_is_wrong(self, at: PendingStep, loss: float) -> str:
        num_taken = self.run.counters.step
        culprits = {"gradients": dict(zip(at.names, at.norms.tolist(), strict=True))}
        if at.step > num_taken:
            weights = trained_parameters(self.run.model)
            culprits["parameters"] = dict(zip(weights, norms(weights).tolist(), strict=True))
        found = [f"the loss is {loss:.4g}"]
        for kind, sizes in culprits.items():
            if broken := [name for name, size in sizes.items() if not math.isfinite(size)]:
                found.append(f"{len(broken)} {kind} are not finite: {', '.join(broken[:NAMED])}")
        remedy = "lower optim.lr or optim.grad_clip in a new run; earlier checkpoints are kept"
        if num_taken == 0:
            remedy = "lower optim.lr, or check the values of model, which has learnt nothing yet"
        return f"the run ended at step {at.step}: {'; '.join(found)}; {remedy}"
