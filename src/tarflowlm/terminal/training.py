"""Progress of a training run on stderr."""

import time
from typing import Any

from rich.console import Console

from tarflowlm.terminal.bars import Bars, Clock
from tarflowlm.terminal.tables import print_notice
from tarflowlm.training.metrics import Reporter

CORPUS_STAGES = {
    "fetch": "fetching the corpus, bytes",
    "count": "reading the corpus, characters",
    "bpe": "text for the tokenizer of the corpus, characters",
    "encode": "encoding the corpus, characters",
}


class ProgressReporter(Reporter):
    """Every stage with its share done, bits per character, tokens per second and the time left. Use as a context."""

    def __init__(self, *, console: Console | None = None, clock: Clock = time.monotonic) -> None:
        self.bars, self.others = Bars(console=console, clock=clock, keep=True), Bars(console=console, clock=clock)
        self.steps, self.has_steps = 0, True
        self.train = self.valid = self.speed = ""

    def __enter__(self) -> "ProgressReporter":
        return self

    def __exit__(self, *error: object) -> None:
        self.others.close()
        self.bars.close()

    def preparing(self, stage: str, done: int, total: int | None) -> None:
        self.others.show(CORPUS_STAGES[stage], done, total)

    def stage(self, index: int, num_stages: int, num_steps: int, done: int, description: str) -> None:
        self.others.close()
        self.steps, self.has_steps = done, num_steps > 0
        self.train = self.valid = self.speed = ""
        label = f"stage {index + 1}/{num_stages} {description}" if num_stages > 1 else description
        self.bars.stage(f"{label}, steps", num_steps or None, done)

    def step(self, num_tokens: int, share: float | None = None) -> None:
        self.steps += 1
        if self.has_steps:
            self.bars.advance()
        else:
            # limited by time
            self.bars.update(count=f"{self.steps:,}", completed=share or 0.0, total=1.0)

    def record(self, record: dict[str, Any]) -> None:
        if record["split"] == "train":
            self.train = f"train {record['bpc']:.3f} bpc"
            self.speed = f"{record['tokens_per_second']:,.0f} tokens/s" if self.bars.is_wide else ""
        elif record["split"] == "valid":
            self.valid = f"valid {record['bpc']:.3f}"
        self.bars.update(details=", ".join(filter(None, [self.train, self.valid, self.speed])))

    def testing(self, done: int, total: int) -> None:
        self.bars.close()
        self.others.show("evaluating the test split", done, total)

    def notice(self, text: str) -> None:
        print_notice(text)
