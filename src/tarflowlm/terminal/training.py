"""Progress of a training run on stderr."""

import time
from contextlib import ExitStack
from typing import Any

from rich.console import Console

from tarflowlm.terminal.bars import CorpusProgress, corpus_bar
from tarflowlm.terminal.progress import Bars, Clock, FittingProgress, PlainLines, is_live
from tarflowlm.terminal.tables import print_notice
from tarflowlm.training.metrics import Reporter


class ProgressReporter(Reporter):
    """Every stage with its share done, bits per character, tokens per second and the time left. Use as a context."""

    patience = 10.0
    """Seconds that the first plain line of a stage waits for a loss."""

    def __init__(self, console: Console, *, clock: Clock = time.monotonic) -> None:
        self.console, self.clock = console, clock
        self.progress = FittingProgress(console)
        self.lines = None if is_live(console) else PlainLines(console, clock=clock)
        self._task: Any = None
        self._bars: Bars | None = None
        self._preparing = ExitStack()
        self._corpus: CorpusProgress | None = None
        self._share: float | None = None
        self._rate: float | None = None
        self._begin(0, 0)

    def _begin(self, num_steps: int, done: int) -> None:
        self._steps, self._num_steps = done, num_steps
        self._share = done / num_steps if num_steps else None
        self._bpc, self._valid, self._rate = "", "", None
        self._start, self._tokens = self.clock(), 0

    def __enter__(self) -> "ProgressReporter":
        return self

    def __exit__(self, *error: object) -> None:
        self._preparing.close()
        self._stop()

    def preparing(self, stage: str, done: int, total: int | None) -> None:
        if self._corpus is None:
            self._stop()
            self._corpus = self._preparing.enter_context(corpus_bar(self.console, "the corpus", clock=self.clock))
        self._corpus(stage, done, total)

    def stage(self, index: int, num_stages: int, num_steps: int, done: int, description: str) -> None:
        self._preparing.close()
        self._corpus = None
        self._begin(num_steps, done)
        number = f"{index + 1}/{num_stages}"
        if self.lines is not None:
            label = f"stage {number} {description}" if num_stages > 1 else description
            self.lines.begin(label, self._share or 0.0)
            return
        if self._task is None:
            # not before, so that an error at the start prints its one line alone
            self.progress.start()
        else:
            # a stage may end early
            self.progress.update(self._task, completed=self.progress.tasks[self._task].total)
        label, short = f"stage {number}: {description}", f"{number} {description}"
        if num_stages == 1:
            label = short = description
        self._task = self.progress.add(label, short=short, total=num_steps or None, completed=done)

    def step(self, num_tokens: int, share: float | None = None) -> None:
        self._steps += 1
        self._tokens += num_tokens
        if share is not None:
            if self._share is None and self.lines is not None:
                # a resumed stage does not say where it begins
                self.lines.pace_from(share)
            self._share = share
        elif self._num_steps:
            self._share = self._steps / self._num_steps
        seconds = self.clock() - self._start
        if seconds > 0.5 and self._rate is None:
            self._rate = self._tokens / seconds
        if self.lines is None:
            self._draw(advance=1)
        elif not self.lines.has_written and (self.lines.overdue() or 0.0) > self.patience:
            self._write_line()

    def record(self, record: dict[str, Any]) -> None:
        if record["split"] == "train":
            self._bpc = f"train {record['bpc']:.3f} bpc"
            self._rate = record["tokens_per_second"]
        elif record["split"] == "valid":
            self._valid = f"valid {record['bpc']:.3f}"
        if self.lines is None:
            self._draw(advance=0)
        elif record["split"] == "train" and self.lines.overdue() is not None:
            self._write_line()

    def testing(self, done: int, total: int) -> None:
        if self._bars is None:
            self._stop()
            self._bars = Bars(self.console, clock=self.clock)
        self._bars.show("evaluating the test split", done, total)
        if done == total:
            self._stop()

    def _stop(self) -> None:
        """End what is displayed: there is room for one display at a time."""
        if self._task is not None:
            self.progress.stop()
            self.progress, self._task = FittingProgress(self.console), None
        if self._bars is not None:
            self._bars.close()
            self._bars = None

    def _draw(self, *, advance: int) -> None:
        rate = "" if self._rate is None else f"{self._rate:,.0f} tok/s"
        self.progress.update(self._task, rate=rate, train=self._bpc, valid=self._valid)
        if self._num_steps:
            self.progress.update(self._task, advance=advance)
        elif self._share is not None:
            count = f"step {self._steps:,}, {int(100 * self._share)} %"
            self.progress.update(self._task, total=1.0, completed=self._share, count=count)
        else:
            self.progress.update(self._task, count=f"step {self._steps:,}")

    def _write_line(self) -> None:
        assert self.lines is not None
        count = f"step {self._steps:,}" + (f" of {self._num_steps:,}" if self._num_steps else "")
        rate = "" if self._rate is None else f"{self._rate:,.0f} tokens/s"
        self.lines.write(count, self._share, self._bpc, self._valid, rate)

    def notice(self, text: str) -> None:
        print_notice(self.console, text)

