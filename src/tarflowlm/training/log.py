"""The log of a run: metrics.jsonl, one JSON object per line, and whoever else gets its lines."""

import math
import os
import statistics
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import torch
from torch import Tensor, nn

from tarflowlm.config import RunConfig
from tarflowlm.errors import Progress, Record
from tarflowlm.files import json_line
from tarflowlm.runs import METRICS
from tarflowlm.training.optim import norms, trained_parameters

NAMED = 8
"""The most parameters that a message names."""
TRACKERS = "tarflowlm_apps.trackers"
"""The application behind `train.track`, which is started by its name, as commands are."""


class PendingStep(NamedTuple):
    """A step whose numbers are still on the device."""

    step: int
    numbers: Tensor  # loss in nats per token and norm of the whole gradient, [2]
    names: list[str]  # of the parameters with a gradient
    norms: Tensor  # of their gradients


def read_losses(
    pending: list[PendingStep], model: nn.Module, step: int
) -> list[tuple[float, float]]:
    """Losses and gradient norms of the steps, which leave the list; one transfer from the device.

    FloatingPointError for the first one that is not finite. It names the gradients that are not,
    and such parameters, if they have not changed since: `step` is the newest step that has changed
    the weights of `model`. Collective.
    """
    rows = torch.stack([each.numbers for each in pending]).tolist() if pending else []
    for each, (loss, norm) in zip(pending, rows, strict=True):
        if math.isfinite(loss + norm):
            continue
        culprits = {"gradients": dict(zip(each.names, each.norms.tolist(), strict=True))}
        if each.step > step:
            weights = trained_parameters(model)
            culprits["parameters"] = dict(zip(weights, norms(weights).tolist(), strict=True))
        found = [f"the loss is {loss:.4g}"]
        for kind, sizes in culprits.items():
            if broken := [name for name, size in sizes.items() if not math.isfinite(size)]:
                found.append(f"{len(broken)} {kind} are not finite: {', '.join(broken[:NAMED])}")
        remedy = "lower optim.lr or optim.grad_clip in a new run; earlier checkpoints are kept"
        if step == 0:
            remedy = "lower optim.lr, or check the values of model, which has learnt nothing yet"
        raise FloatingPointError(f"the run ended at step {each.step}: {'; '.join(found)}; {remedy}")
    pending.clear()
    return [(loss, norm) for loss, norm in rows]


@dataclass
class Window:
    """The steps since the last line of the log."""

    losses: list[float] = field(default_factory=list)  # nats per token
    norms: list[float] = field(default_factory=list)  # of the gradient
    tokens: int = 0
    seconds: float = 0.0
    waited: float = 0.0  # seconds of these spent waiting for the next batch


@dataclass(eq=False)
class MetricsLog:
    """Appends records to metrics.jsonl, flushed, and passes them to the reporter and the trackers.

    Until it is opened, records go to the reporter alone.
    """

    reporter: Progress
    window: Window = field(default_factory=Window)
    _trackers: Any = field(default=None, init=False)
    _file: TextIO | None = field(default=None, init=False)

    def open(self, directory: Path, *, resume_at: int = 0, window: Window | None = None) -> None:
        """Continue the file in `directory` at a saved `position`, with the `window` that was open
        then; later lines are dropped.
        """
        self.window = window or Window()
        path = directory / METRICS
        if path.exists():
            # a power failure may also have lost a part of the earlier lines
            kept = path.read_bytes()[:resume_at]
            os.truncate(path, kept.rfind(b"\n") + 1)
        self._file = path.open("a", encoding="utf-8")

    def track(self, config: RunConfig, out: Path, *, resume_at: int) -> None:
        """Open the trackers that `config` asks for. `resume_at` is the step of the checkpoint."""
        if config.train.track:
            self._trackers = import_module(TRACKERS).Trackers(config, out, resume_at)

    def position(self) -> int:
        """Bytes written so far; returns once they are on disk."""
        if self._file is None:
            return 0
        os.fsync(self._file.fileno())
        return os.fstat(self._file.fileno()).st_size

    def step(
        self, read: list[tuple[float, float]], *, tokens: int, seconds: float, waited: float
    ) -> None:
        """Count a step. `read` are the losses and gradient norms that were read in it."""
        window = self.window
        window.losses += [loss for loss, _ in read]
        window.norms += [norm for _, norm in read]
        window.tokens += tokens
        window.seconds += seconds
        window.waited += waited

    def means(self) -> dict[str, float]:
        """The means over the window; the next step begins a new one."""
        window, self.window = self.window, Window()
        duration = max(window.seconds, 1e-9)
        return {
            "nats_per_token": statistics.fmean(window.losses),
            "grad_norm": statistics.fmean(window.norms),
            "tokens_per_second": window.tokens / duration,
            "data_share": window.waited / duration,
        }

    def write(self, record: Record) -> None:
        """Add a line, with at least a `split` and a `step`."""
        if self._file is not None:
            self._file.write(json_line(record))
            self._file.flush()
        self.reporter.record(record)
        if self._trackers is not None:
            self._trackers.record(record)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        if self._trackers is not None:
            self._trackers.close()
