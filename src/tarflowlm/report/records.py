"""Reading a run directory for a report: finished, still in training, or incomplete."""

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tarflowlm.config import RunConfig
from tarflowlm.errors import UserError
from tarflowlm.runs.checkpoint import SUMMARY, WEIGHTS, read_run, read_summary
from tarflowlm.training.metrics import METRICS

Series = npt.NDArray[np.float64]

COLUMNS = {
    "train": ("step", "tokens", "block", "bpc", "lr", "grad_norm", "tokens_per_second"),
    "valid": ("step", "tokens", "bpc"),
}
"""Columns of metrics.jsonl that a report reads, by split."""


@dataclass(frozen=True)
class RunRecord:
    """A run without its weights."""

    name: str
    directory: Path
    run: RunConfig
    train: dict[str, Series]
    """Columns of the training lines of metrics.jsonl, and `seconds`: training time up to each line."""
    valid: dict[str, Series]
    """Columns of its validation lines, and `seconds`."""
    summary: dict[str, Any] | None
    """None until the run is finished."""
    notes: list[str] = field(default_factory=list)

    @property
    def slug(self) -> str:
        """The name without the characters that file names and ids cannot have."""
        return re.sub(r"[^\w.-]+", "_", self.name)

    @property
    def is_exact(self) -> bool:
        """The likelihood is exact, not a bound."""
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

    @property
    def seconds(self) -> Series:
        """Training time up to every training line."""
        return self.train["seconds"]

    @property
    def stage_starts(self) -> list[tuple[int, int]]:
        """For each stage but the first: its block, and the index of the last training line before it."""
        block = self.train["block"]
        return [(int(block[line + 1]), int(line)) for line in np.flatnonzero(np.diff(block))]

    def stage_medians(self, column: str) -> list[float]:
        """The median of a training column in every stage."""
        block = self.train["block"]
        return [float(np.median(self.train[column][block == b])) for b in np.unique(block)]


def read_records(directories: Sequence[Path]) -> list[RunRecord]:
    """The runs in `directories`. Raises UserError as `read_record`, and if two runs have the same name."""
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
    """The run in a directory, named after it. A model without its log is a run without lines.

    Raises UserError if it is not a run directory, or if its training has not logged anything yet.
    """
    run = read_run(directory)
    notes: list[str] = []
    train, valid = _read_metrics(directory, notes)
    train["seconds"] = np.cumsum(np.diff(train["tokens"], prepend=0) / train["tokens_per_second"])
    if not len(train["step"]) and ((directory / METRICS).exists() or not (directory / WEIGHTS).exists()):
        raise UserError(f"{directory} has no metrics yet: wait until training has logged its first line")
    valid["seconds"] = (
        np.interp(valid["step"], train["step"], train["seconds"]) if len(train["step"]) else np.zeros(0)
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
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
    rows: dict[str, list[dict[str, float]]] = {"train": [], "valid": []}
    bad = 0
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            if not all(math.isfinite(row[key]) for key in COLUMNS.get(row["split"], ())):
                raise ValueError(line)
            # other kinds of lines are not drawn
            rows.get(row["split"], []).append(row)
        except (ValueError, KeyError, TypeError):
            bad += number < len(lines)  # the last one may still be incomplete
    if bad:
        notes.append(f"{bad} of {len(lines)} lines of {METRICS} could not be read and are left out.")
    train, valid = ({key: np.array([row[key] for row in rows[s]], float) for key in COLUMNS[s]} for s in COLUMNS)
    return train, valid
