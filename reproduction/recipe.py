"""A recipe: named trainings, numbers measured on them, and the page that shows the numbers."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from reproduction.records import Record, Records
from reproduction.settings import Settings
from tarflowlm.config import DataConfig, RunConfig
from tarflowlm.data import encode_text, prepare_corpus
from tarflowlm.data.windows import Array
from tarflowlm.errors import SILENT, Progress, UserError
from tarflowlm.runs import WEIGHTS
from tarflowlm.runs.checkpoint import Checkpoint, load_checkpoint
from tarflowlm_apps.report.style import Figure

T = TypeVar("T")

Row = dict[str, Any]
"""A row of the CSV: column name -> number or text."""

RUN_DETAILS = ("ppl", "stderr, nats", "tokens seen", "seconds")
"""Columns of `measures.summary_row` that only the CSV shows."""


def without(rows: Sequence[Row], columns: Sequence[str] = RUN_DETAILS) -> list[Row]:
    """The rows without some columns, as a table shows them."""
    return [{name: row[name] for name in row if name not in columns} for row in rows]


def no_table(_rows: Sequence[Row]) -> list[Row]:
    """No rows: the recipe has no table."""
    return []


@dataclass(frozen=True)
class Training:
    """One run directory. Recipes with a training of the same name share it."""

    name: str
    run: RunConfig
    label: str  # in tables and plots; the same for all seeds

    def directory(self, settings: Settings) -> Path:
        return settings.out / "runs" / self.name


def trainings(settings: Settings, runs: Mapping[str, RunConfig]) -> list[Training]:
    """One training for each label and seed; the directories are named after the runs."""
    found = []
    for label, run in runs.items():
        adapted = settings.adapt(run)
        for seed in range(settings.seeds):
            found.append(Training(f"{run.name}-s{seed}", replace(adapted, seed=seed), label))
    return found


def variant(run: RunConfig, suffix: str, **changes: Any) -> RunConfig:
    """The run with `suffix` added to its name and these fields of its model changed."""
    return replace(run, name=f"{run.name}-{suffix}", model=replace(run.model, **changes))


@dataclass(frozen=True)
class Finished:
    """A finished training."""

    training: Training
    directory: Path
    device: torch.device
    records: Records
    record: Record
    progress: Progress = SILENT

    def stage(self, name: str, total: int) -> Progress:
        """Begin a measurement of this training, of `total` parts; returns its progress."""
        self.progress.stage(f"{self.training.name}, {name}", total)
        return self.progress

    def measured(self, what: str, measure: Callable[[], T]) -> T:
        """The result of the measurement `what`, from the record if it is there: JSON values."""
        return self.records.measured(self.record, what, measure)

    def load(self) -> Checkpoint:
        """The trained model. UserError where only its record is left."""
        if not (self.directory / WEIGHTS).exists():
            name = self.training.name
            raise UserError(
                f"{name} is on record, but this page needs its weights: remove the line of {name} "
                f"from {self.records.path} to train it again"
            )
        return load_checkpoint(self.directory, self.device)

    def tokens(self, checkpoint: Checkpoint, source: str | None = None) -> Array:
        """The test split of the run's own text, or all of the text `source`."""
        if source is not None:
            return encode_text(DataConfig(source=source), checkpoint.tokenizer, "all")
        return prepare_corpus(checkpoint.run.data, checkpoint.tokenizer).split("test")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A table or figure."""

    name: str
    title: str
    claim: str
    """The paper's claim with its numbers, or the question where the paper makes none."""
    plan: Callable[[Settings], list[Training]]
    measure: Callable[[Settings, Sequence[Finished]], list[Row]]
    """All rows, as the CSV has them."""
    table: Callable[[Sequence[Row]], list[Row]] = without
    """The rows of the Markdown table."""
    below: Callable[[Sequence[Row], Path], str] | None = None
    """Markdown below the table; files that it links to are written into the folder."""
    draw: Callable[[Figure, Sequence[Row]], None] | None = None
    """Draws the rows into a figure of matplotlib."""
    size: tuple[float, float] = (7.0, 4.5)
    """Width and height of the figure in inches."""
    seeds: int = 1
    """Fewest seeds at mini scale: more than one where a claim hangs on less than 2 %."""
    obtain: Callable[[Settings], None] | None = None
    """Gets a text that is no corpus by name; UserError where it cannot be had."""
    clear: tuple[str, ...] = ()
    """Labels of trainings that need no further seed: far apart, or slow."""
    mini_only: bool = False
    """Whether it has no models of the paper's size."""

    def trainings(self, settings: Settings) -> list[Training]:
        """The plan with at least `seeds` seeds, except for the labels in `clear`."""
        least = self.seeds if settings.scale == "mini" else 1
        plan = self.plan(replace(settings, seeds=max(settings.seeds, least)))
        return [t for t in plan if t.label not in self.clear or t.run.seed < settings.seeds]
