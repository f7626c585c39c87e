"""Training runs side by side, for `tarflowlm info` and its short form `tarflowlm runs`."""

import statistics
import sys
from collections.abc import Sequence
from datetime import timedelta
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tarflowlm.errors import UserError, first_line
from tarflowlm.schema import flatten, to_dict
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
        _keep_differing(group)
        known = [row for row in group if row["bpc"] is not None]
        # equals: the tests, or the validations if a run has no test yet
        measure = "bpc" if all(row["split"] == "test" for row in known) else "valid_bpc"
        measured = [row for row in known if row[measure] is not None]
        if len(known) > 1 and measured:
            min(measured, key=lambda row: (row[measure], row["split"]))["best"] = True
    if as_json:
        empty: dict[str, Any] = dict.fromkeys(rows[0]) if rows else {}
        print_json({"runs": rows + [empty | row for row in broken]})
        return
    for group in groups:
        source, normalize, unwrap = text(group[0])
        how = " in text8" if normalize == "text8" else ""
        how += ", unwrapped" if unwrap else ""
        title = f"runs on {Path(source).name}{how}: bits per character (bpc) and more"
        shown = list(group[0]["settings"])
        hidden, shown = (shown, []) if len(shown) > MOST_SETTINGS else ([], shown)
        columns = ["", *map(_short, shown), "bpc", "tokens", "time", "state"]
        table = []
        for row in group:
            bits = "" if row["bpc"] is None else f"{sign_of(row['bound'])} {row['bpc']:.4f}"
            bits += " v" if row["split"] == "valid" else ""
            bits += " *" if row["best"] else ""
            spent = str(timedelta(seconds=round(row["seconds"])))
            settings = [
                "" if (value := row["settings"][name]) is None else f"{value}" for name in shown
            ]
            tokens = f"{row['tokens'] / 1e6:.2f}M"
            table.append([row["name"], *settings, bits, tokens, spent, row["state"]])
        print_table(title, table, columns)
        if hidden:
            print_notice(f"{len(hidden)} settings differ: --json lists them")
        _print_seeds(group)
    for row in broken:
        sys.stdout.write(f"{row['name']}: {row['state']}\n")
    if any(row["best"] for row in rows):
        print_notice("* the fewest bits per character on its text, by the tests if all have one")
    if any(row["split"] == "valid" for row in rows):
        print_notice("v: the best validation so far, over fewer windows than a test")


SEED = "seed"
MOST_SETTINGS = 6
"""More settings that differ are too many columns."""


def _keep_differing(group: Sequence[dict[str, Any]]) -> None:
    """Leave those settings of the runs on a text in which runs of one preset differ."""
    presets = {row["preset"] for row in group}
    differing = {"preset"} if len(presets) > 1 else set()
    for preset in presets:
        alike = [row["settings"] for row in group if row["preset"] == preset]
        names = set().union(*alike)
        differing |= {name for name in names if len({str(one.get(name)) for one in alike}) > 1}
    for row in group:
        known = row["settings"] | {"preset": row["preset"]}
        row["settings"] = {name: known.get(name) for name in sorted(differing)}


def _short(name: str) -> str:
    """The last part of a dotted name."""
    return name.rpartition(".")[2].replace("_", "-")


def _print_seeds(group: Sequence[dict[str, Any]]) -> None:
    """The mean and standard deviation of runs that differ in nothing but their seed."""

    def but_seed(row: dict[str, Any]) -> str:
        others = {name: value for name, value in row["settings"].items() if name != SEED}
        return f"{row['preset']} {row['split']} {others}"

    measured = sorted((row for row in group if row["bpc"] is not None), key=but_seed)
    for _, alike in groupby(measured, but_seed):
        rows = list(alike)
        seeds = sorted({row["settings"].get(SEED) for row in rows}, key=str)
        if len(seeds) == len(rows) > 1:
            bits = [row["bpc"] for row in rows]
            spread = f"{statistics.fmean(bits):.4f} ± {statistics.stdev(bits):.4f}"
            names = ", ".join(row["name"] for row in rows)
            print_notice(f"{spread} ({rows[0]['split']}) over {len(seeds)} seeds: {names}")


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
    # NaN under a tokenizer that loses characters
    valid = min((bpc for bpc in record.valid["bpc"].tolist() if bpc == bpc), default=None)
    row = {
        "name": record.name,
        "directory": str(record.directory),
        "state": record.status,
        "preset": record.run.name,
        "settings": flatten(to_dict(record.run)),
        "source": data.source,
        "normalize": data.tokenizer.normalization,
        "unwrap": data.unwrap,
        "bpc": valid,
        "valid_bpc": valid,
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
