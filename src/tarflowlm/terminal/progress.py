"""How progress is shown: bars that fit the terminal, and plain lines where stderr is a file or a pipe."""

import time
from collections.abc import Callable, Iterable

from rich.console import Console
from rich.measure import Measurement
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Column, Table
from rich.text import Text

Clock = Callable[[], float]
"""Seconds from some fixed instant."""

SHORT_LABEL = 28
"""Characters that a label keeps on a narrow terminal."""
MIN_BAR = 10
"""Columns below which a bar says too little; text makes room for it."""


def is_live(console: Console) -> bool:
    """Whether bars can be redrawn: a terminal, and one that can move its cursor."""
    # FORCE_COLOR makes rich take a pipe for a terminal
    return console.is_interactive and console.file.isatty()


def per_second(rate: float) -> str:
    if rate >= 10:
        return f"{rate:,.0f}/s"
    return f"{rate:.1f}/s" if rate >= 1 else f"{1 / rate:,.1f} s each"


def minutes(seconds: float) -> str:
    """5:46, or 2:05:46."""
    hours, rest = divmod(round(seconds), 3600)
    return f"{hours:,}:{rest // 60:02}:{rest % 60:02}" if hours else f"{rest // 60}:{rest % 60:02}"


class PlainLines:
    """Progress as whole lines without control codes: one after `first` seconds, then one every `every` seconds."""

    first = 3.0
    every = 30.0

    def __init__(self, console: Console, *, clock: Clock = time.monotonic) -> None:
        self.console, self.clock = console, clock
        self.begin("")

    def begin(self, label: str, share: float = 0.0) -> None:
        """Something new begins, of which `share` is done already."""
        self.label, self.has_written = label, False
        self._next = self.clock() + self.first
        self.pace_from(share)

    def pace_from(self, share: float) -> None:
        """The time left is told by the pace from here on."""
        self._start_share, self._start = share, self.clock()

    def overdue(self) -> float | None:
        """Seconds since a line was due; None while there is time."""
        late = self.clock() - self._next
        return late if late >= 0 else None

    def write(self, count: str, share: float | None, *details: str) -> None:
        """`label: count (8 %), details, 5:46 left`."""
        done = "" if share is None else f" ({int(100 * share)} %)"
        left = self._left(share)
        rest = [*filter(None, details), *([f"{minutes(left)} left"] if left is not None else [])]
        self.has_written = True
        self._next = self.clock() + self.every
        try:
            self.console.file.write(f"{self.label}: {', '.join([count + done, *rest])}\n")
            self.console.file.flush()
        except OSError:
            # nobody reads, or the disk is full: no reason to lose hours of work
            self._next = float("inf")

    def _left(self, share: float | None) -> float | None:
        """Seconds to go at the pace since `pace_from`."""
        if share is None or not self._start_share < share < 1:
            return None
        return (self.clock() - self._start) * (1 - share) / (share - self._start_share)


class _Count(MofNCompleteColumn):
    """512/2090, or the task's own `count`."""

    def render(self, task: Task) -> Text:
        count = task.fields["count"]
        return Text(count, style="progress.download") if count else super().render(task)


def _columns() -> dict[str, ProgressColumn]:
    def text(format: str) -> TextColumn:
        return TextColumn(format, markup=False)

    return {
        "spinner": SpinnerColumn(),
        "label": text("{task.description}"),
        "short label": text("{task.fields[short]}"),
        "bar": BarColumn(bar_width=None),
        "count": _Count(table_column=Column(no_wrap=True)),
        "rate": text("{task.fields[rate]}"),
        "train": text("{task.fields[train]}"),
        "valid": text("{task.fields[valid]}"),
        "eta": text("eta"),
        "left": TimeRemainingColumn(elapsed_when_finished=True, table_column=Column(no_wrap=True)),
    }


NARROWER = ("eta", "label", "rate", "valid", "bar", "train", "spinner")
"""Columns in the order in which a narrow terminal does without them; the short label takes the place of the label."""


class FittingProgress(Progress):
    """rich's bars, less what is needed least where the terminal is too narrow for all."""

    def __init__(self, console: Console, *, transient: bool = False, auto_refresh: bool = True) -> None:
        self._all, self._screen = _columns(), console
        super().__init__(*self._all.values(), console=console, transient=transient, auto_refresh=auto_refresh)

    def add(self, label: str, *, total: int | None, completed: int = 0, short: str | None = None) -> TaskID:
        """A new task; its fields are `count`, `rate`, `train` and `valid`, all empty."""
        short = label if short is None else short
        short = short if len(short) <= SHORT_LABEL else short[: SHORT_LABEL - 1] + "…"
        return self.add_task(
            label, total=total, completed=completed, short=short, count="", rate="", train="", valid=""
        )

    def make_tasks_table(self, tasks: Iterable[Task]) -> Table:
        shown = [task for task in tasks if task.visible]
        widths = {name: self._width(column, shown) for name, column in self._all.items()}
        names = [name for name, width in widths.items() if width and name != "short label"]
        for spare in NARROWER:
            # every column but the last is followed by a space
            if sum(widths[name] + 1 for name in names) - 1 <= self._screen.width:
                break
            names = ["short label" if name == spare == "label" else name for name in names]
            names = [name for name in names if name != spare]
        self.columns = tuple(self._all[name] for name in names)
        return super().make_tasks_table(shown)

    def _width(self, column: ProgressColumn, tasks: list[Task]) -> int:
        if isinstance(column, BarColumn):
            return MIN_BAR
        options = self._screen.options
        return max((Measurement.get(self._screen, options, column(task)).maximum for task in tasks), default=0)


class Bars:
    """One stage of work after the other: a bar on a terminal, plain lines elsewhere."""

    def __init__(self, console: Console, *, clock: Clock = time.monotonic, auto_refresh: bool = True) -> None:
        """Without `auto_refresh` no thread draws: for what is being timed."""
        self.clock, self.auto_refresh = clock, auto_refresh
        self.lines = None if is_live(console) else PlainLines(console, clock=clock)
        self.progress = FittingProgress(console, transient=True, auto_refresh=auto_refresh)
        self._label: str | None = None
        self._task: TaskID | None = None
        self._start, self._first, self._done = clock(), 0, 0

    def begin(self, label: str, completed: int = 0, total: int | None = None) -> None:
        """A stage, of which `completed` is done; nothing is shown yet."""
        self._label, self._start, self._first, self._done = label, self.clock(), completed, completed
        if self.lines is not None:
            self.lines.begin(label, completed / total if total else 0.0)
        if self._task is not None:
            self.progress.update(self._task, visible=False)
            self._task = None

    def show(self, label: str, completed: int, total: int | None) -> None:
        if label != self._label or completed < self._done:
            self.begin(label, completed, total)
        self._done = completed
        seconds = self.clock() - self._start
        done = completed - self._first
        rate = per_second(done / seconds) if done > 0 and seconds > 0 else ""
        if self.lines is None:
            self._draw(label, completed, total, rate)
        elif done > 0 and completed != total and self.lines.overdue() is not None:
            count = f"{completed:,}" if total is None else f"{completed:,} of {total:,}"
            self.lines.write(count, completed / total if total else None, rate)

    def _draw(self, label: str, completed: int, total: int | None, rate: str) -> None:
        if self._task is None:
            self._task = self.progress.add(label, total=total, completed=completed)
        # not before, so that an error at the start prints its one line alone
        self.progress.start()
        self.progress.update(self._task, completed=completed, total=total, rate=rate, refresh=not self.auto_refresh)

    def close(self) -> None:
        if self.progress.live.is_started:
            self.progress.stop()
