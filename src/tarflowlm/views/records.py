"""Reading run directories for a report, finished, in training, or incomplete; and tables about
them.
"""

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tarflowlm.config import RunConfig
from tarflowlm.errors import UserError
from tarflowlm.locks import writer_of
from tarflowlm.runs.checkpoint import SUMMARY, WEIGHTS, read_run, read_summary
from tarflowlm.schema import flatten
from tarflowlm.training.metrics import METRICS

Series = npt.NDArray[np.float64]

COLUMNS = {  # of metrics.jsonl that a report reads, by split
    "train": ("step", "tokens", "block", "bpc", "lr", "grad_norm", "tokens_per_second"),
    "valid": ("step", "tokens", "bpc"),
}
PLAIN = {
    "parameters": "parameters",
    "of them in Transformers": "trunk_parameters",
    "device": "device",
}
PLAIN |= {"threads": "threads", "machine": "machine", "PyTorch": "torch"}
"""Rows of the summary that show a value of summary.json as it is."""


@dataclass(frozen=True)
class RunRecord:
    """A run without its weights."""

    name: str
    directory: Path
    run: RunConfig
    train: dict[
        str, Series
    ]  # columns of the training lines of metrics.jsonl, and `seconds`, the time up to each
    valid: dict[str, Series]  # columns of its validation lines, and `seconds`
    summary: dict[str, Any] | None  # None until the run is finished
    notes: list[str] = field(default_factory=list)

    @property
    def slug(self) -> str:
        """The name without the characters that file names and ids cannot have."""
        return re.sub(r"[^\w.-]+", "_", self.name)

    @property
    def is_exact(self) -> bool:
        return self.run.model.family == "ar"

    @property
    def sign(self) -> str:
        """Precedes the run's numbers: = for exact ones, <= for upper bounds."""
        return "=" if self.is_exact else "<="

    @property
    def has_log(self) -> bool:
        """There are training lines; an exported model has none."""
        return len(self.train["step"]) > 0

    @property
    def last_step(self) -> int:
        return int(self.train["step"].max())

    @property
    def status(self) -> str:
        if self.summary is not None:
            return "finished"
        if not self.has_log:
            return "a model without its training log"
        # the steps of a run with a time limit are not known before its end
        steps = "" if self.run.train.minutes else f" of {self.run.train.num_steps:,}"
        return f"{'training now' if writer_of(self.directory) else 'stopped'}, step {self.last_step:,}{steps}"

    @property
    def stage_starts(self) -> list[tuple[int, int]]:
        """For each stage but the first: its block, and the index of the last training line before
        it.
        """
        block = self.train["block"]
        return [(int(block[line + 1]), int(line)) for line in np.flatnonzero(np.diff(block))]

    def stage_medians(self, column: str) -> list[float]:
        """The median of a training column in every stage."""
        block = self.train["block"]
        return [float(np.median(self.train[column][block == b])) for b in np.unique(block)]

    @property
    def speeds(self) -> str:
        """The median tokens per second of every stage."""
        return ", ".join(f"{speed:,.0f}" for speed in self.stage_medians("tokens_per_second"))


def read_records(directories: Sequence[Path]) -> list[RunRecord]:
    """The runs in `directories`. Raises UserError as `read_record`, and if two runs have the same
    name.
    """
    records: dict[str, RunRecord] = {}
    for record in map(read_record, directories):
        if (other := records.get(record.slug)) is not None:
            both = f"{other.directory} and {record.directory} have the same name {record.name!r}"
            raise UserError(f"{both}: give each run once, or rename one of the directories")
        records[record.slug] = record
    return list(records.values())


def read_record(directory: Path) -> RunRecord:
    """The run in a directory, named after it. A model without its log is a run without lines.
    UserError for what is no run directory, and for a training that has not logged anything yet.
    """
    run = read_run(directory)
    notes: list[str] = []
    train, valid = _read_metrics(directory, notes)
    train["seconds"] = np.cumsum(np.diff(train["tokens"], prepend=0) / train["tokens_per_second"])
    has_log = len(train["step"]) > 0
    if not has_log and ((directory / METRICS).exists() or not (directory / WEIGHTS).exists()):
        if writer_of(directory):
            raise UserError(
                f"{directory} has just begun: wait until training has logged its first line"
            )
        raise UserError(
            f"{directory} stopped before its first logged step: `tarflowlm train --resume {directory}`"
        )
    valid["seconds"] = (
        np.interp(valid["step"], train["step"], train["seconds"]) if has_log else np.zeros(0)
    )
    summary = None
    try:
        if (found := read_summary(directory)) is not None and math.isfinite(found["test"]["bpc"]):
            summary = found
    except (UserError, KeyError, TypeError) as error:
        notes.append(f"{SUMMARY} cannot be used ({error}).")
    return RunRecord(directory.resolve().name, directory, run, train, valid, summary, notes)


def _read_metrics(directory: Path, notes: list[str]) -> tuple[dict[str, Series], dict[str, Series]]:
    """The columns of training and of validation lines; unreadable lines are counted in `notes`."""
    path = directory / METRICS
    lines = (
        path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
    )
    rows: dict[str, list[dict[str, float]]] = {"train": [], "valid": []}
    bad = 0
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            if not all(math.isfinite(row[key]) for key in COLUMNS.get(row["split"], ())):
                raise ValueError(line)
            rows.get(row["split"], []).append(row)  # other kinds of lines are not drawn
        except (ValueError, KeyError, TypeError):
            bad += number < len(lines)  # the last one may still be incomplete
    if bad:
        notes.append(
            f"{bad} of {len(lines)} lines of {METRICS} could not be read and are left out."
        )
    train, valid = (
        {key: np.array([row[key] for row in rows[s]], float) for key in COLUMNS[s]} for s in COLUMNS
    )
    return train, valid


def table_html(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells under a head; the first cell of a row is its name."""
    top = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    body = ""
    for name, *cells in rows:
        body += f"<tr><th>{escape(name)}</th>{''.join(f'<td>{escape(cell)}</td>' for cell in cells)}</tr>\n"
    return f'<div class="table"><table>\n<thead><tr>{top}</tr></thead>\n<tbody>\n{body}</tbody></table></div>\n'


def runs_table(records: Sequence[RunRecord], columns: Sequence[dict[str, str]]) -> str:
    """One column per run, one row per key in the order of first appearance; a dash where a run has
    no value.
    """
    names = dict.fromkeys(name for column in columns for name in column)
    rows = [(name, *(column.get(name, "–") or "–" for column in columns)) for name in names]
    return table_html(
        ["", *(r.name for r in records)], [row for row in rows if set(row[1:]) != {"–"}]
    )


def summary_of(record: RunRecord) -> dict[str, str]:
    """Results, text, size and machine of a run: a column of `runs_table`."""
    done = record.summary or {}
    test, bpc = done.get("test", {}), record.valid["bpc"]
    bits = f"{record.sign} {test['bpc']:.4f} ({test.get('bound', 'bound unknown')})" if test else ""
    valid = (
        f"{record.sign} {bpc[-1]:.4f} at step {int(record.valid['step'][-1]):,}" if len(bpc) else ""
    )
    nats = ""
    if {"nats_per_token", "stderr"} <= test.keys():
        # the standard error of a single window is not a number
        error = f" ± {test['stderr']:.4f}" if math.isfinite(test["stderr"]) else ""
        nats = f"{record.sign} {test['nats_per_token']:.4f}{error}"
    stages = ", ".join(f"{bpc:.4f}" for bpc in done.get("stage_valid_bpc", []))
    return {
        "status": record.status,
        "test, bits per character": bits,
        "test, nats per token, standard error": nats,
        "validation, bits per character": valid,
        "validation after each stage": stages and f"{record.sign} {stages}",
        "preset, seed": f"{record.run.name}, {record.run.seed}",
        "text": Path(record.run.data.source).name,
        "steps": f"{record.last_step:,}" if record.has_log else "",
        "tokens": f"{int(record.train['tokens'].max()):,}" if record.has_log else "",
        "training, seconds": f"{record.train['seconds'][-1]:,.0f}" if record.has_log else "",
        "tokens per second, median of each stage": record.speeds,
        **{label: _plain(done.get(key)) for label, key in PLAIN.items()},
    }


def _plain(value: Any) -> str:
    return "" if value is None else f"{value:,}" if isinstance(value, int) else str(value)


def config_table(records: Sequence[RunRecord]) -> str:
    """Every field of the configurations by its dotted name; fields in which the runs differ come
    first.
    """
    flat = [flatten(r.run) for r in records]
    names = list(dict.fromkeys(name for one in flat for name in one))
    names.sort(key=lambda name: all(name in one and one[name] == flat[0].get(name) for one in flat))
    found = [[(name, one[name]) for name in names if name in one] for one in flat]
    columns = [
        {name: ", ".join(map(str, x)) if isinstance(x, list) else str(x) for name, x in one}
        for one in found
    ]
    return runs_table(records, columns)
