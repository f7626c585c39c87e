"""The log of a run: metrics.jsonl, one JSON object per line, and whoever else gets its lines."""

import os
import statistics
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, TextIO

from tarflowlm.config import RunConfig
from tarflowlm.errors import Progress, Record
from tarflowlm.files import json_line
from tarflowlm.runs import METRICS

TRACKERS = "tarflowlm_apps.trackers"
"""The application behind `train.track`, which is started by its name, as commands are."""


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
