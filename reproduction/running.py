"""Runs the trainings of a plan, or estimates their time."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch

from reproduction.recipe import Finished, Training
from reproduction.settings import Settings
from tarflowlm.config import RunConfig
from tarflowlm.data import build_tokenizer
from tarflowlm.device import pick_device
from tarflowlm.runs.checkpoint import CONFIG, SUMMARY
from tarflowlm.training.loop import seconds_per_step
from tarflowlm.training.metrics import Reporter
from tarflowlm.training.train import StopRequests, continued, no_stop_requests, resume, train

logger = logging.getLogger("tarflowlm")

State = Literal["finished", "stopped", "new"]
GPT2_SIZE = 50_257
"""Tokens of GPT-2's vocabulary, known here so that a plan needs no network."""


def state_of(settings: Settings, training: Training) -> State:
    """State of a training on disk.

    Raises UserError if its directory holds a run of another configuration.
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
    device = pick_device(settings.device)
    for training in plan:
        directory = training.directory(settings)
        match state_of(settings, training):
            case "finished":
                logger.info("%s is done", training.name)
            case "stopped":
                resume(directory, device=device, reporter=reporter, stop_requests=stop_requests)
            case "new":
                train(
                    training.run,
                    directory,
                    device=device,
                    reporter=reporter,
                    stop_requests=stop_requests,
                )
    return [Finished(training, training.directory(settings), device) for training in plan]


@dataclass(frozen=True)
class Planned:
    """A training, its state, and what it costs."""

    training: Training
    state: State
    tokens: int
    seconds: float  # rough estimate for the whole training on this machine


def estimate(settings: Settings, plan: Sequence[Training]) -> list[Planned]:
    """The plan with times, from a few timed steps of every stage.

    The mini scale times whole batches. The paper scale times one short sequence and scales up, which
    overstates the optimiser, whose share of a step does not grow with the batch. Trainings of the
    same shape are timed once.
    """
    known: dict[RunConfig, float] = {}
    planned: list[Planned] = []
    for training in plan:
        run = training.run
        state = state_of(settings, training)
        shape = replace(run, seed=0, name="")
        if shape not in known:
            done = f"{len(planned) + 1} of {len(plan)} trainings"
            logger.info("timing a few steps of %s, %s", training.name, done)
            known[shape] = _seconds(run, settings)
        tokens = run.train.num_steps * run.train.batch_size * run.model.context
        planned.append(Planned(training, state, tokens, known[shape]))
    return planned


def _seconds(run: RunConfig, settings: Settings) -> float:
    """Seconds of a whole training."""
    tokenizer = run.data.tokenizer
    vocab_size = GPT2_SIZE if tokenizer.source == "gpt2" else tokenizer.vocab_size
    if not vocab_size:
        vocab_size = build_tokenizer(tokenizer).vocab_size
    run = replace(run, model=replace(run.model, vocab_size=vocab_size))
    rows = run.train.batch_size
    length = run.model.context
    num_steps = 3
    if settings.scale == "paper":
        rows = 1
        length = min(length, 128)
        num_steps = 1
    length -= length % run.model.patch
    generator = torch.Generator().manual_seed(0)

    def batch() -> torch.Tensor:
        return torch.randint(run.model.vocab_size, (rows, length), generator=generator)

    device = pick_device(settings.device)
    scale = run.train.batch_size * run.model.context / (rows * length)
    times = [
        seconds_per_step(run, stage, batch, device, num_steps=num_steps)
        for stage in range(run.num_stages)
    ]
    return scale * sum(t * n for t, n in zip(times, run.train.stage_steps, strict=True))
