"""Tables, JSON and notices. Light to import, as `tarflowlm --help` prints a table."""

import contextlib
import json
import logging
import math
import sys
from collections.abc import Iterable, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text


def json_line(value: dict[str, Any]) -> str:
    """One JSON object as a line; non-finite numbers become null, as strict parsers require."""

    def plain(item: Any) -> Any:
        if isinstance(item, float) and not math.isfinite(item):
            return None
        if isinstance(item, dict):
            return {key: plain(inner) for key, inner in item.items()}
        return [plain(inner) for inner in item] if isinstance(item, (list, tuple)) else item

    return json.dumps(plain(value), ensure_ascii=False) + "\n"


def print_json(value: dict[str, Any]) -> None:
    """One JSON object on a line of its own (`json_line`)."""
    sys.stdout.write(json_line(value))
    sys.stdout.flush()


def print_notice(text: str) -> None:
    """A line on stderr beside the results. It is lost if stderr is closed or its disk is full: work goes on."""
    with contextlib.suppress(OSError):
        # not by a rich console: it exits on a broken pipe, and would write into the bar of another one
        sys.stderr.write(f"{text}\n")
        sys.stderr.flush()


class NoticeHandler(logging.Handler):
    """Prints the messages of the package's logger as notices."""

    def emit(self, record: logging.LogRecord) -> None:
        print_notice(record.getMessage())


# cells and titles are Text: names may contain what rich takes for markup


def print_table(title: str, rows: Iterable[tuple[str, str]]) -> None:
    """Two columns without headings: names and values."""
    console = Console()
    # not a title of the table, which would wrap to its width
    console.print(Text(title, style="bold"), soft_wrap=True)
    table = Table(show_header=False)
    table.add_column(style="cyan")
    table.add_column()
    for row in rows:
        table.add_row(*map(Text, row))
    console.print(table)


NUMBER = 14
"""Characters of the longest cell that is kept on one line."""


def print_columns(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """A table of numbers under headings; the column without a heading holds names.

    Names and numbers are never cut short: where the width does not suffice, longer texts wrap, or else the names.
    """
    table = Table(title=Text(title), title_justify="left", title_style="bold")
    rows = list(rows)
    is_short = [bool(rows) and all(len(row[index]) <= NUMBER for row in rows) for index in range(len(columns))]
    some_wrap = not all(short for column, short in zip(columns, is_short, strict=True) if column)
    for column, short in zip(columns, is_short, strict=True):
        if column:
            table.add_column(column, justify="right", no_wrap=short, overflow="fold")
        else:
            table.add_column(column, no_wrap=some_wrap, overflow="ellipsis" if some_wrap else "fold", style="cyan")
    for row in rows:
        table.add_row(*map(Text, row))
    Console().print(table)
