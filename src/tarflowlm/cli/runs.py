"""`tarflowlm runs`: training runs compared in a table."""

import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Annotated, Any

import tyro

from tarflowlm.cli.options import PrintJson, arg
from tarflowlm.errors import UserError, first_line

DEPTH = 2  # levels below a folder at which runs are looked for


@dataclass(frozen=True)
class Args:
    """Compare training runs in a table: bits per character, tokens, time and state."""

    directories: Annotated[tyro.conf.Positional[tuple[Path, ...]], arg("DIR ...")] = ()
    """Run directories, or folders that hold some, at most two levels down."""
    json: PrintJson = False

    def __post_init__(self) -> None:
        if not self.directories:
            raise UserError("name the directory that holds the runs, say `tarflowlm runs runs`")


def run(args: Args) -> None:
    from rich.console import Console

    from tarflowlm.terminal.bars import print_json, print_notice, print_table

    rows = _sorted([_row(name, directory) for name, directory in _find(args.directories).items()])
    if args.json:
        print_json({"runs": rows})
        return
    columns = {
        "": "name",
        "preset": "preset",
        "bpc": "bpc",
        "best step": "best_step",
        "tokens": "tokens",
    }
    columns |= {"time": "seconds", "state": "state"}
    if all((row["preset"] or "") in row["name"] for row in rows):
        del columns["preset"]
    width = Console().width
    # bits per character compare within a text only
    for source, group in groupby(rows, lambda row: row["source"]):
        same = list(group)
        cells = {title: [_cell(row, name) for row in same] for title, name in columns.items()}
        if source is None:
            sys.stdout.writelines(
                f"{name}: {state}\n" for name, state in zip(cells[""], cells["state"], strict=True)
            )
            continue
        # numbers are never cut: what says least is left out of a narrow terminal
        for spare in ("preset", "best step", "tokens", "time"):
            if sum(3 + max(map(len, [title, *cells[title]])) for title in cells) + 1 > width:
                cells.pop(spare, None)
        title = f"runs on {Path(source).name}: bits per character (bpc) and more"
        print_table(title, list(zip(*cells.values(), strict=True)), list(cells))
    if any(row["best"] for row in rows):
        print_notice("* the fewest bits per character on its text")
    if any(row["split"] == "valid" for row in rows):
        print_notice("v: the best validation so far, over fewer windows than a test")


def _find(directories: Sequence[Path]) -> dict[str, Path]:
    """Name -> run directory."""
    found: dict[str, Path] = {}
    for folder in directories:
        if not (below := list(_runs_in(folder, DEPTH))):
            remedy = "give a directory made by `tarflowlm train`"
            raise UserError(f"{folder} holds no run within {DEPTH} levels: {remedy}")
        short = {
            folder.resolve().name if path == folder else str(path.relative_to(folder)): path
            for path in below
        }
        found |= {name if name not in found else str(path): path for name, path in short.items()}
    return found


def _runs_in(folder: Path, depth: int) -> Iterator[Path]:
    if any(
        (folder / name).is_file() for name in ("config.json", "model.safetensors", "metrics.jsonl")
    ):
        yield folder
    elif depth:
        for path in sorted(folder.iterdir()):
            if path.is_dir() and not path.name.startswith("."):
                yield from _runs_in(path, depth - 1)


def _row(name: str, directory: Path) -> dict[str, Any]:
    """A run as `--json` shows it; the state of a broken one is the reason."""
    from tarflowlm.views.records import read_record

    empty = dict.fromkeys(
        ("preset", "source", "bpc", "split", "bound", "best_step", "tokens", "seconds")
    )
    row: dict[str, Any] = {
        "name": name,
        "directory": str(directory),
        **empty,
        "state": "",
        "best": False,
    }
    try:
        record = read_record(directory)
    except (UserError, OSError) as error:
        return row | {
            "state": first_line(error).removeprefix(f"{directory} ").removeprefix(f"{directory}/")
        }
    summary, valid = record.summary, record.valid
    row |= {"preset": record.run.name, "source": record.run.data.source, "state": record.status}
    row["bound"] = "exact" if record.is_exact else "elbo"
    if record.has_log:
        row |= {
            "tokens": int(record.train["tokens"].max()),
            "seconds": float(record.train["seconds"][-1]),
        }
    if len(valid["bpc"]):
        best = int(valid["bpc"].argmin())
        row |= {
            "bpc": float(valid["bpc"][best]),
            "split": "valid",
            "best_step": int(valid["step"][best]),
        }
    if summary is not None:
        row |= {"bpc": float(summary["test"]["bpc"]), "split": "test"}
        row |= {key: summary[key] for key in ("tokens", "seconds") if key in summary}
    return row


def _sorted(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Text by text and by bits per character, the best of every text marked; broken runs last."""
    rows = sorted(
        rows,
        key=lambda r: (r["source"] is None, r["source"] or "", r["bpc"] or math.inf, r["name"]),
    )
    for source in {row["source"] for row in rows}:
        same = [row for row in rows if row["source"] == source and row["bpc"] is not None]
        # a test says more than a validation, where there is one
        finished = [row for row in same if row["split"] == "test"] or same
        if len(same) > 1:
            finished[0]["best"] = True
    return rows


def _cell(row: dict[str, Any], name: str) -> str:
    from tarflowlm.evaluation.likelihood import sign_of
    from tarflowlm.terminal.bars import minutes

    value = row[name]
    if value is None:
        return ""
    if name == "bpc":
        return (
            f"{sign_of(row['bound'])} {value:.4f}"
            + " v" * (row["split"] == "valid")
            + " *" * row["best"]
        )
    if name == "tokens":
        return f"{value / 1e6:.2f}M"
    if name == "seconds":
        return minutes(value)
    return f"{value:,}" if isinstance(value, int) else value
