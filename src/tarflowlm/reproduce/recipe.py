"""Recipes: named trainings, numbers measured on them, and a plot. Runs the trainings, or estimates
their time.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch

from tarflowlm.config import Precision, RunConfig, Scale
from tarflowlm.data import TokenArray, build_tokenizer, cached_corpus, encode_text_source
from tarflowlm.files import read_json
from tarflowlm.presets import preset, with_steps
from tarflowlm.progress import SILENT, Progress
from tarflowlm.runs.checkpoint import CONFIG, SUMMARY, Checkpoint, load_checkpoint
from tarflowlm.training.loop import seconds_per_step
from tarflowlm.training.metrics import Reporter
from tarflowlm.training.train import StopRequests, continued, no_stop_requests, resume, train
from tarflowlm.views.style import Figure

logger = logging.getLogger("tarflowlm")

State = Literal["finished", "stopped", "new"]
Row = dict[str, Any]  # one row of the CSV: column name -> number or text

GPT2_SIZE = 50_257  # tokens of GPT-2's vocabulary, known here so that a plan needs no network
RUN_DETAILS = (
    "ppl",
    "stderr, nats",
    "tokens seen",
    "seconds",
)  # columns of `states.summary_row` for the CSV alone


def names_of(rows: Sequence[Row], hidden: Sequence[str] = ()) -> list[str]:
    """The names of all columns but the `hidden` ones, in the order of their first appearance."""
    return list(dict.fromkeys(name for row in rows for name in row if name not in hidden))


def markdown_table(rows: Sequence[Row], hidden: Sequence[str] = ()) -> str:
    """The rows as a Markdown table without its `hidden` columns; empty without rows."""

    def cell(value: Any) -> str:
        if value is None:
            return ""
        return (
            f"{value:,}"
            if isinstance(value, int)
            else f"{value:.4f}"
            if isinstance(value, float)
            else str(value)
        )

    if not rows:
        return ""
    columns = names_of(rows, hidden)
    lines = [
        columns,
        ["---"] * len(columns),
        *([cell(row.get(name)) for name in columns] for row in rows),
    ]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


@dataclass(frozen=True)
class Settings:
    """The user's choices."""

    scale: Scale
    out: Path
    data: str | None = None  # text of the mini scale; the default is that of the presets
    judge_data: str = (
        "english"  # text that the judge of samples is trained on; it should differ from `data`
    )
    second_text: str | None = None  # another text to measure the likelihood on
    seeds: int = 1
    steps: int | None = (
        None  # optimiser steps of every training, in place of the recipe's: for a quick look
    )
    precision: Precision | None = (
        None  # precision of matrix products in training, in place of the preset's
    )
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def preset(self, kind: str, corpus: Literal["text8", "owt"]) -> RunConfig:
        """The preset of a kind of model (ar, affine, mix1, mixd): the mini one, or the paper's on
        `corpus`.
        """
        return preset(f"{'mini' if self.scale == 'mini' else corpus}-{kind}")

    def adapt(self, run: RunConfig) -> RunConfig:
        """The run with the user's text, precision and number of steps. The paper scale keeps its
        texts.
        """
        if self.data is not None and self.scale == "mini":
            run = replace(run, data=replace(run.data, source=self.data))
        if self.precision is not None:
            run = replace(run, train=replace(run.train, precision=self.precision))
        return run if self.steps is None else with_steps(run, self.steps)


@dataclass(frozen=True)
class Training:
    """One run directory. Recipes with a training of the same name share it."""

    name: str
    run: RunConfig
    label: str  # in tables and plots; the same for all seeds

    def directory(self, settings: Settings) -> Path:
        return settings.out / "runs" / self.name


def trainings(settings: Settings, runs: Mapping[str, RunConfig]) -> list[Training]:
    """One training per label and seed, in the order of the labels; directories are named after the
    runs.
    """
    adapted = [
        (label, settings.adapt(run), seed)
        for label, run in runs.items()
        for seed in range(settings.seeds)
    ]
    return [
        Training(f"{run.name}-s{seed}", replace(run, seed=seed), label)
        for label, run, seed in adapted
    ]


@dataclass(frozen=True)
class Finished:
    """A finished training."""

    training: Training
    directory: Path
    device: torch.device
    progress: Progress = SILENT

    def stage(self, name: str, total: int) -> Progress:
        """Begin a measurement of this training, of `total` parts; returns its progress."""
        self.progress.stage(f"{self.training.name}, {name}", total)
        return self.progress

    @property
    def summary(self) -> dict[str, Any]:
        return read_json(self.directory / SUMMARY)

    def load(self) -> Checkpoint:
        return load_checkpoint(self.directory, self.device)

    def tokens(self, checkpoint: Checkpoint, source: str | None = None) -> TokenArray:
        """The test split of the run's own text, or all of the text `source`."""
        if source is not None:
            return encode_text_source(source, checkpoint.tokenizer, ("all",))["all"]
        return cached_corpus(checkpoint.run.data.source, checkpoint.tokenizer).split("test")


@dataclass(frozen=True)
class Recipe:
    """A table or figure."""

    name: str
    title: str
    claim: str  # the paper's claim with its numbers, or the question where the paper makes none
    plan: Callable[[Settings], list[Training]]
    measure: Callable[[Settings, Sequence[Finished]], list[Row]]  # all rows, for the CSV
    table: Callable[[Sequence[Row]], list[Row]] = (
        list  # the rows of the Markdown table; none for no table
    )
    hidden: tuple[str, ...] = RUN_DETAILS  # columns that are in the CSV alone
    draw: Callable[[Figure, Sequence[Row]], None] | None = (
        None  # draws the rows into a matplotlib figure
    )
    size: tuple[float, float] = (7.0, 4.5)  # width and height of the figure in inches
    page: Callable[[Sequence[Row]], str] | None = None  # the rows as a self-contained HTML page
    text: Callable[[Settings, Sequence[Finished], Sequence[Row]], str] | None = (
        None  # Markdown below the table
    )
    needs: tuple[
        tuple[str, str], ...
    ] = ()  # modules that measuring needs, each with the extra that installs it
    seeds: int = 1  # fewest seeds at mini scale: more than one where a claim hangs on less than 2 %
    clear: tuple[
        str, ...
    ] = ()  # labels of trainings without these further seeds: far apart, or slow as joint ones

    def trainings(self, settings: Settings) -> list[Training]:
        """The plan with at least `seeds` seeds, except for the labels in `clear`."""
        least = self.seeds if settings.scale == "mini" else 1
        plan = self.plan(replace(settings, seeds=max(settings.seeds, least)))
        return [t for t in plan if t.label not in self.clear or t.run.seed < settings.seeds]


@dataclass(frozen=True)
class Planned:
    """A training and its state."""

    training: Training
    state: State
    tokens: int
    seconds: float  # rough estimate for the whole training on this machine


def state_of(settings: Settings, training: Training) -> State:
    """State of a training on disk. Raises UserError if its directory holds a run of another
    configuration.
    """
    directory = training.directory(settings)
    if not (directory / CONFIG).exists():
        return "new"
    continued(training.run, directory)
    return "finished" if (directory / SUMMARY).exists() else "stopped"


def finish(
    settings: Settings,
    plan: Sequence[Training],
    reporter: Reporter,
    stop_requests: StopRequests = no_stop_requests,
) -> list[Finished]:
    """Run the trainings of a plan one after the other: skip finished ones, resume stopped ones."""
    options: dict[str, Any] = {
        "device": settings.device,
        "reporter": reporter,
        "stop_requests": stop_requests,
    }
    for training in plan:
        match state_of(settings, training):
            case "finished":
                logger.info("%s is done", training.name)
            case "stopped":
                resume(training.directory(settings), **options)
            case "new":
                train(training.run, training.directory(settings), **options)
    return [Finished(training, training.directory(settings), settings.device) for training in plan]


def estimate(settings: Settings, plan: Sequence[Training]) -> list[Planned]:
    """The plan with times, from a few timed steps of every stage. The mini scale times whole
    batches, the paper scale one short sequence and scales up, which overstates the optimiser, whose
    share of a step does not grow with the batch. Trainings of the same shape are timed once.
    """
    known: dict[RunConfig, float] = {}
    planned: list[Planned] = []
    for training in plan:
        run, state = training.run, state_of(settings, training)
        shape = replace(run, seed=0, name="")
        if shape not in known:
            logger.info(
                "timing a few steps of %s, %d of %d trainings",
                training.name,
                len(planned) + 1,
                len(plan),
            )
            known[shape] = _seconds(run, settings)
        tokens_per_step = run.train.batch_size * run.model.context
        planned.append(
            Planned(training, state, run.train.num_steps * tokens_per_step, known[shape])
        )
    return planned


def _seconds(run: RunConfig, settings: Settings) -> float:
    tokenizer = run.data.tokenizer
    vocab_size = GPT2_SIZE if tokenizer.source == "gpt2" else tokenizer.vocab_size
    run = replace(
        run,
        model=replace(run.model, vocab_size=vocab_size or build_tokenizer(tokenizer).vocab_size),
    )
    whole = (run.train.batch_size, run.model.context)
    rows, length = whole if settings.scale == "mini" else (1, min(whole[1], 128))
    length -= length % run.model.patch
    generator = torch.Generator().manual_seed(0)

    def batch() -> torch.Tensor:
        return torch.randint(run.model.vocab_size, (rows, length), generator=generator)

    steps, scale = 3 if settings.scale == "mini" else 1, whole[0] * whole[1] / (rows * length)
    times = [
        seconds_per_step(run, s, batch, settings.device, num_steps=steps)
        for s in range(run.num_stages)
    ]
    return scale * sum(t * n for t, n in zip(times, run.train.stage_steps, strict=True))
