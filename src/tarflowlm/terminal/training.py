"""Progress of a training run on stderr."""

import time
from typing import Any

from rich.console import Console

from tarflowlm.terminal.progress import Bars, Clock
from tarflowlm.training.metrics import Reporter


class ProgressReporter(Reporter):
    """Every part of a run with what is done and the time left. Use as a context."""

    def __init__(self, console: Console, *, clock: Clock = time.monotonic) -> None:
        self.bars, self.part, self.done = Bars(console, clock=clock), ("", 0), 0

    def __enter__(self) -> "ProgressReporter":
        return self

    def __exit__(self, *error: object) -> None:
        self.bars.close()

    def stage(self, name: str, total: int | None = None, done: int = 0) -> None:
        self.part, self.done = (name, total or 0), done

    def advance(self, count: int = 1) -> None:
        self.done += count
        self.bars.show(self.part[0], self.done, self.part[1] or None)

    def record(self, record: dict[str, Any]) -> None:
        """Not shown."""
