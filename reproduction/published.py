"""What a preset should give: the curves beside which a run is shown, and the table of the FAQ.

    python -m reproduction.published                      # of the records and the shipped models
    python -m reproduction.published runs/english-small   # and of finished runs, by their presets

It writes published.json, for `reproduction.beside`, and prints the tables of docs/faq.md and
docs/leaderboard.md. A curve is the validation of seed 0: tokens, and bits per character. Of a run
whose log is gone, only the ends of its stages are left. Memory and samples a second come from
docs/reproduce/presets.csv (benchmarks/presets.py).
"""

import csv
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

from reproduction.records import Records
from tarflowlm.config import TrainConfig
from tarflowlm.errors import UserError
from tarflowlm.evaluation.likelihood import sign_of
from tarflowlm.files import replacing
from tarflowlm.presets import PRESETS, preset
from tarflowlm.runs import METRICS
from tarflowlm.runs.checkpoint import Summary, read_run, read_summary
from tarflowlm.runs.hub import folder_of, released

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "docs" / "reproduce"
CURVES = Path(__file__).with_name("published.json")
MEASURED = FOLDER / "presets.csv"


class Published(NamedTuple):
    """A training of seed 0 of a preset."""

    summary: Summary
    points: dict[int, float]
    """Tokens -> validation, in bits per character."""

    @property
    def curve(self) -> list[tuple[int, float]]:
        return [(at, round(bpc, 4)) for at, bpc in sorted(self.points.items()) if at]


def ends_of_stages(train: TrainConfig, summary: Summary) -> dict[int, float]:
    """The last validation of every stage."""
    bits = summary["stage_valid_bpc"]
    if train.minutes or len(train.stage_steps) != len(bits):
        return {summary["tokens"]: bits[-1]}
    each = summary["tokens"] // summary["steps"]
    ends = [each * steps for steps in accumulate(train.stage_steps)]
    return dict(zip(ends, bits, strict=True))


def of_records(folder: Path) -> dict[str, Published]:
    """The recorded trainings that are what a preset trains today."""
    records = Records(folder)
    found = {}
    for name in PRESETS:
        run = preset(name)
        # recipes keep idle blocks, which changes no bits
        keeps = run.num_stages > 1 and run.train.mode == "progressive"
        try:
            recorded = replace(run, train=replace(run.train, keep_idle=keeps))
            record = records.find(f"{name}-s0", recorded)
        except UserError as error:
            print(f"left out: {error}", file=sys.stderr)
            continue
        if record is not None:
            summary = record.summary
            points = ends_of_stages(run.train, summary)
            for key, value in record.measured.get("curves", {}).items():
                if (at := re.fullmatch(r"valid bpc at ([\d,]+)", key)) is not None:
                    step = int(at[1].replace(",", ""))
                    points[step * summary["tokens"] // summary["steps"]] = value
            found[name] = Published(summary, points)
    return found


def of_run(directory: Path) -> dict[str, Published]:
    """A finished run or a shipped model, by its preset."""
    run, summary = read_run(directory), read_summary(directory)
    if summary is None:
        raise UserError(f"{directory} is not finished: give a run with a summary.json")
    points = ends_of_stages(run.train, summary)
    log = directory / METRICS
    for line in log.read_text(encoding="utf-8").splitlines() if log.exists() else ():
        row = json.loads(line)
        if row["split"] == "valid":
            points[row["tokens"]] = row["bpc"]
    return {run.name: Published(summary, points)}


def table(found: dict[str, Published], measured: dict[str, dict[str, str]]) -> list[str]:
    """The table of presets, in Markdown."""
    columns = ["preset", "tokens", "minutes", "validation", "test"]
    names = {"MB": "memory, MB", "samples/s": "samples a second"}
    known = [key for key in names if any(row.get(key) for row in measured.values())]
    lines = [columns + [names[key] for key in known]]
    lines += [["---"] * len(lines[0])]
    for name in filter(found.__contains__, PRESETS):
        summary, test = found[name].summary, found[name].summary["test"]
        sign = "" if sign_of(test["bound"]) == "=" else "<= "
        cells = [f"`{name}`", f"{summary['tokens'] / 1e6:.1f} M", f"{summary['seconds'] / 60:.0f}"]
        cells += [f"{sign}{found[name].curve[-1][1]:.3f}", f"{sign}{test['bpc']:.3f}"]
        lines.append(cells + [measured.get(name, {}).get(key, "") for key in known])
    return [f"| {' | '.join(cells)} |" for cells in lines]


ENTRIES = {
    "letters, 10 minutes": {
        "mini-passes-s1": "mini-passes --seed 1",
        "mini-ar-x1of2-s1": "mini-ar --steps 1300 --seed 1",
        "mini-mixd-p2-s0": "mini-mixd-p2",
    },
    "pieces, unlimited": {
        "english-small": "english-small",
        "english-small-ar-s0": "english-small-ar",
    },
    "letters, unlimited": {
        "mini-ar-x2-s0": "mini-ar --steps 5200",
        "mini-mixd-x2-s0": "mini-mixd --steps 6400",
    },
}
"""Tracks of the leaderboard -> a record or a shipped model, and the words of its command."""


FAST = "Intel(R) Xeon(R) Processor"
SHIPPED = "AMD EPYC, bfloat16"
"""The machine of the shipped models that have no record."""


def leaderboard() -> list[str]:
    """Our entries in docs/leaderboard.md, in Markdown."""
    records = {record.name: record for record in Records(FOLDER)}
    lines = [["track", "test", "tokens", "wall min", "command: `tarflowlm train ...`", "machine"]]
    lines += [["---"] * len(lines[0])]
    for track, entries in ENTRIES.items():
        for name, words in entries.items():
            record = records.get(name)
            summary = read_summary(folder_of(name)) if record is None else record.summary
            assert summary is not None
            test = summary["test"]
            sign = "" if sign_of(test["bound"]) == "=" else "<= "
            machine = SHIPPED if record is None else record.machine.split(",")[0]
            # `auto` is bfloat16 there
            machine = "Intel Xeon with AMX, bfloat16" if machine == FAST else machine
            cells = [track, f"{sign}{test['bpc']:.4f}", f"{summary['tokens'] / 1e6:.1f} M"]
            cells += [f"{summary['wall_seconds'] / 60:.0f}", f"`{words}`"]
            lines.append([*cells, machine.replace("(R)", "").replace(" Processor", "")])
    return [f"| {' | '.join(cells)} |" for cells in lines]


def all_published(runs: Sequence[str] = ()) -> dict[str, Published]:
    """By preset: of `runs`, else of the records, else of shipped models."""
    found: dict[str, Published] = {}
    for name in released():
        found |= of_run(folder_of(name))
    found |= of_records(FOLDER)
    for run in runs:
        found |= of_run(folder_of(run))
    return {name: found[name] for name in PRESETS if name in found}


def read_measured() -> dict[str, dict[str, Any]]:
    with MEASURED.open(encoding="utf-8", newline="") as lines:
        return {row["preset"]: row for row in csv.DictReader(lines)}


def main() -> None:
    found = all_published(sys.argv[1:])
    curves = {name: one.curve for name, one in found.items()}
    with replacing(CURVES) as temporary:
        lines = [f"{json.dumps(name)}: {json.dumps(curve)}" for name, curve in curves.items()]
        temporary.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
    print("\n".join([*table(found, read_measured()), "", *leaderboard()]))


if __name__ == "__main__":
    main()
