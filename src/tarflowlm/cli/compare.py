"""Training runs side by side, for `tarflowlm info` and its short form `tarflowlm runs`."""

import sys
from collections.abc import Sequence
from datetime import timedelta
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tarflowlm.errors import UserError, first_line
from tarflowlm.terminal.bars import print_json, print_notice, print_table

if TYPE_CHECKING:
    from tarflowlm.runs.records import RunRecord


def compare(directories: Sequence[Path], *, as_json: bool) -> None:
    """A table for every text, as bits per character compare within a text only."""
    from tarflowlm.evaluation.likelihood import sign_of
    from tarflowlm.runs.records import read_record

    rows = []
    broken = []
    for name, path in _find(directories).items():
        try:
            rows.append(_row(read_record(path, name)))
        except (UserError, OSError) as error:
            reason = first_line(error).removeprefix(f"{path} ").removeprefix(f"{path}/")
            broken.append({"name": name, "directory": str(path), "state": reason, "best": False})
    text = itemgetter("source", "normalize", "unwrap")
    rows.sort(key=lambda row: (*text(row), row["bpc"] is None, row["bpc"] or 0.0, row["name"]))
    groups = [list(group) for _, group in groupby(rows, text)]
    for group in groups:
        known = [row for row in group if row["bpc"] is not None]
        if len(known) > 1:
            # a test, if there is one, says more than a validation
            next((row for row in known if row["split"] == "test"), known[0])["best"] = True
    if as_json:
        empty: dict[str, Any] = dict.fromkeys(rows[0]) if rows else {}
        print_json({"runs": rows + [empty | row for row in broken]})
        return
    for group in groups:
        source, normalize, unwrap = text(group[0])
        how = " in text8" if normalize == "text8" else ""
        how += ", unwrapped" if unwrap else ""
        title = f"runs on {Path(source).name}{how}: bits per character (bpc) and more"
        columns = ["", "bpc", "tokens", "time", "state"]
        table = []
        for row in group:
            bits = "" if row["bpc"] is None else f"{sign_of(row['bound'])} {row['bpc']:.4f}"
            bits += " v" if row["split"] == "valid" else ""
            bits += " *" if row["best"] else ""
            spent = str(timedelta(seconds=round(row["seconds"])))
            table.append([row["name"], bits, f"{row['tokens'] / 1e6:.2f}M", spent, row["state"]])
        print_table(title, table, columns)
    for row in broken:
        sys.stdout.write(f"{row['name']}: {row['state']}\n")
    if any(row["best"] for row in rows):
        print_notice("* the fewest bits per character on its text, by the test if there is one")
    if any(row["split"] == "valid" for row in rows):
        print_notice("v: the best validation so far, over fewer windows than a test")


def _find(directories: Sequence[Path]) -> dict[str, Path]:
    """Name -> run directory; models that were exported from runs are left out."""
    from tarflowlm.runs.records import DEPTH, find_runs, is_export

    found: dict[str, Path] = {}
    known = set()
    for folder in directories:
        below = [path for path in find_runs(folder) if not is_export(path)]
        if not below:
            remedy = "give a directory made by `tarflowlm train`"
            raise UserError(f"{folder} holds no run within {DEPTH} levels: {remedy}")
        for path in below:
            place = path.resolve()
            if place in known:
                continue
            known.add(place)
            name = folder.resolve().name if path == folder else str(path.relative_to(folder))
            found[next(one for one in (name, str(path), str(place)) if one not in found)] = path
    return found


def _row(record: "RunRecord") -> dict[str, Any]:
    """A run as `--json` shows it, by its test if it has one, else by its best validation."""
    data = record.run.data
    row = {
        "name": record.name,
        "directory": str(record.directory),
        "state": record.status,
        "preset": record.run.name,
        "source": data.source,
        "normalize": data.tokenizer.normalization,
        "unwrap": data.unwrap,
        "bpc": min(record.valid["bpc"].tolist(), default=None),
        "split": "valid" if len(record.valid["bpc"]) else "",
        "bound": record.run.model.bound,
        "tokens": int(record.train["tokens"][-1]),
        "seconds": float(record.train["seconds"][-1]),
        "best": False,
    }
    done = record.summary
    if done is not None:
        row |= {"bpc": done["test"]["bpc"], "split": "test"}
        row |= {"tokens": done["tokens"], "seconds": done["seconds"]}
    return row
