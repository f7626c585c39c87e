"""Run directories without their weights: find them, and read a run's log and results."""

import json
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from tarflowlm.config import RunConfig
from tarflowlm.errors import UserError
from tarflowlm.files import is_written
from tarflowlm.runs import CONFIG, METRICS, WEIGHTS
from tarflowlm.runs.checkpoint import Summary, read_run, read_summary, resume_command

Series = npt.NDArray[np.float64]

DEPTH = 2  # levels below a folder at which runs are looked for
COLUMNS = {
    "train": ("step", "tokens", "block", "bpc", "tokens_per_second"),
    "valid": ("step", "tokens", "bpc"),
}
"""The columns of metrics.jsonl that are read, by the split of their lines."""


def find_runs(folder: Path, depth: int = DEPTH) -> list[Path]:
    """The run directories in a folder, at most `depth` levels down, sorted; or the folder itself.

    A directory with any of a run's files counts, so that a damaged run is found and can be named.
    """
    if any((folder / name).is_file() for name in (CONFIG, WEIGHTS, METRICS)):
        return [folder]
    if depth == 0 or not folder.is_dir():
        return []
    below = [path for path in sorted(folder.iterdir()) if not path.name.startswith(".")]
    return [run for path in below for run in find_runs(path, depth - 1)]


def is_export(directory: Path) -> bool:
    """Whether a directory holds a model without the log of its training."""
    return (directory / WEIGHTS).is_file() and not (directory / METRICS).is_file()


@dataclass(frozen=True)
class RunRecord:
    """A run without its weights."""

    name: str
    directory: Path
    run: RunConfig
    train: dict[str, Series]
    """Columns of its training lines, and `seconds`, the time up to each. An export has no lines."""
    valid: dict[str, Series]
    """Columns of its validation lines, and `seconds`."""
    texts: list[str]
    """What it wrote at each validation; empty where it wrote nothing."""
    summary: Summary | None
    """None until the run is finished."""
    notes: list[str] = field(default_factory=list)
    """Remarks of a reader about missing pieces."""

    @property
    def valid_bpc(self) -> float | None:
        """Validation bits per character: of the saved weights, or before the end the last ones."""
        if self.summary is not None:
            return float(self.summary["stage_valid_bpc"][-1])
        return float(self.valid["bpc"][-1]) if len(self.valid["bpc"]) > 0 else None

    @property
    def has_log(self) -> bool:
        return len(self.train["step"]) > 0

    @property
    def status(self) -> str:
        """The state of the run, in words."""
        if self.summary is not None:
            return "finished"
        if not self.has_log:
            return "a model without its training log"
        step, total = int(self.train["step"][-1]), self.run.train.num_steps
        # unknown before the end of a run with a time limit, or one that a block has left
        steps = "" if self.run.train.minutes or step > total else f" of {total:,}"
        states = {True: "training now", False: "stopped", None: "unfinished"}
        return f"{states[is_written(self.directory)]}, step {step:,}{steps}"


def read_record(directory: Path, name: str = "") -> RunRecord:
    """The run in a directory, named after it by default.

    UserError if it is not a run directory, or if the training has not logged anything yet.
    """
    run = read_run(directory, is_shown=True)
    path = directory / METRICS
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    lines = []
    for line in text.splitlines():
        with suppress(ValueError):  # the last line may be incomplete
            lines.append(json.loads(line))
    columns = []
    try:
        for split, names in COLUMNS.items():
            rows = [line for line in lines if line["split"] == split]
            columns.append({name: np.array([row[name] for row in rows], float) for name in names})
    except (TypeError, LookupError, ValueError):
        raise UserError(f"{path} is damaged: restore it, or remove it for a run without") from None
    train, valid = columns
    texts = [str(line.get("text", "")) for line in lines if line["split"] == "valid"]
    steps, speed = np.diff(train["tokens"], prepend=0), train["tokens_per_second"]
    # the first step of a compiled run is not timed
    seconds = np.cumsum(np.divide(steps, speed, out=np.zeros_like(speed), where=speed > 0))
    train["seconds"] = seconds
    valid["seconds"] = np.interp(valid["step"], [0, *train["step"]], [0, *seconds])
    if len(seconds) == 0 and not is_export(directory):
        remedy = f"wait, or continue it by `{resume_command(directory)}`"
        raise UserError(f"{directory} has no logged step yet: {remedy}")
    name = name or directory.resolve().name
    return RunRecord(name, directory, run, train, valid, texts, read_summary(directory))
