"""One stage of training: the optimiser steps, and what is logged about them."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tarflowlm.data import WindowSampler
from tarflowlm.evaluation.likelihood import Likelihood
from tarflowlm.training.config import RunConfig
from tarflowlm.training.guards import Guard, RunningLoss, in_words, skipped_record
from tarflowlm.training.metrics import MetricsLog
from tarflowlm.training.optim import schedule, set_learning_rate
from tarflowlm.training.parallel import Engine
from tarflowlm.training.step import optimizer_step


@dataclass
class Window:
    """Steps since the last line of the log."""

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    tokens: int = 0
    seconds: float = 0.0


@dataclass
class Counters:
    """Where a run stands. All of it is saved, so that a resumed run goes on as if it had never stopped."""

    step: int = 0
    """Optimiser steps of all stages, those that were skipped included."""
    tokens: int = 0
    stage: int = 0
    stage_step: int = 0
    """Steps of the current stage."""
    due: bool = False
    """An evaluation comes before the next step: checkpoints are made before evaluations."""
    best: float = math.inf
    """Validation bound of the stage at its last improvement of `stall_tolerance`, in nats per token."""
    lowest: float = math.inf
    """Lowest validation bound of the stage: that of best/."""
    stalled: int = 0
    """Evaluations since `best`."""
    skipped: int = 0
    """Steps in a row that were skipped."""
    seconds: list[float] = field(default_factory=list)
    """Training time of every stage."""
    stage_tokens: list[int] = field(default_factory=list)
    valid_bpc: list[float] = field(default_factory=list)
    """Validation bound at the end of every finished stage, bits per character."""
    window: Window = field(default_factory=Window)
    running: RunningLoss = field(default_factory=RunningLoss)

    @classmethod
    def restored(cls, saved: dict[str, Any]) -> "Counters":
        """From `dataclasses.asdict`."""
        nested = {"window": Window(**saved["window"]), "running": RunningLoss(**saved["running"])}
        return cls(**(saved | nested))


@dataclass(frozen=True)
class StageContext:
    """What a stage works with, besides the model."""

    run: RunConfig
    sampler: WindowSampler
    valid: Tensor
    """Validation windows [N, T]."""
    characters_per_token: Tensor
    """[V]."""
    characters_ratio: float
    """Characters per token of the training split."""
    generator: torch.Generator
    device: torch.device
    log: MetricsLog
    checkpoint: Callable[[], None]
    """Saves the run as it stands."""
    keep_best: Callable[[Likelihood], None]
    """Saves the weights as those of the best validation bound."""
    stop_requested: Callable[[], str | None]
    """By what the run was asked to stop, in any of its processes."""
    leave_if_asked: Callable[[], None]
    """Saves the run and raises Stopped, if it was asked to stop."""


def train_stage(
    optimizers: list[torch.optim.Optimizer],
    context: StageContext,
    counters: Counters,
    *,
    engine: Engine,
) -> Likelihood:
    """Optimiser steps until the stage's budget is used up, or its validation bound stalls; returns that bound.

    `engine` has the model, with the blocks below the stage frozen. Raises FloatingPointError, naming terms and
    parameters, when the loss or gradient of too many steps in a row is not finite, and Stopped when asked to stop.
    """
    config = context.run.train
    num_steps = config.stage_steps[counters.stage]
    steps = _StepLog(context, counters)
    while True:
        # checkpoints are made before this: a kill in a long evaluation loses nothing, a resumed run begins with it
        if counters.due:
            result = validate(engine, context, counters)
            stalled = config.advance == "stall" and counters.stalled >= config.stall_evaluations
            if counters.stage_step == num_steps or stalled:
                return result
            steps.restart()
        lr = context.run.optim.lr * schedule(context.run.optim, counters.stage_step, num_steps)
        set_learning_rate(optimizers, lr)
        _step(engine, optimizers, context, counters, steps)
        last = counters.stage_step == num_steps
        counters.due = last or counters.step % config.evaluate_every == 0
        asked = context.stop_requested() is not None
        save = last or asked or counters.step % config.checkpoint_every == 0
        line = counters.due or counters.step % config.log_every == 0
        if line or save:
            steps.read()
        if line:
            steps.write_line(lr)
        if save:
            context.checkpoint()
            steps.restart()
        if asked:
            context.leave_if_asked()


def _step(
    engine: Engine,
    optimizers: list[torch.optim.Optimizer],
    context: StageContext,
    counters: Counters,
    steps: "_StepLog",
) -> None:
    """One step on the next batch, counted; one that must not be taken is recorded, too many of them are an error."""
    tokens = context.sampler.next().to(context.device)
    before = context.generator.get_state()
    guard = Guard()
    loss, norm = optimizer_step(engine, optimizers, tokens, generator=context.generator, guard=guard)
    num_tokens = tokens.numel() * engine.processes.world
    counters.step += 1
    counters.stage_step += 1
    counters.tokens += num_tokens
    counters.stage_tokens[counters.stage] += num_tokens
    context.log.reporter.step(num_tokens)
    steps.count(num_tokens)
    if guard.broken is None:
        counters.skipped = 0
        steps.add(loss, norm)
        return
    counters.skipped += 1
    noise = torch.Generator(device=context.device)
    noise.set_state(before)
    everyones = engine.processes.gather(tokens)
    told = skipped_record(engine.whole(), everyones, noise, guard.broken, loss)
    record = {"split": "skipped", **_place(counters)} | told
    context.log.write(record)
    if counters.skipped > context.run.train.max_skipped:
        raise FloatingPointError(
            f"{in_words(record)}; {counters.skipped} in a row: lower optim.lr or optim.grad_clip in a new run; "
            f"the checkpoints before are kept"
        )
    context.log.reporter.notice(f"skipped: {in_words(record)}")


def _place(counters: Counters) -> dict[str, int]:
    """Where a line of the log belongs."""
    return {"step": counters.step, "tokens": counters.tokens, "block": counters.stage + 1}


class _StepLog:
    """Losses and norms on their way to the log; the device is read once per line or checkpoint."""

    def __init__(self, context: StageContext, counters: Counters) -> None:
        self.context, self.counters = context, counters
        self.unread: list[tuple[int, Tensor]] = []
        self.start = time.perf_counter()

    def restart(self) -> None:
        """Time spent since the last step was not training."""
        self.start = time.perf_counter()

    def count(self, tokens: int) -> None:
        self.counters.window.tokens += tokens

    def add(self, loss: Tensor, norm: Tensor) -> None:
        self.unread.append((self.counters.step, torch.stack((loss, norm))))

    def read(self) -> None:
        """Move what is unread to the counters, and record the losses that jumped."""
        counters, window = self.counters, self.counters.window
        values = torch.stack([pair for _, pair in self.unread]).tolist() if self.unread else []
        for (step, _), (loss, norm) in zip(self.unread, values, strict=True):
            window.losses.append(loss)
            window.norms.append(norm)
            mean, sigmas = counters.running.mean, counters.running.take_in(loss)
            if sigmas > self.context.run.train.spike_sigma:
                figures = {"nats_per_token": loss, "mean": mean, "sigmas": sigmas, "grad_norm": norm}
                self.context.log.write({"split": "spike", "step": step, "block": counters.stage + 1, **figures})
        self.unread = []
        now = time.perf_counter()
        window.seconds += now - self.start
        counters.seconds[counters.stage] += now - self.start
        self.start = now

    def write_line(self, lr: float) -> None:
        window, self.counters.window = self.counters.window, Window()
        if not window.losses:
            return  # every step was skipped
        nats = sum(window.losses) / len(window.losses)
        self.context.log.write(
            {
                "split": "train",
                **_place(self.counters),
                "nats_per_token": nats,
                "bpc": nats / math.log(2) / self.context.characters_ratio,
                "lr": lr,
                "grad_norm": sum(window.norms) / len(window.norms),
                "grad_norm_max": max(window.norms),
                "tokens_per_second": window.tokens / max(window.seconds, 1e-9),
            }
        )


def validate(engine: Engine, context: StageContext, counters: Counters) -> Likelihood:
    """Evaluate on the validation windows, log it, keep the best, and count what did not improve enough."""
    engine.model.eval()
    # the same noise at every call
    result = engine.evaluate(
        context.valid, context.characters_per_token, progress=lambda *_: context.leave_if_asked()
    )
    engine.model.train()
    context.log.write(
        {
            "split": "valid",
            **_place(counters),
            "nats_per_token": result.nats_per_token,
            "bpc": result.bpc,
            "stderr": result.stderr,
        }
    )
    if result.nats_per_token < counters.best - context.run.train.stall_tolerance:
        counters.best, counters.stalled = result.nats_per_token, 0
    else:
        counters.stalled += 1
    if result.nats_per_token < counters.lowest:
        counters.lowest = result.nats_per_token
        context.keep_best(result)
    counters.due = False
    return result
