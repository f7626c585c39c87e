"""metrics.jsonl, one JSON object per line, and the reporter through which a front end follows a run."""

import json
import os
from pathlib import Path
from typing import Any

from tarflowlm.training.tracking import Sinks

METRICS = "metrics.jsonl"
"""File name of the log, inside a run directory."""


class Reporter:
    """Receives the progress of a run. This one is silent; a front end overrides the methods it needs."""

    def preparing(self, stage: str, done: int, total: int | None) -> None:
        """The corpus is being prepared; arguments are a stage, how much of it is done, and its total."""

    def stage(self, index: int, num_stages: int, num_steps: int, done: int, description: str) -> None:
        """Stage `index` (0-based) begins, with `done` of its `num_steps` steps taken (0 for a stage with a time)."""

    def step(self, num_tokens: int, share: float | None = None) -> None:
        """An optimiser step over `num_tokens` tokens was taken; `share` of the stage's time, if limited, is over."""

    def testing(self, done: int, total: int) -> None:
        """After all stages: `done` of `total` windows of the test split are evaluated."""

    def record(self, record: dict[str, Any]) -> None:
        """A line was written to metrics.jsonl."""

    def notice(self, text: str) -> None:
        """A one-line message for the user."""


class MetricsLog:
    """Appends records to metrics.jsonl, and passes them to the reporter and the trackers. Every line is flushed."""

    def __init__(
        self, directory: Path, reporter: Reporter, *, resume_at: int | None = None, sinks: Sinks | None = None
    ) -> None:
        """`resume_at`: the `position` saved in the checkpoint that is resumed; later lines are dropped."""
        self.path, self.reporter, self.sinks = directory / METRICS, reporter, sinks
        if resume_at is not None and self.path.exists():
            # a power failure may also have lost a part of the earlier lines
            kept = self.path.read_bytes()[:resume_at]
            os.truncate(self.path, kept.rfind(b"\n") + 1)
        self._file = self.path.open("a", encoding="utf-8")

    def write(self, record: dict[str, Any]) -> None:
        """Append one record as a line."""
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()
        self.reporter.record(record)
        if self.sinks is not None:
            self.sinks.record(record)

    def position(self) -> int:
        """Bytes written so far; returns once they are on disk."""
        os.fsync(self._file.fileno())
        return os.fstat(self._file.fileno()).st_size

    def close(self) -> None:
        """Close the file and the trackers."""
        self._file.close()
        if self.sinks is not None:
            self.sinks.close()


class NoLog(MetricsLog):
    """The log of a process that does not write: it only tells the reporter."""

    def __init__(self, reporter: Reporter) -> None:
        self.reporter = reporter

    def write(self, record: dict[str, Any]) -> None:
        """Pass the record to the reporter."""
        self.reporter.record(record)

    def position(self) -> int:
        """0: there is no file."""
        return 0

    def close(self) -> None:
        """Nothing to close."""
