"""Tables, JSON and notices, and the progress of long work: a bar on a terminal, else lines."""

import contextlib
import logging
import math
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import timedelta

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Column, Table
from rich.text import Text

from tarflowlm import errors
from tarflowlm.errors import is_first_process
from tarflowlm.files import json_line


def print_json(value: Mapping[str, object]) -> None:
    """One JSON object on a line of its own (`json_line`)."""
    sys.stdout.write(json_line(value))
    sys.stdout.flush()


def print_notice(text: str) -> None:
    """A line on stderr. It is lost if stderr is closed or its disk is full: the work continues."""
    if not is_first_process():
        return
    # not by a rich console, which exits on a broken pipe and would write into the bar of another
    with contextlib.suppress(OSError, AttributeError):
        sys.stderr.write(f"{text}\n")
        sys.stderr.flush()


def suggest(*words: object) -> None:
    """A notice that suggests the next command."""
    print_notice(f"next: tarflowlm {errors.command(map(str, words))}")


class NoticeHandler(logging.Handler):
    """Prints the messages of the package's logger as notices."""

    def emit(self, record: logging.LogRecord) -> None:
        print_notice(record.getMessage())


def print_table(
    title: str, rows: Iterable[Sequence[str]], columns: Sequence[str] = ("", "")
) -> None:
    """A table with a title, and `rows` under the headings `columns`.

    If the terminal is too narrow, longer texts wrap; numbers under headings stay whole.
    """
    console = Console()
    rows = list(rows)
    # cells and titles are Text: names may contain characters that rich takes for markup
    console.print(Text(title, style="bold"), soft_wrap=True)
    table = Table(show_header=any(columns))
    for index, column in enumerate(columns):
        if column:
            is_short = all(len(row[index]) <= 14 for row in rows)  # such as a number
            table.add_column(column, justify="right", no_wrap=is_short, overflow="fold")
        else:
            table.add_column(style="" if index else "cyan", overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    console.print(table)


def print_result(
    as_json: bool, value: Mapping[str, object], title: str, rows: Iterable[Sequence[str]]
) -> None:
    """The findings of a command, as JSON or as a table."""
    if as_json:
        print_json(value)
    else:
        print_table(title, rows)


class _Numbers(ProgressColumn):
    """`512 of 2,090 (24 %), 25/s` or `4.0 s each`; or the task's own `count` and `details`."""

    def render(self, task: Task) -> Text:
        count = task.fields["count"]
        if not count:
            count = f"{task.completed:,.0f}"
            if task.total:
                count += f" of {task.total:,.0f}"
        if task.total:
            count += f" ({int(task.percentage)} %)"
        details = ", ".join(task.fields["details"].values())
        if not details and task.speed:
            rate = task.speed
            details = f"{rate:.1f}/s" if rate < 10 else f"{rate:,.0f}/s"
            if rate < 1:
                details = f"{1 / rate:,.1f} s each"
        return Text(f"{count}, {details}" if details else count)


class Bars(errors.Progress, contextlib.AbstractContextManager["Bars", None]):
    """The `Progress` of the command line, one stage of work after the other, as a context.

    A training run, which writes lines of metrics, also shows its step, bits per character and
    speed. Bars to `keep` stay on the screen when their work is done.
    """

    def __init__(
        self,
        stage: str = "",
        total: int | None = None,
        *,
        keep: bool = False,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.keep = keep
        self.console = console or Console(stderr=True)
        self.clock = clock
        # FORCE_COLOR makes rich take a pipe for a terminal
        is_terminal = self.console.is_interactive and self.console.file.isatty()
        self.is_live = is_terminal and is_first_process()
        # a narrow terminal has room for the numbers only
        self.is_wide = not self.is_live or self.console.width >= 120
        bar = [BarColumn(bar_width=20, table_column=Column(no_wrap=True))] if self.is_wide else []
        self._numbers = _Numbers()
        left = TimeRemainingColumn(elapsed_when_finished=True, table_column=Column(no_wrap=True))
        self.progress = Progress(
            TextColumn("{task.description}", markup=False),
            *bar,
            self._numbers,
            left,
            console=self.console,
            get_time=clock,
            transient=not keep,
            disable=not self.is_live,
        )
        self._task: TaskID | None = None
        self._step = 0
        if stage:
            self.stage(stage, total)

    def __exit__(self, *error: object) -> None:
        self.progress.stop()

    def stage(self, name: str, total: int | None = None, done: int = 0) -> None:
        """Begin a part called `name`.

        Nothing is shown yet: an error at its start prints its line alone.
        """
        if self._task is not None and self.keep:
            # a stage of training may end early
            self.progress.update(self._task, total=self.progress.tasks[-1].completed)
        elif self._task is not None:
            self.progress.remove_task(self._task)
        self._task = self.progress.add_task(name, total=total, completed=done, count="", details={})
        self._due = self.clock() + 3.0  # the first line of a stage in a log file, and ...

    def advance(self, count: int = 1) -> None:
        """`count` more units of the current stage are done; in a training run, by one more step."""
        assert self._task is not None
        self._step += 1
        if self.progress.tasks[-1].fields["details"]:
            self.progress.update(self._task, count=f"step {self._step:,}")
        self.progress.advance(self._task, count)
        self._show()

    def record(self, record: errors.Record) -> None:
        """Show the numbers of a line of metrics.jsonl."""
        assert self._task is not None
        shown = dict(self.progress.tasks[-1].fields["details"])
        bits, unit = float(record["bpc"]), "bpc"
        if not math.isfinite(bits):  # the tokenizer loses characters
            bits, unit = float(record["nats_per_token"]) / math.log(2), "bits a token"
        if record["split"] == "train":
            shown["train"] = f"train {bits:.3f} {unit}"
            if self.is_wide:
                shown["speed"] = f"{record['tokens_per_second']:,.0f} tokens/s"
        elif record["split"] == "valid":
            untrained = " before training" if record["step"] == 0 else ""
            shown["valid"] = f"valid {bits:.3f}{untrained}"
            if "text" in record:
                self._quote(str(record["text"]))
        self._step = int(record["step"])
        self.progress.update(self._task, count=f"step {self._step:,}", details=shown)
        self._show()

    def _quote(self, text: str) -> None:
        """A line of what the model writes so far, above the bar."""
        # a terminal takes control characters for commands
        shown = "".join(c if c.isprintable() else "\ufffd" for c in " ".join(text.split()))
        line = Text(f"  {shown}", style="dim")
        if self.is_live:
            line.truncate(self.console.width, overflow="ellipsis")
            self.progress.console.print(line)
        else:
            line.truncate(100, overflow="ellipsis")
            print_notice(line.plain)

    def _show(self) -> None:
        """Draw the bar, or write a line to a log file when one is due."""
        self.progress.start()
        task = self.progress.tasks[-1]
        if self.is_live or self.clock() < self._due or task.finished:
            return
        self._due = self.clock() + 30.0  # ... the next
        line = f"{task.description}: {self._numbers.render(task)}"
        if task.time_remaining is not None:
            # a longer time has no timedelta
            seconds = min(int(task.time_remaining), 10**10)
            line += f", {timedelta(seconds=seconds)} left"
        print_notice(line)
