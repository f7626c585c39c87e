"""metrics.jsonl, one object a line, and the reporter through which a front end follows a run."""

import json
import os
from pathlib import Path
from typing import Any

from tarflowlm.training.tracking import Sinks

METRICS = "metrics.jsonl"


class Reporter:
    """What a run tells the outside. This one is silent; a front end overrides what it shows."""

    def preparing(self, stage: str, done: int, total: int | None) -> None:
        """The corpus is being prepared; as `data.CorpusProgress`."""

    def stage(self, index: int, num_stages: int, num_steps: int, done: int, description: str) -> None:
        """Stage `index` (0-based) begins, `done` of its `num_steps` steps (0: it has time instead) already taken."""

    def step(self, num_tokens: int, share: float | None = None) -> None:
        """One optimiser step was taken over this many tokens; `share`: of the stage's time, where it has time."""

    def testing(self, done: int, total: int) -> None:
        """So many windows of the test split are evaluated, after all stages."""

    def record(self, record: dict[str, Any]) -> None:
        """A line was written to metrics.jsonl."""

    def notice(self, text: str) -> None:
        """One line for the reader."""


class MetricsLog:
    """Appends to metrics.jsonl, tells the reporter and feeds the sinks; every line is flushed as it is written."""

    def __init__(
        self, directory: Path, reporter: Reporter, *, resume_at: int | None = None, sinks: Sinks | None = None
    ) -> None:
        """`resume_at`: the `position` at the checkpoint that is resumed; what was written after it is dropped."""
        self.path, self.reporter, self.sinks = directory / METRICS, reporter, sinks
        if resume_at is not None and self.path.exists():
            # a machine that lost power may have lost a part of what came before, too
            kept = self.path.read_bytes()[:resume_at]
            os.truncate(self.path, kept.rfind(b"\n") + 1)
        self._file = self.path.open("a", encoding="utf-8")

    def write(self, record: dict[str, Any]) -> None:
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()
        self.reporter.record(record)
        if self.sinks is not None:
            self.sinks.record(record)

    def position(self) -> int:
        """Bytes written so far, and now safe on disk."""
        os.fsync(self._file.fileno())
        return os.fstat(self._file.fileno()).st_size

    def close(self) -> None:
        self._file.close()
        if self.sinks is not None:
            self.sinks.close()


class NoLog(MetricsLog):
    """For the processes that do not write."""

    def __init__(self, reporter: Reporter) -> None:
        self.reporter = reporter

    def write(self, record: dict[str, Any]) -> None:
        self.reporter.record(record)

    def position(self) -> int:
        return 0

    def close(self) -> None:
        pass
