"""What the terminal shows: progress on stderr, results on stdout."""

import itertools
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, Protocol

import torch
from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from tarflowlm.data import CorpusProgress, Tokenizer
from tarflowlm.generation.generate import Generation, num_ticks
from tarflowlm.language_model import LanguageModel
from tarflowlm.terminal.progress import Bars, Clock, FittingProgress, PlainLines, is_live
from tarflowlm.training.metrics import Reporter


class Update(Protocol):
    """Sets what a bar shows as completed, and on request its total."""

    def __call__(self, completed: int, total: int | None = None) -> None: ...


StageProgress = Callable[[str, int, int | None], None]
"""Called with what is being done, the parts of it done, and the parts in all where they are known."""


def no_progress(stage: str, completed: int, total: int | None) -> None:
    """A `StageProgress` that shows nothing."""


def ticker(progress: StageProgress, stage: str, total: int) -> Callable[[], None]:
    """Every call says that one more of the stage's parts is done."""
    done = itertools.count(1)
    return lambda: progress(stage, next(done), total)


STAGES = {
    "fetch": "fetching {}, bytes",
    "count": "reading {}, characters",
    "bpe": "text for the tokenizer of {}, characters",
    "encode": "encoding {}, characters",
}
"""What a bar says about the stages of preparing a corpus."""


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


def print_notice(console: Console, text: str) -> None:
    """A line beside the results."""
    # a line in a log file, whatever its width
    console.print(text, style="dim", highlight=False, markup=False, soft_wrap=True)


@contextmanager
def bar(console: Console, description: str, total: int, *, clock: Clock = time.monotonic) -> Iterator[Update]:
    """Progress of one thing; the function it yields sets what is completed, and on request a new total."""
    bars, whole = Bars(console, clock=clock), total
    bars.begin(description)

    def update(completed: int, total: int | None = None) -> None:
        nonlocal whole
        whole = whole if total is None else total
        bars.show(description, completed, whole)

    try:
        yield update
    finally:
        bars.close()


@contextmanager
def stages_bar(
    console: Console, label: Callable[[str], str] = str, *, clock: Clock = time.monotonic, is_timing: bool = False
) -> Iterator[StageProgress]:
    """Progress of stages, one after the other; yields what is told a stage's name, the parts done and those in all.

    `label` turns a name into what is shown; with `is_timing` no thread draws beside what is being timed.
    """
    bars = Bars(console, clock=clock, auto_refresh=not is_timing)
    try:
        yield lambda stage, completed, total: bars.show(label(stage), completed, total)
    finally:
        bars.close()


def corpus_bar(
    console: Console, source: str, *, clock: Clock = time.monotonic
) -> AbstractContextManager[CorpusProgress]:
    """Progress of every stage of preparing a corpus; yields the `progress` of `prepare_corpus`."""
    return stages_bar(console, lambda stage: STAGES[stage].format(source), clock=clock)


@contextmanager
def sampling_bar(console: Console, model: LanguageModel, num_tokens: int) -> Iterator[Callable[[], None]]:
    """Progress over the positions that `generate` inverts; yields its `tick`."""
    total = num_ticks(model, num_tokens)
    done = itertools.count(1)
    with bar(console, "sampling, positions", total) as update:
        yield lambda: update(next(done))


def print_json(value: dict[str, Any]) -> None:
    """One JSON object on a line of its own; non-finite numbers become null, which strict parsers ask for."""

    def plain(item: Any) -> Any:
        if isinstance(item, float) and not math.isfinite(item):
            return None
        if isinstance(item, dict):
            return {key: plain(inner) for key, inner in item.items()}
        return [plain(inner) for inner in item] if isinstance(item, (list, tuple)) else item

    sys.stdout.write(json.dumps(plain(value), ensure_ascii=False) + "\n")
    sys.stdout.flush()


def column_table(title: str, columns: Sequence[str]) -> Table:
    """A table of numbers under headings; the column without one holds the names, which are never cut short."""
    table = Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(column, justify="right" if column else "left", no_wrap=not column)
    return table


def print_table(console: Console, title: str, rows: Sequence[tuple[str, str]]) -> None:
    # Text, for names may hold what rich takes for markup; not a title of the table, which would wrap to its width
    console.print(Text(title, style="bold"), soft_wrap=True)
    table = Table(show_header=False)
    table.add_column(style="cyan")
    table.add_column()
    for row in rows:
        table.add_row(*map(Text, row))
    console.print(table)


def _passes_text(passes: Sequence[Sequence[str]]) -> Text:
    """The symbols decoded after every pass, those that changed set off."""
    body, last = Text(), len(passes) - 1
    before: Sequence[str] | None = None
    for index, symbols in enumerate(passes):
        name = "noise" if index == 0 else "text" if index == last else f"after block {last - index + 1}"
        changed = 0 if before is None else sum(a != b for a, b in zip(symbols, before, strict=True))
        body.append(
            f"{name}" + (f"  ({changed} of {len(symbols)} changed)" if before else "") + "\n",
            style="bold cyan",
        )
        for i, symbol in enumerate(symbols):
            same = before is None or symbol == before[i]
            body.append(symbol, style="dim" if index == 0 else "" if same else "green")
        body.append("" if index == last else "\n")
        before = symbols
    return body


def _symbols(tokenizer: Tokenizer, tokens: torch.Tensor) -> list[str]:
    return [tokenizer.symbols[i] for i in tokens.tolist()]


def print_samples(console: Console, result: Generation, tokenizer: Tokenizer) -> None:
    """Every sample in a panel, with its passes where there are any, and how its given tokens were met."""
    for row, tokens in enumerate(result.tokens):
        shown = [_symbols(tokenizer, state[row]) for state in result.passes]
        body = _passes_text(shown) if shown else Text(tokenizer.decode(tokens.tolist()))
        note = None
        if result.ess is not None and result.log_evidence is not None:
            evidence = result.log_evidence[row].item()
            note = f"log p(given) about {evidence:.2f} nats, {result.ess[row].item():.1f} effective particles"
        console.print(
            Panel(body, title=f"sample {row + 1}", title_align="left", subtitle=note, subtitle_align="left")
        )


def samples_to_json(result: Generation, tokenizer: Tokenizer, *, states: bool = False) -> list[dict[str, Any]]:
    """One object per sample: text, passes and states where there are any, weights where tokens were given."""
    samples: list[dict[str, Any]] = []
    for row, tokens in enumerate(result.tokens):
        sample: dict[str, Any] = {"text": tokenizer.decode(tokens.tolist())}
        if result.passes:
            sample["passes"] = [tokenizer.decode(state[row].tolist()) for state in result.passes]
        if states:
            sample["states"] = [state[row].tolist() for state in result.states]
        for name in ("log_evidence", "ess", "draws"):
            value = getattr(result, name)
            if value is not None:
                sample[name] = value[row].item()
        samples.append(sample)
    return samples


def print_edits(
    console: Console, before: Sequence[str], edits: Sequence[Sequence[str]], notes: Sequence[str]
) -> None:
    """The text, and every edit of it with the tokens that changed set off."""
    console.print(Panel(Text("".join(before)), title="text", title_align="left"))
    for number, (symbols, note) in enumerate(zip(edits, notes, strict=True), 1):
        body = Text()
        for old, new in zip(before, symbols, strict=True):
            body.append(new, style="" if old == new else "bold green")
        console.print(Panel(body, title=f"edit {number}", title_align="left", subtitle=note, subtitle_align="left"))
