"""What a recipe is: named trainings, then rows of numbers measured on them, and how they are drawn."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from tarflowlm.data import TokenArray, cached_corpus, encode_text_source
from tarflowlm.files import read_json
from tarflowlm.report.style import Figure
from tarflowlm.runs.checkpoint import Checkpoint, load_checkpoint
from tarflowlm.runs.config import RunConfig
from tarflowlm.runs.presets import with_steps
from tarflowlm.terminal.bars import StageProgress, no_progress, ticker
from tarflowlm.training.run import SUMMARY

Scale = Literal["mini", "paper"]
Row = dict[str, Any]
"""One line of the CSV and of the Markdown table: column name -> number or text."""
Draw = Callable[[Figure, Sequence[Row]], None]
"""Draws the rows into a matplotlib figure."""


@dataclass(frozen=True)
class Settings:
    """What the user chose."""

    scale: Scale
    out: Path
    data: str | None = None
    """Text of the mini scale; the default is that of the presets."""
    judge_data: str = "english"
    """What the judge of samples is trained on: another text than `data`."""
    second_text: str | None = None
    """Another text that the likelihood is measured on as well."""
    seeds: int = 1
    steps: int | None = None
    """Optimiser steps of every training, in place of the recipe's: for a quick look."""
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def adapt(self, run: RunConfig) -> RunConfig:
        """The run on the text, and with the steps, that the user gave. The paper's texts stay as they are."""
        if self.data is not None and self.scale == "mini":
            run = replace(run, data=replace(run.data, source=self.data))
        return run if self.steps is None else with_steps(run, self.steps)


@dataclass(frozen=True)
class Training:
    """One run directory. Recipes that name the same one share it."""

    name: str
    run: RunConfig
    label: str
    """In tables and plots; the same for all seeds."""


def trainings(settings: Settings, runs: Mapping[str, RunConfig]) -> list[Training]:
    """A training for every label and seed, in the order of the labels; directories are named after the runs."""
    found = []
    for label, run in runs.items():
        for seed in range(settings.seeds):
            found.append(Training(f"{run.name}-s{seed}", replace(settings.adapt(run), seed=seed), label))
    return found


@dataclass(frozen=True)
class Finished:
    """A training that is done."""

    training: Training
    directory: Path
    device: torch.device
    progress: StageProgress = no_progress
    """Told what is being measured."""

    def counting(self, what: str) -> Callable[[int, int], None]:
        """A progress over one of the measurements of this training."""
        return partial(self.progress, f"{self.training.name}, {what}")

    def ticking(self, what: str, total: int) -> Callable[[], None]:
        """The same where every call is one more part done."""
        return ticker(self.progress, f"{self.training.name}, {what}", total)

    @property
    def summary(self) -> dict[str, Any]:
        return read_json(self.directory / SUMMARY)

    def load(self) -> Checkpoint:
        return load_checkpoint(self.directory, self.device)

    def tokens(self, checkpoint: Checkpoint, split: str = "test", source: str | None = None) -> TokenArray:
        """A split of the run's own text, or the whole of another."""
        if source is not None:
            return encode_text_source(source, checkpoint.tokenizer, ("all",))["all"]
        return cached_corpus(checkpoint.run.data.source, checkpoint.tokenizer).split(split)


@dataclass(frozen=True)
class Recipe:
    """A table or figure."""

    name: str
    title: str
    claim: str
    """What the paper says, with its numbers; or what is asked where it says nothing."""
    plan: Callable[[Settings], list[Training]]
    measure: Callable[[Settings, Sequence[Finished]], list[Row]]
    draw: Draw | None = None
    needs: tuple[tuple[str, str], ...] = ()
    """Modules that measuring takes, each with the extra of the package that has it."""
    text: Callable[[Settings, Sequence[Finished]], str] | None = None
    """Markdown to stand below the table: samples, say."""
