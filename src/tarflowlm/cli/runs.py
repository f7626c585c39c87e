"""`tarflowlm runs`: training runs compared in a table."""

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from itertools import chain
from operator import attrgetter
from pathlib import Path
from typing import Annotated

import tyro

from tarflowlm.errors import UserError, first_line
from tarflowlm.options import PrintJson, arg
from tarflowlm.terminal.bars import print_json, print_notice, print_table


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
    state: str
    preset: str | None = None
    source: str | None = None
    normalize: str = ""
    unwrap: bool = False
    bpc: float | None = None
    split: str = ""
    bound: str = ""
    tokens: int = 0
    seconds: float = 0.0
    best: bool = False

    @property
    def text(self) -> tuple[str, str, bool]:
        """The text that it reads."""
        return self.source or "", self.normalize, self.unwrap


def run(args: Args) -> None:
    rows = [_row(name, path) for name, path in _find(args.directories).items()]
    broken = [row for row in rows if row.source is None]
    # bits per character compare within a text only
    known = [row for row in rows if row.source is not None]
    texts = sorted({row.text for row in known})
    groups = [_ranked([row for row in known if row.text == text]) for text in texts]
    if args.json:
        print_json({"runs": [asdict(row) for row in [*chain(*groups), *broken]]})
        return
    for group in groups:
        _print(group)
    for row in broken:
        sys.stdout.write(f"{row.name}: {row.state}\n")
    if any(row.best for row in chain(*groups)):
        print_notice("* the fewest bits per character on its text, by the test if there is one")
    if any(row.split == "valid" for row in rows):
        print_notice("v: the best validation so far, over fewer windows than a test")


def _find(directories: Sequence[Path]) -> dict[str, Path]:
    """Name -> run directory; models that were exported from runs are left out."""
    from tarflowlm.training.records import DEPTH, find_runs, is_export

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
    from tarflowlm.training.records import read_record

    try:
        record = read_record(directory)
    except (UserError, OSError) as error:
        reason = first_line(error).removeprefix(f"{directory} ").removeprefix(f"{directory}/")
        return Row(name, str(directory), reason)
    row = Row(
        name,
        str(directory),
        record.status,
        preset=record.run.name,
        source=record.run.data.source,
        normalize=record.run.data.tokenizer.normalization,
        unwrap=record.run.data.unwrap,
        bound=record.bound,
        tokens=int(record.train["tokens"][-1]),
        seconds=float(record.train["seconds"][-1]),
    )
    done = record.summary
    if done is not None:
        return replace(
            row,
            bpc=done["test"]["bpc"],
            split="test",
            tokens=done["tokens"],
            seconds=done["seconds"],
        )
    if len(record.valid["bpc"]):
        row = replace(row, bpc=float(min(record.valid["bpc"])), split="valid")
    return row


def _ranked(rows: list[Row]) -> list[Row]:
    """The runs on a text by bits per character; the best of several is marked."""
    known = [row for row in rows if row.bpc is not None]
    known.sort(key=attrgetter("bpc", "name"))
    unknown = [row for row in rows if row.bpc is None]
    if len(known) > 1:
        # a test says more than a validation, where there is one
        best = next((row for row in known if row.split == "test"), known[0])
        known = [replace(row, best=row is best) for row in known]
    return known + unknown


def _print(rows: Sequence[Row]) -> None:
    """A table about the runs on a text."""
    from tarflowlm.evaluation.likelihood import sign_of

    cells = []
    for row in rows:
        bits = ""
        if row.bpc is not None:
            bits = f"{sign_of(row.bound)} {row.bpc:.4f}"
        if row.split == "valid":
            bits += " v"
        if row.best:
            bits += " *"
        time = str(timedelta(seconds=round(row.seconds)))
        cells.append([row.name, bits, f"{row.tokens / 1e6:.2f}M", time, row.state])
    source, normalize, unwrap = rows[0].text
    how = " in text8" if normalize == "text8" else ""
    how += ", unwrapped" if unwrap else ""
    title = f"runs on {Path(source).name}{how}: bits per character (bpc) and more"
    print_table(title, cells, ["", "bpc", "tokens", "time", "state"])
