"""Reading a run directory for a report: finished, still in training, or incomplete."""

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tarflowlm.config import RunConfig
from tarflowlm.errors import UserError
from tarflowlm.files import read_json
from tarflowlm.runs.checkpoint import SUMMARY, WEIGHTS, read_run
from tarflowlm.training.metrics import METRICS

Series = npt.NDArray[np.float64]

NEEDED = {
    "train": ("step", "tokens", "block", "bpc", "lr", "grad_norm", "tokens_per_second"),
    "valid": ("step", "tokens", "bpc"),
}


@dataclass(frozen=True)
class RunRecord:
    """All of a run but its weights."""

    name: str
    directory: Path
    run: RunConfig
    train: dict[str, Series]
    """Columns of the training lines of metrics.jsonl."""
    valid: dict[str, Series]
    """Columns of its validation lines."""
    summary: dict[str, Any] | None
    """None until the run is finished."""
    notes: list[str] = field(default_factory=list)

    @property
    def slug(self) -> str:
        """The name as part of file names and ids."""
        return slug(self.name)

    @property
    def is_exact(self) -> bool:
        """Whether the likelihood is exact and not a bound."""
        return self.run.model.family == "ar"

    @property
    def sign(self) -> str:
        """How to print the run's numbers: = for exact ones, <= for upper bounds."""
        return "=" if self.is_exact else "<="

    @property
    def has_log(self) -> bool:
        """Whether there are training lines; the copy of a model alone has none."""
        return len(self.train["step"]) > 0

    @property
    def last_step(self) -> int:
        """The last step with a training line."""
        return int(self.train["step"].max())

    @property
    def status(self) -> str:
        """Finished, or how far the training is."""
        if self.summary is not None:
            return "finished"
        if not self.has_log:
            return "a model without its training log"
        return f"step {self.last_step:,} of {self.run.train.num_steps:,}: in training, or stopped"

    @cached_property
    def seconds(self) -> Series:
        """Training time up to every training line, from the logged speeds."""
        tokens = np.diff(self.train["tokens"], prepend=0)
        return np.cumsum(tokens / self.train["tokens_per_second"])

    @property
    def valid_seconds(self) -> Series:
        """Training time at every validation line."""
        return np.interp(self.valid["step"], self.train["step"], self.seconds)

    @property
    def stage_starts(self) -> list[tuple[int, float, float]]:
        """Block, tokens and seconds at the start of each stage but the first."""
        block = self.train["block"]
        return [
            (int(block[i + 1]), float(self.train["tokens"][i]), float(self.seconds[i]))
            for i in np.flatnonzero(np.diff(block))
        ]

    def stage_medians(self, column: str) -> list[float]:
        """The median of a training column in every stage."""
        block = self.train["block"]
        return [float(np.median(self.train[column][block == b])) for b in np.unique(block)]


def slug(name: str) -> str:
    """A name without the characters that file names and ids cannot have."""
    return re.sub(r"[^\w.-]+", "_", name)


def read_records(directories: Sequence[Path]) -> list[RunRecord]:
    """The runs in `directories`, named after these.

    Raises UserError if one is neither a run with metrics nor a model, or if two have the same name.
    """
    records: dict[str, RunRecord] = {}
    for directory in directories:
        record = read_record(directory)
        if (other := records.get(record.slug)) is not None:
            raise UserError(
                f"{other.directory} and {directory} have the same name {record.name!r}: give each run once, "
                f"or rename one of the directories"
            )
        records[record.slug] = record
    return list(records.values())


def read_record(directory: Path) -> RunRecord:
    """The run in a directory. A model that came without its log is a run without lines.

    Raises UserError if it is not a run directory, or if its training has not logged anything yet.
    """
    run = read_run(directory)
    notes: list[str] = []
    train, valid = _read_metrics(directory, notes)
    summary = None
    if (directory / SUMMARY).exists():
        try:
            summary = read_json(directory / SUMMARY)
            float(summary["test"]["bpc"])
        except (UserError, KeyError, TypeError, ValueError) as error:
            notes.append(f"{SUMMARY} cannot be used ({error}).")
            summary = None
    return RunRecord(directory.resolve().name, directory, run, train, valid, summary, notes)


def _read_metrics(directory: Path, notes: list[str]) -> tuple[dict[str, Series], dict[str, Series]]:
    path = directory / METRICS
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
    rows: dict[str, list[dict[str, float]]] = {"train": [], "valid": []}
    bad = 0
    for number, line in enumerate(lines, 1):
        row = _parsed(line)
        if row is not None:
            # other kinds of lines are not drawn
            rows.get(row["split"], []).append(row)
        elif number < len(lines):  # the last one may still be incomplete
            bad += 1
    if bad:
        notes.append(f"{bad} of {len(lines)} lines of {METRICS} could not be read and are left out.")
    if not rows["train"] and (path.exists() or not (directory / WEIGHTS).exists()):
        raise UserError(f"{directory} has no metrics yet: wait until training has logged its first line")
    columns = [{key: np.array([row[key] for row in rows[s]], float) for key in NEEDED[s]} for s in ("train", "valid")]
    return columns[0], columns[1]


def _parsed(line: str) -> dict[str, Any] | None:
    """A line of metrics, or None if it is incomplete or not finite."""
    try:
        row = json.loads(line)
        needed = NEEDED.get(row["split"], ())
        return row if all(math.isfinite(row[key]) for key in needed) and row.get("tokens_per_second", 1) > 0 else None
    except (ValueError, KeyError, TypeError):
        return None
