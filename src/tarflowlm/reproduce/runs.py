"""Trainings of a recipe: what is done is skipped, what was stopped goes on, the rest is begun."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch

from tarflowlm.data import SOURCE_NAMES, TokenizerConfig, build_tokenizer
from tarflowlm.errors import UserError
from tarflowlm.reproduce.recipe import Finished, Settings, Training
from tarflowlm.runs.checkpoint import CONFIG, SUMMARY, read_run
from tarflowlm.runs.config import RunConfig
from tarflowlm.training.lifecycle import resume, train
from tarflowlm.training.metrics import Reporter
from tarflowlm.training.step import seconds_per_step

State = Literal["finished", "stopped", "new"]
GPT2_VOCAB = 50_257
"""So that a plan needs no hub."""


@dataclass(frozen=True)
class Planned:
    """A training with where it stands and how long it will take."""

    training: Training
    state: State
    tokens: int
    seconds: float
    """Of the whole training on this machine: a rough figure."""


def directory_of(settings: Settings, training: Training) -> Path:
    return settings.out / "runs" / training.name


def state_of(settings: Settings, training: Training) -> State:
    """Whether a training is there. UserError where its directory holds a run of another configuration."""
    directory = directory_of(settings, training)
    if not (directory / CONFIG).exists():
        return "new"
    found = read_run(directory)
    if found != _as_written(training.run, found):
        raise UserError(
            f"{directory} holds a run of another configuration: choose another --out, or remove that directory"
        )
    if (directory / SUMMARY).exists():
        return "finished"
    return "stopped"


def finish(settings: Settings, plan: Sequence[Training], reporter: Reporter) -> list[Finished]:
    """Trains what is not there yet, one after the other."""
    done = []
    for training in plan:
        directory, state = directory_of(settings, training), state_of(settings, training)
        if state == "finished":
            reporter.notice(f"{training.name} is done")
        elif state == "stopped":
            resume(directory, device=settings.device, reporter=reporter)
        else:
            train(training.run, directory, device=settings.device, reporter=reporter)
        done.append(Finished(training, directory, settings.device))
    return done


def estimate(
    settings: Settings, plan: Sequence[Training], notice: Callable[[str], None] = lambda _text: None
) -> list[Planned]:
    """The plan with times from a few steps of every stage; at paper scale of one short sequence, scaled up.

    That overstates the optimiser, whose part of a step does not grow with the batch. Trainings that share a shape are
    timed once, and `notice` is told before each.
    """
    known: dict[RunConfig, float] = {}
    planned: list[Planned] = []
    for training in plan:
        run, state = training.run, state_of(settings, training)
        shape = replace(run, seed=0, name="")
        if shape not in known:
            notice(f"timing a few steps of {training.name}, {len(planned) + 1} of {len(plan)} trainings")
            known[shape] = _seconds(run, settings)
        per_step = run.train.batch_size * run.model.context
        planned.append(Planned(training, state, run.train.num_steps * per_step, known[shape]))
    return planned


def _seconds(run: RunConfig, settings: Settings) -> float:
    run = replace(run, model=replace(run.model, vocab_size=_vocab_size(run.data.tokenizer)))
    whole = (run.train.batch_size, run.model.context)
    rows, length = whole if settings.scale == "mini" else (1, min(whole[1], 128))
    length -= length % run.model.patch
    generator = torch.Generator().manual_seed(0)

    def batch() -> torch.Tensor:
        return torch.randint(run.model.vocab_size, (rows, length), generator=generator)

    steps = 3 if settings.scale == "mini" else 1
    share = whole[0] * whole[1] / (rows * length)
    times = [seconds_per_step(run, s, batch, settings.device, num_steps=steps) for s in range(run.num_stages)]
    return share * sum(t * n for t, n in zip(times, run.train.stage_steps, strict=True))


def _vocab_size(tokenizer: TokenizerConfig) -> int:
    if tokenizer.needs_training:
        return tokenizer.vocab_size
    return GPT2_VOCAB if tokenizer.source == "gpt2" else build_tokenizer(tokenizer).vocab_size


def _as_written(run: RunConfig, found: RunConfig) -> RunConfig:
    """The configuration as `train` writes it: with the vocabulary's size, Muon's precision and an absolute path."""
    source = run.data.source
    if source not in SOURCE_NAMES:
        source = str(Path(source).expanduser().resolve())
    model = replace(run.model, vocab_size=found.model.vocab_size)
    optim = replace(run.optim, muon_precision=found.optim.muon_precision)
    return replace(run, model=model, optim=optim, data=replace(run.data, source=source))
