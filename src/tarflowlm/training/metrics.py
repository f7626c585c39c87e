"""metrics.jsonl, one object a line, and the reporter through which a front end follows a run."""

import json
from pathlib import Path
from typing import Any

from tarflowlm.files import replacing

METRICS = "metrics.jsonl"


class Reporter:
    """What a run tells the outside. This one is silent; a front end overrides what it shows."""

    def preparing(self, stage: str, done: int, total: int | None) -> None:
        """The corpus is being prepared; as `data.CorpusProgress`."""

    def stage(self, index: int, num_stages: int, num_steps: int, done: int, description: str) -> None:
        """Stage `index` (0-based) begins, `done` of its `num_steps` steps already taken."""

    def step(self, num_tokens: int) -> None:
        """One optimiser step was taken over this many tokens."""

    def record(self, record: dict[str, Any]) -> None:
        """A line was written to metrics.jsonl."""

    def notice(self, text: str) -> None:
        """One line for the reader."""


class MetricsLog:
    """Appends to metrics.jsonl and tells the reporter; every line is flushed as it is written."""

    def __init__(self, directory: Path, reporter: Reporter, *, resume_at: int | None = None) -> None:
        self.path, self.reporter = directory / METRICS, reporter
        if resume_at is not None and self.path.exists():
            self._drop_after(resume_at)
        self._file = self.path.open("a", encoding="utf-8")

    def _drop_after(self, step: int) -> None:
        """Forget lines written after the checkpoint that is resumed, and a last line cut short by a kill."""
        kept = []
        for line in self.path.read_text(encoding="utf-8").splitlines():
            try:
                record = json.loads(line)
            except ValueError:
                continue
            if record["step"] <= step:
                kept.append(line + "\n")
        with replacing(self.path) as temporary:
            temporary.write_text("".join(kept), encoding="utf-8")

    def write(self, record: dict[str, Any]) -> None:
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()
        self.reporter.record(record)

    def close(self) -> None:
        self._file.close()
