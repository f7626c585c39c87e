"""Progress of a training run on stderr."""

import time
from typing import Any

from rich.console import Console

from tarflowlm.terminal.bars import Bars, Clock
from tarflowlm.training.metrics import Reporter


class ProgressReporter(Bars, Reporter):
    """Every part of a run with its share done, bits per character, tokens per second and the time left."""

    def __init__(self, *, console: Console | None = None, clock: Clock = time.monotonic) -> None:
        super().__init__(console=console, clock=clock, keep=True)
        self._shown: dict[str, str] = {}

    def __enter__(self) -> "ProgressReporter":
        return self

    def stage(self, name: str, total: int | None = None, done: int = 0) -> None:
        """Begin a part of the run; the numbers of the part before are not its own."""
        self._shown = {}
        super().stage(name, total, done)

    def record(self, record: dict[str, Any]) -> None:
        """Show the numbers of a line of metrics.jsonl."""
        if record["split"] == "train":
            self._shown["train"] = f"train {record['bpc']:.3f} bpc"
            if self.is_wide:
                self._shown["speed"] = f"{record['tokens_per_second']:,.0f} tokens/s"
        elif record["split"] == "valid":
            self._shown["valid"] = f"valid {record['bpc']:.3f}"
        self.update(count=f"step {record['step']:,}", details=", ".join(self._shown.values()))
