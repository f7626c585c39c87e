"""Runs the trainings of a plan, or estimates their time."""

import logging
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch

from reproduction.recipe import Finished, Training
from reproduction.records import Records
from reproduction.settings import Settings
from tarflowlm.config import RunConfig
from tarflowlm.data import build_tokenizer
from tarflowlm.device import pick_device
from tarflowlm.errors import Progress
from tarflowlm.model import seeded
from tarflowlm.runs import SUMMARY
from tarflowlm.training.configure import native_precision, with_precision
from tarflowlm.training.directory import check_same, is_begun
from tarflowlm.training.optim import build_optimizers, norms, take_step
from tarflowlm.training.parallel import parallelise
from tarflowlm.training.train import StopRequests, accumulate_gradients
from tarflowlm.training.train import train as train_run

logger = logging.getLogger("tarflowlm")

State = Literal["finished", "stopped", "new"]
GPT2_SIZE = 50_257
"""Tokens of GPT-2's vocabulary, known here so that a plan needs no network."""


def state_of(settings: Settings, training: Training, records: Records) -> State:
    """State of a training on disk, or in the `records`.

    Raises UserError if its record or its directory belongs to another configuration.
    """
    if records.find(training.name, training.run) is not None:
        return "finished"
    directory = training.directory(settings)
    if not is_begun(directory):
        return "new"
    check_same(training.run, directory)
    return "finished" if (directory / SUMMARY).exists() else "stopped"


def finish(
    settings: Settings,
    plan: Sequence[Training],
    reporter: Progress,
    stop_requests: StopRequests = lambda: nullcontext(lambda: None),
) -> list[Finished]:
    """Run the trainings of a plan one after the other: skip finished ones, resume stopped ones."""
    device = pick_device(settings.device)
    records = Records(settings.out)
    finished = []
    for training in plan:
        directory = training.directory(settings)
        if state_of(settings, training, records) == "finished":
            logger.info("%s is done", training.name)
        else:
            train_run(
                training.run,
                directory,
                device=device,
                reporter=reporter,
                stop_requests=stop_requests,
            )
        finished.append(recorded(records, training, directory, device))
    return finished


def recorded(
    records: Records, training: Training, directory: Path, device: torch.device
) -> Finished:
    """A finished training, which is put on record if it is not there yet."""
    record = records.find(training.name, training.run)
    if record is None:
        record = records.add(training.name, training.run, directory, device)
    return Finished(training, directory, device, records, record)


@dataclass(frozen=True)
class Planned:
    """A training, its state, and what it costs."""

    training: Training
    state: State
    tokens: int
    seconds: float  # of the whole training, by its record or roughly estimated on this machine


def estimate(settings: Settings, plan: Sequence[Training]) -> list[Planned]:
    """The plan with times, from a few timed steps of every stage.

    The mini scale times whole batches. The paper scale times one short sequence and scales it up,
    which overstates the optimiser, because its time does not grow with the batch. Trainings of the
    same shape are timed once. Those on record have the time that they took.
    """
    records = Records(settings.out)
    known: dict[RunConfig, float] = {}
    planned: list[Planned] = []
    for training in plan:
        run = training.run
        state = state_of(settings, training, records)
        tokens = run.train.num_steps * run.train.batch_size * run.model.context
        record = records.find(training.name, run)
        if record is not None:
            planned.append(Planned(training, state, tokens, record.summary["seconds"]))
            continue
        shape = replace(run, seed=0, name="")
        if shape not in known:
            done = f"{len(planned) + 1} of {len(plan)} trainings"
            logger.info("timing a few steps of %s, %s", training.name, done)
            known[shape] = _seconds(run, settings)
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
        seconds_per_step(run, stage, batch, device, num_steps) for stage in range(run.num_stages)
    ]
    return scale * sum(t * n for t, n in zip(times, run.train.stage_steps, strict=True))


def seconds_per_step(
    run: RunConfig,
    stage: int,
    batch: Callable[[], torch.Tensor],
    device: torch.device,
    num_steps: int,
) -> float:
    """Median seconds of a step of `stage` (0-based), on a model that is thrown away."""
    with seeded(run.seed):
        model = run.model_of_stage(stage).build().to(device)
    model.train_only(stage)
    train = with_precision(run.train, device)
    bound = parallelise(model, train, frozen=stage)
    optimizers = build_optimizers(run.optim, model, native_precision(device))
    generator = torch.Generator(device=device).manual_seed(0)
    durations = []
    for _ in range(num_steps):
        start = time.perf_counter()
        loss = accumulate_gradients(model, bound, batch().to(device), generator, train)
        trained = {name: p for name, p in model.named_parameters() if p.grad is not None}
        norm = norms({name: p.grad for name, p in trained.items() if p.grad is not None}).norm()
        take_step(optimizers, trained, norm, lr=run.optim.lr, grad_clip=run.optim.grad_clip)
        loss.item()
        durations.append(time.perf_counter() - start)
    return sorted(durations)[len(durations) // 2]
