"""Progress of a training run on stderr."""

import time
from typing import Any

from rich.console import Console

from tarflowlm.terminal.bars import Bars, Clock
from tarflowlm.training.metrics import Reporter


class ProgressReporter(Reporter):
    """Every part of a run with its share done, bits per character, tokens per second and the time left."""

    def __init__(self, *, console: Console | None = None, clock: Clock = time.monotonic) -> None:
        self.bars = Bars(console=console, clock=clock, keep=True)
        self.train = self.valid = self.speed = ""

    def __enter__(self) -> "ProgressReporter":
        return self

    def __exit__(self, *error: object) -> None:
        self.bars.close()

    def stage(self, name: str, total: int | None = None, done: int = 0) -> None:
        self.train = self.valid = self.speed = ""
        self.bars.stage(name, total, done)

    def advance(self, count: int = 1) -> None:
        self.bars.advance(count)

    def record(self, record: dict[str, Any]) -> None:
        if record["split"] == "train":
            self.train = f"train {record['bpc']:.3f} bpc"
            self.speed = f"{record['tokens_per_second']:,.0f} tokens/s" if self.bars.is_wide else ""
        elif record["split"] == "valid":
            self.valid = f"valid {record['bpc']:.3f}"
        self.bars.update(details=", ".join(filter(None, [self.train, self.valid, self.speed])))
