"""Run directories without their weights: where they lie, and what a finished or running one says.

Reports, the studio, `tarflowlm runs` and the reproduction read runs here.
"""

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
from tarflowlm.locks import writer_of
from tarflowlm.runs.checkpoint import CONFIG, SUMMARY, WEIGHTS, read_run, read_summary
from tarflowlm.training.metrics import METRICS

Series = npt.NDArray[np.float64]

DEPTH = 2  # levels below a folder at which runs are looked for
COLUMNS = {
    "train": ("step", "tokens", "block", "bpc", "tokens_per_second"),
    "valid": ("step", "tokens", "bpc"),
}
"""The columns of metrics.jsonl that are read, by the split of their lines."""


def find_runs(folder: Path, depth: int = DEPTH) -> list[Path]:
    """The run directories in a folder, at most `depth` levels down, sorted; or the folder itself.

    A directory with any of a run's files is one, so that a damaged run is found and can be named.
    """
    if any((folder / name).is_file() for name in (CONFIG, WEIGHTS, METRICS)):
        return [folder]
    if depth == 0 or not folder.is_dir():
        return []
    below = [path for path in sorted(folder.iterdir()) if not path.name.startswith(".")]
    return [run for path in below for run in find_runs(path, depth - 1)]


@dataclass(frozen=True)
class RunRecord:
    """A run without its weights."""

    name: str
    directory: Path
    run: RunConfig
    train: dict[str, Series]
    """Columns of the training lines of metrics.jsonl, and `seconds`, the time up to each."""
    valid: dict[str, Series]
    """Columns of its validation lines, and `seconds`."""
    summary: dict[str, Any] | None  # None until the run is finished
    notes: list[str] = field(default_factory=list)

    @property
    def slug(self) -> str:
        """The name without the characters that file names and ids cannot have."""
        return re.sub(r"[^\w.-]+", "_", self.name)

    @property
    def is_exact(self) -> bool:
        """Whether the run's numbers are likelihoods, not bounds."""
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
        """The last logged step."""
        return int(self.train["step"].max())

    @property
    def last_token(self) -> int:
        """The tokens seen by the last logged step."""
        return int(self.train["tokens"].max())

    @property
    def status(self) -> str:
        """Where the run stands, in words."""
        if self.summary is not None:
            return "finished"
        if not self.has_log:
            return "a model without its training log"
        # the steps of a run with a time limit are not known before its end
        steps = "" if self.run.train.minutes else f" of {self.run.train.num_steps:,}"
        state = "training now" if writer_of(self.directory) else "stopped"
        return f"{state}, step {self.last_step:,}{steps}"

    @property
    def stage_starts(self) -> list[tuple[int, int]]:
        """The block of each stage but the first, and the index of the last training line before."""
        block = self.train["block"]
        return [(int(block[line + 1]), int(line)) for line in np.flatnonzero(np.diff(block))]

    def stage_medians(self, column: str) -> list[float]:
        """The median of a training column in every stage."""
        block = self.train["block"]
        return [float(np.median(self.train[column][block == b])) for b in np.unique(block)]


def read_records(directories: Sequence[Path]) -> list[RunRecord]:
    """The runs in `directories`. UserError as `read_record`, and if two have the same name."""
    records: dict[str, RunRecord] = {}
    for record in map(read_record, directories):
        if (other := records.get(record.slug)) is not None:
            both = f"{other.directory} and {record.directory} have the same name {record.name!r}"
            raise UserError(f"{both}: give each run once, or rename one of the directories")
        records[record.slug] = record
    return list(records.values())


def read_record(directory: Path) -> RunRecord:
    """The run in a directory, named after it. A model without its log is a run without lines.

    UserError for what is not a run directory, and for a training that has not logged anything yet.
    """
    run = read_run(directory)
    notes: list[str] = []
    train, valid = _read_metrics(directory, notes)
    train["seconds"] = np.cumsum(np.diff(train["tokens"], prepend=0) / train["tokens_per_second"])
    valid["seconds"] = np.zeros(0)
    if len(train["step"]) > 0:
        valid["seconds"] = np.interp(valid["step"], train["step"], train["seconds"])
    elif (directory / METRICS).exists() or not (directory / WEIGHTS).exists():
        if writer_of(directory):
            raise UserError(
                f"{directory} has just begun: wait until training has logged its first line"
            )
        remedy = f"`tarflowlm train --resume {directory}`"
        raise UserError(f"{directory} stopped before its first logged step: {remedy}")
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
    lines = []
    if path.is_file():
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
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
        {key: np.array([row[key] for row in rows[split]], float) for key in keys}
        for split, keys in COLUMNS.items()
    )
    return train, valid
