"""What the terminal shows: progress on stderr, results on stdout."""

import itertools
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Protocol

import torch
from rich.console import Console
from rich.panel import Panel
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from tarflowlm.checkpoint import Model
from tarflowlm.data import CorpusProgress, Tokenizer
from tarflowlm.generation.generate import Generation, num_ticks
from tarflowlm.training.metrics import Reporter

stderr_columns = (
    SpinnerColumn(),
    TextColumn("{task.description}", markup=False),
    BarColumn(bar_width=None),
    MofNCompleteColumn(),
    TextColumn("{task.fields[note]}", markup=False),
    TextColumn("eta"),
    TimeRemainingColumn(elapsed_when_finished=True),
)


class Update(Protocol):
    """Sets what a bar shows as completed, and on request its total."""

    def __call__(self, completed: int, total: int | None = None) -> None: ...


STAGES = {
    "fetch": "fetching {}, bytes",
    "count": "reading {}, characters",
    "bpe": "text for the tokenizer of {}, characters",
    "encode": "encoding {}, characters",
}
"""What a bar says about the stages of preparing a corpus."""


class ProgressReporter(Reporter):
    """A bar per stage with tokens per second, bits per character and the time left. Use as a context."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.progress = Progress(*stderr_columns, console=console)
        self._task: Any = None
        self._bpc, self._valid, self._rate = "", "", ""
        self._start, self._tokens = time.perf_counter(), 0
        self._preparing = ExitStack()
        self._corpus: CorpusProgress | None = None

    def __enter__(self) -> "ProgressReporter":
        return self

    def __exit__(self, *error: object) -> None:
        self._preparing.close()
        if self._task is not None:
            self.progress.stop()

    def preparing(self, stage: str, done: int, total: int | None) -> None:
        if self._corpus is None:
            self._corpus = self._preparing.enter_context(corpus_bar(self.console, "the corpus"))
        self._corpus(stage, done, total)

    def stage(self, index: int, num_stages: int, num_steps: int, done: int, description: str) -> None:
        self._preparing.close()
        if self._task is None:
            # not before, so that an error at the start prints its one line alone
            self.progress.start()
        else:
            self.progress.update(self._task, completed=self.progress.tasks[self._task].total)
        label = f"stage {index + 1}/{num_stages}: {description}" if num_stages > 1 else description
        self._task = self.progress.add_task(label, total=num_steps, completed=done, note="")
        self._bpc = self._valid = self._rate = ""
        self._start, self._tokens = time.perf_counter(), 0

    def step(self, num_tokens: int, share: float | None = None) -> None:
        self._tokens += num_tokens
        seconds = time.perf_counter() - self._start
        if seconds > 0.5 and not self._rate:
            self._rate = f"{self._tokens / seconds:,.0f} tok/s"
        self.progress.update(self._task, advance=1, note=self._note())

    def record(self, record: dict[str, Any]) -> None:
        if record["split"] == "train":
            self._bpc = f"train {record['bpc']:.3f}"
            self._rate = f"{record['tokens_per_second']:,.0f} tok/s"
        elif record["split"] == "valid":
            self._valid = f"valid {record['bpc']:.3f}"
        self.progress.update(self._task, note=self._note())

    def _note(self) -> str:
        bits = " ".join(part for part in (self._bpc, self._valid) if part)
        return f"{self._rate}  {bits + ' bpc' if bits else ''}"

    def notice(self, text: str) -> None:
        print_notice(self.console, text)


def print_notice(console: Console, text: str) -> None:
    """A line beside the results."""
    console.print(text, style="dim", highlight=False, markup=False)


@contextmanager
def bar(console: Console, description: str, total: int) -> Iterator[Update]:
    """A progress bar; the function it yields sets what is completed, and on request a new total."""
    progress = Progress(*stderr_columns, console=console, transient=True)
    task = progress.add_task(description, total=total, note="")
    start = time.perf_counter()

    def update(completed: int, total: int | None = None) -> None:
        # the display starts here, so that an error at the start prints its one line alone
        progress.start()
        rate = completed / max(time.perf_counter() - start, 1e-9)
        progress.update(task, completed=completed, total=total, note=f"{rate:,.0f}/s")

    try:
        yield update
    finally:
        if progress.live.is_started:
            progress.stop()


@contextmanager
def corpus_bar(console: Console, source: str) -> Iterator[CorpusProgress]:
    """A bar for every stage of preparing a corpus; yields the `progress` of `prepare_corpus`."""
    # without a terminal a transient bar would leave an empty line before an error's one line
    progress = Progress(*stderr_columns, console=console, transient=True, disable=not console.is_terminal)
    starts: dict[str, float] = {}
    tasks: dict[str, Any] = {}

    def update(stage: str, completed: int, total: int | None) -> None:
        if stage not in tasks:
            for task in tasks.values():
                progress.update(task, visible=False)
            tasks[stage] = progress.add_task(STAGES[stage].format(source), total=total, note="")
            starts[stage] = time.perf_counter()
            progress.start()
        rate = completed / max(time.perf_counter() - starts[stage], 1e-9)
        progress.update(tasks[stage], completed=completed, total=total, note=f"{rate:,.0f}/s")

    try:
        yield update
    finally:
        if progress.live.is_started:
            progress.stop()


@contextmanager
def sampling_bar(console: Console, model: Model, num_tokens: int) -> Iterator[Callable[[], None]]:
    """A bar over the positions that `generate` inverts; yields its `tick`."""
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
