"""metrics.jsonl, one JSON object per line, and the reporter through which a front end follows a run."""

import json
import os
from pathlib import Path
from typing import Any

from tarflowlm.progress import Silent
from tarflowlm.training.trackers import Trackers

METRICS = "metrics.jsonl"
"""File name of the log, inside a run directory."""


class Reporter(Silent):
    """The progress of a run, silent; a front end overrides what it shows.

    The parts are the preparation of the corpus, every stage (in steps, or in thousandths of its time) and the test
    split (in windows).
    """

    def record(self, record: dict[str, Any]) -> None:
        """A line was written to metrics.jsonl."""


class MetricsLog:
    """Appends records to metrics.jsonl, and passes them to the reporter and the trackers. Every line is flushed.

    Without `directory`, in the processes that do not write, records go to the reporter only.
    """

    def __init__(
        self, directory: Path | None, reporter: Reporter, *, resume_at: int = 0, trackers: Trackers | None = None
    ) -> None:
        """`resume_at`: the `position` saved in the checkpoint that is resumed; later lines are dropped."""
        self._file, self._reporter, self._trackers = None, reporter, trackers
        if directory is None:
            return
        path = directory / METRICS
        if path.exists():
            # a power failure may also have lost a part of the earlier lines
            kept = path.read_bytes()[:resume_at]
            os.truncate(path, kept.rfind(b"\n") + 1)
        self._file = path.open("a", encoding="utf-8")

    def write(self, record: dict[str, Any]) -> None:
        """Append one record as a line."""
        if self._file is not None:
            self._file.write(json.dumps(record) + "\n")
            self._file.flush()
        self._reporter.record(record)
        if self._trackers is not None:
            self._trackers.record(record)

    def position(self) -> int:
        """Bytes written so far; returns once they are on disk."""
        if self._file is None:
            return 0
        os.fsync(self._file.fileno())
        return os.fstat(self._file.fileno()).st_size

    def close(self) -> None:
        """Close the file and the trackers."""
        if self._file is not None:
            self._file.close()
        if self._trackers is not None:
            self._trackers.close()
