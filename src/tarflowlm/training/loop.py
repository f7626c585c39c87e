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
from tarflowlm.runs.config import RunConfig
from tarflowlm.training.guards import POLL, Guard, RunningLoss, broken_gradients, in_words, skipped_record
from tarflowlm.training.metrics import MetricsLog
from tarflowlm.training.optim import schedule, set_learning_rate
from tarflowlm.training.pace import Clock, Pace, StepPace, TimePace, TimeSpent
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
    stage_steps: list[int] = field(default_factory=list)
    """Steps of every finished stage."""
    stage_tokens: list[int] = field(default_factory=list)
    valid_bpc: list[float] = field(default_factory=list)
    """Validation bound at the end of every finished stage, bits per character."""
    window: Window = field(default_factory=Window)
    running: RunningLoss = field(default_factory=RunningLoss)
    spent: TimeSpent = field(default_factory=TimeSpent)

    @classmethod
    def restored(cls, saved: dict[str, Any]) -> "Counters":
        """From `dataclasses.asdict`."""
        nested = {"window": Window(**saved["window"]), "running": RunningLoss(**saved["running"])}
        spent = TimeSpent(**saved.get("spent", {}))
        return cls(**(saved | nested | {"spent": spent}))


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
    clock: Clock
    """Of the whole run."""
    num_test_windows: int
    """What the test split will be judged by, where there is time for it."""
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
    every = steps_between_looks(context.device)
    pace = stage_pace(context, counters, every)
    steps = _StepLog(engine, context, counters)
    while True:
        # checkpoints are made before this: a kill in a long evaluation loses nothing, a resumed run begins with it
        if counters.due:
            result = validate(engine, context, counters)
            pace.look(0)
            stalled = config.advance == "stall" and counters.stalled >= config.stall_evaluations
            if pace.over(counters.stage_step) or stalled:
                return result
            steps.restart()
        lr = context.run.optim.lr * schedule(context.run.optim, *pace.steps(counters.stage_step))
        set_learning_rate(optimizers, lr)
        num_tokens = _step(optimizers, counters, steps, deferred=every > 1)
        if counters.stage_step % every == 0:
            steps.read()
        pace.look(counters.stage_step)
        context.log.reporter.step(num_tokens, pace.share)
        last = pace.over(counters.stage_step)
        counters.due = last or counters.step % config.evaluate_every == 0
        asked = context.stop_requested() is not None
        save = last or asked or counters.step % config.checkpoint_every == 0 or pace.save_due()
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


def steps_between_looks(device: torch.device) -> int:
    """A CPU can be read at any time; a GPU would have to wait. (On mps fused AdamW cannot leave a step out.)"""
    return POLL if device.type == "cuda" else 1


def stage_pace(context: StageContext, counters: Counters, every: int) -> Pace:
    """Steps or time, as the run has it."""
    train = context.run.train
    if not train.minutes:
        return StepPace(train.stage_steps[counters.stage])
    return TimePace(train, counters.stage, counters.spent, context.clock, context.num_test_windows, every)


def _step(optimizers: list[torch.optim.Optimizer], counters: Counters, steps: "_StepLog", *, deferred: bool) -> int:
    """One step on the next batch, counted; what came of it goes to `steps`, which may read it later. Its tokens."""
    engine, context = steps.engine, steps.context
    tokens = context.sampler.next()
    if context.device.type == "cuda":
        # from pageable memory the host would wait until the device has all before it done
        tokens = tokens.pin_memory()
    tokens = tokens.to(context.device, non_blocking=True)
    before = context.generator.get_state()
    guard = Guard(deferred=deferred)
    loss, norm = optimizer_step(engine, optimizers, tokens, generator=context.generator, guard=guard)
    num_tokens = tokens.numel() * engine.processes.world
    counters.step += 1
    counters.stage_step += 1
    counters.tokens += num_tokens
    counters.stage_tokens[counters.stage] += num_tokens
    steps.add(_Taken(_place(counters), loss, norm, tokens, before, guard), num_tokens)
    return num_tokens


def _place(counters: Counters) -> dict[str, int]:
    """Where a line of the log belongs."""
    return {"step": counters.step, "tokens": counters.tokens, "block": counters.stage + 1}


@dataclass(frozen=True)
class _Taken:
    """A step that the host has not looked at yet, and what it takes to repeat it."""

    place: dict[str, int]
    loss: Tensor
    norm: Tensor
    tokens: Tensor
    noise: Tensor
    """State of the generator before it."""
    guard: Guard

    def values(self) -> Tensor:
        """Loss, norm, and 1 where the step was not taken."""
        known = float(self.guard.broken is not None)
        found = torch.full_like(self.loss, known) if self.guard.found_inf is None else self.guard.found_inf
        return torch.stack((self.loss, self.norm, found.to(self.loss.dtype)))


class _StepLog:
    """Losses and norms on their way to the log, and steps that were left out on their way to the user."""

    def __init__(self, engine: Engine, context: StageContext, counters: Counters) -> None:
        self.engine, self.context, self.counters = engine, context, counters
        self.unread: list[_Taken] = []
        self.start = time.perf_counter()

    def restart(self) -> None:
        """Time spent since the last step was not training."""
        self.start = time.perf_counter()

    def add(self, taken: _Taken, num_tokens: int) -> None:
        self.counters.window.tokens += num_tokens
        self.unread.append(taken)

    def read(self) -> None:
        """Move what is unread to the counters, record losses that jumped, and tell of steps that were left out.

        Looks at the device once.
        """
        counters, window = self.counters, self.counters.window
        unread, self.unread = self.unread, []
        values = torch.stack([taken.values() for taken in unread]).tolist() if unread else []
        for taken, (loss, norm, left_out) in zip(unread, values, strict=True):
            if left_out:
                self._tell(taken)
                continue
            counters.skipped = 0
            window.losses.append(loss)
            window.norms.append(norm)
            mean, sigmas = counters.running.mean, counters.running.take_in(loss)
            if sigmas > self.context.run.train.spike_sigma:
                figures = {"nats_per_token": loss, "mean": mean, "sigmas": sigmas, "grad_norm": norm}
                place = {name: taken.place[name] for name in ("step", "block")}
                self.context.log.write({"split": "spike", **place, **figures})
        now = time.perf_counter()
        window.seconds += now - self.start
        counters.seconds[counters.stage] += now - self.start
        self.start = now

    def _tell(self, taken: _Taken) -> None:
        """Record a step that was left out; too many in a row are an error."""
        counters, engine, noise = self.counters, self.engine, torch.Generator(device=self.context.device)
        counters.skipped += 1
        gradients = taken.guard.broken
        if gradients is None:
            # the parameters may have moved on since; the batch is the same, and mostly so is what is wrong with it
            noise.set_state(taken.noise)
            engine.backward(taken.tokens, noise)
            gradients = broken_gradients(engine.model)
            engine.model.zero_grad(set_to_none=True)
        noise.set_state(taken.noise)
        everyones = engine.processes.gather(taken.tokens)
        told = skipped_record(engine.whole(), everyones, noise, gradients, taken.loss)
        record = {"split": "skipped", **taken.place} | told
        self.context.log.write(record)
        if counters.skipped > self.context.run.train.max_skipped:
            raise FloatingPointError(
                f"{in_words(record)}; {counters.skipped} in a row: lower optim.lr or optim.grad_clip in a new run; "
                f"the checkpoints before are kept"
            )
        self.context.log.reporter.notice(f"skipped: {in_words(record)}")

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
    start = context.clock.seconds()
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
    counters.spent.evaluation = context.clock.seconds() - start
    counters.spent.per_window = counters.spent.evaluation / len(context.valid)
    return result
