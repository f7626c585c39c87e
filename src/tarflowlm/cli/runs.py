"""`tarflowlm runs`: training runs compared in a table."""

import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Annotated

import tyro

from tarflowlm.cli.options import PrintJson, arg
from tarflowlm.errors import UserError, first_line


@dataclass(frozen=True)
class Args:
    """Compare training runs in a table: bits per character, tokens, time and state."""

    directories: Annotated[tyro.conf.Positional[tuple[Path, ...]], arg("DIR ...")] = ()
    """Run directories, or folders that hold some, at most two levels down."""
    json: PrintJson = False

    def __post_init__(self) -> None:
        if not self.directories:
            raise UserError("name the directory that holds the runs, say `tarflowlm runs runs`")


@dataclass(frozen=True)
class Row:
    """A run as `--json` shows it; the state of a broken one is the reason."""

    name: str
    directory: str
    preset: str | None = None
    source: str | None = None
    bpc: float | None = None
    split: str | None = None
    bound: str | None = None
    best_step: int | None = None
    tokens: int | None = None
    seconds: float | None = None
    state: str = ""
    best: bool = False


COLUMNS = ("", "preset", "bpc", "best step", "tokens", "time", "state")
SPARE = ("preset", "best step", "tokens", "time")
"""Columns that a narrow terminal leaves out, in this order: numbers are never cut."""


def run(args: Args) -> None:
    from tarflowlm.terminal.bars import print_json, print_notice

    rows = _sorted([_row(name, path) for name, path in _find(args.directories).items()])
    if args.json:
        print_json({"runs": [asdict(row) for row in rows]})
        return
    titles = [*COLUMNS]
    if all((row.preset or "") in row.name for row in rows):
        titles.remove("preset")
    # bits per character compare within a text only
    for source, group in groupby(rows, _source_of):
        if source:
            _print(source, titles, [*group])
        else:
            for row in group:
                sys.stdout.write(f"{row.name}: {row.state}\n")
    if any(row.best for row in rows):
        print_notice("* the fewest bits per character on its text")
    if any(row.split == "valid" for row in rows):
        print_notice("v: the best validation so far, over fewer windows than a test")


def _find(directories: Sequence[Path]) -> dict[str, Path]:
    """Name -> run directory; models that were exported from runs are left out."""
    from tarflowlm.views.records import DEPTH, find_runs, is_export

    found: dict[str, Path] = {}
    for folder in directories:
        below = [path for path in find_runs(folder) if not is_export(path)]
        if not below:
            remedy = "give a directory made by `tarflowlm train`"
            raise UserError(f"{folder} holds no run within {DEPTH} levels: {remedy}")
        for path in below:
            name = folder.resolve().name if path == folder else str(path.relative_to(folder))
            found[str(path) if name in found else name] = path
    return found


def _row(name: str, directory: Path) -> Row:
    from tarflowlm.views.records import read_record

    row = Row(name, str(directory))
    try:
        record = read_record(directory)
    except (UserError, OSError) as error:
        reason = first_line(error).removeprefix(f"{directory} ").removeprefix(f"{directory}/")
        return replace(row, state=reason)
    row = replace(
        row,
        preset=record.run.name,
        source=record.run.data.source,
        bound=record.bound,
        tokens=int(record.train["tokens"][-1]),
        seconds=float(record.train["seconds"][-1]),
        state=record.status,
    )
    if len(bpc := record.valid["bpc"]):
        best = int(bpc.argmin())
        step = int(record.valid["step"][best])
        row = replace(row, bpc=float(bpc[best]), split="valid", best_step=step)
    done = record.summary
    if done is not None:
        row = replace(
            row,
            bpc=done["test"]["bpc"],
            split="test",
            tokens=done["tokens"],
            seconds=done["seconds"],
        )
    return row


def _source_of(row: Row) -> str:
    return row.source or ""


def _sorted(rows: list[Row]) -> list[Row]:
    """Text by text and by bits per character, the best of every text marked; broken runs last."""

    def place(row: Row) -> tuple[bool, str, float, str]:
        bits = math.inf if row.bpc is None else row.bpc
        return row.source is None, _source_of(row), bits, row.name

    found: list[Row] = []
    for _, group in groupby(sorted(rows, key=place), _source_of):
        same = [*group]
        known = [row for row in same if row.bpc is not None]
        # a test says more than a validation, where there is one
        finished = [row for row in known if row.split == "test"] or known
        if len(known) > 1:
            same = [replace(row, best=row is finished[0]) for row in same]
        found += same
    return found


def _print(source: str, titles: Sequence[str], rows: Sequence[Row]) -> None:
    """A table about the runs on a text."""
    from rich.console import Console

    from tarflowlm.terminal.bars import print_table

    cells = [_cells(row) for row in rows]
    widths = {name: 3 + max(len(name), *(len(row[name]) for row in cells)) for name in titles}
    shown = list(titles)
    for spare in SPARE:
        if spare in shown and sum(widths[name] for name in shown) + 1 > Console().width:
            shown.remove(spare)
    title = f"runs on {Path(source).name}: bits per character (bpc) and more"
    print_table(title, [[row[name] for name in shown] for row in cells], shown)


def _cells(row: Row) -> dict[str, str]:
    """What the table shows of a run, by the titles of its columns."""
    from tarflowlm.evaluation.likelihood import sign_of
    from tarflowlm.terminal.bars import minutes

    bits = ""
    if row.bpc is not None:
        bits = f"{sign_of(row.bound or '')} {row.bpc:.4f}"
        bits += " v" if row.split == "valid" else ""
        bits += " *" if row.best else ""
    return {
        "": row.name,
        "preset": row.preset or "",
        "bpc": bits,
        "best step": "" if row.best_step is None else f"{row.best_step:,}",
        "tokens": "" if row.tokens is None else f"{row.tokens / 1e6:.2f}M",
        "time": "" if row.seconds is None else minutes(row.seconds),
        "state": row.state,
    }
