"""The training loop of one stage: optimiser steps, logging, validation and checkpoints."""

import logging
import math
import time
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Generator, Tensor
from torch.nn.utils import clip_grads_with_norm_
from torch.optim import Optimizer

from tarflowlm.config import RunConfig, TrainConfig
from tarflowlm.evaluation.flops import peak_flops, training_flops
from tarflowlm.evaluation.likelihood import Likelihood, bits
from tarflowlm.language_model import seeded
from tarflowlm.training.optim import (
    NAMED,
    build_optimizers,
    norms,
    not_finite,
    schedule,
    set_learning_rate,
    with_precision,
)
from tarflowlm.training.parallel import ParallelModel
from tarflowlm.training.run import TrainingRun, trained_parameters
from tarflowlm.training.state import Counters, LogWindow, TimeSpent

STEPS_BETWEEN_READS = {"cuda": 16}
"""Steps after which results are read from a device, where a read synchronises it with the host; 1
on other devices (also on mps, where fused AdamW cannot skip a step).
"""
SAVE_SECONDS, SAVES_SHARE = 60.0, 0.05
"""A run with a time limit saves about this often, but spends at most about this share of its time
on saving.
"""
TEST_SHARE = 0.15
"""Largest share of a run's time for the test split at its end."""
UNTIMED_STEPS = 1000.0
"""Steps that a stage with a time limit is assumed to have until one of them has been timed."""

logger = logging.getLogger("tarflowlm")


def train_stage(run: TrainingRun) -> Likelihood:
    """Train until the steps or the time of the stage are used up; returns the last validation.

    Raises FloatingPointError, naming parameters, if too many steps in a row have a non-finite loss
    or gradient; Stopped if the run was asked to stop.
    """
    config, counters, log = run.config, run.counters, StepLog(run)
    every = STEPS_BETWEEN_READS.get(run.device.type, 1)
    pace = Pace(config.train, counters, run.seconds, run.num_test_windows)
    run.reporter.stage(run.describe_stage(), pace.total, pace.done)
    compiles = run.parallel_model.compiled
    # the best weights of a stage may be those that it begins with
    counters.due |= config.train.keep == "best" and not counters.stage_step
    while True:
        # after the checkpoint: a kill during a long evaluation loses nothing, and a resumed run
        # starts with it
        if counters.due:
            result = validate(run)
            pace.update()
            if pace.over:
                return result
            log.restart()
        num_steps = max(counters.stage_step + 1, pace.num_steps)
        lr = config.optim.lr * schedule(config.optim, counters.stage_step, num_steps)
        set_learning_rate(run.optimizers, lr)
        log.unread.append(take_step(run, deferred=every > 1))
        if compiles or counters.stage_step % every == 0:
            log.read(timed=not compiles)
            compiles = False
        done = pace.done
        pace.update()
        run.reporter.advance(pace.done - done)
        counters.due = pace.over or counters.step % config.train.evaluate_every == 0
        stop = run.stop_requested()
        save = (
            pace.over or stop or pace.save_due or counters.step % config.train.checkpoint_every == 0
        )
        line = counters.due or counters.step % config.train.log_every == 0
        if line or save:
            log.read()
        if line:
            log.write_line(lr)
        if save:
            run.save()
            log.restart()
        if stop:
            run.stop(stop)


class Pace:
    """How far a stage is: `done` of `total`, in steps, or in thousandths of its time if
    `train.minutes` limits it.

    With a time limit, `train.stage_steps` are the shares of the stages in the remaining time, less
    what is reserved for the evaluation and checkpoint that end every remaining stage, and for
    `test_windows` windows at the end of the run. Other evaluations and checkpoints take time from
    the stage itself. `clock` gives seconds since the start.
    """

    def __init__(
        self, train: TrainConfig, counters: Counters, clock: Callable[[], float], test_windows: int
    ) -> None:
        self.train, self.counters, self.clock, self.test_windows = (
            train,
            counters,
            clock,
            test_windows,
        )
        self.total = 1000 if train.minutes else train.stage_steps[counters.stage]
        self.num_steps: int | float = self.total
        """Steps of the stage, an estimate if its time is limited; the learning-rate schedule
        follows it.
        """
        self.share, self.save_due = 0.0, False
        self.update()

    def update(self) -> None:
        """Update `done` and `over`, and under a time limit the estimate `num_steps` and
        `save_due`.
        """
        spent, stage_step = self.counters.spent, self.counters.stage_step
        if not self.train.minutes:
            self.done, self.over = stage_step, stage_step >= self.total
            return
        passed = (now := self.clock()) - spent.stage_start
        # until the first evaluation: a window without a backward pass takes a third of the time
        windows = self.train.evaluate_windows / self.train.batch_size / 3
        evaluation = spent.evaluation or passed / max(stage_step, 1) * windows
        limit, shares = 60 * self.train.minutes, self.train.stage_steps[self.counters.stage :]
        left = limit - test_seconds(limit, self.test_windows, spent) - spent.stage_start
        seconds = (left - len(shares) * (evaluation + spent.save)) * shares[0] / sum(shares)
        # the share never falls, even if an evaluation is shorter than estimated
        self.share = max(self.share, min(1.0, passed / seconds) if seconds > 0 else 1.0)
        self.done = int(1000 * self.share)
        # the first step may compile, which does not count
        self.num_steps = stage_step / max(self.share, 1e-9) if stage_step > 1 else UNTIMED_STEPS
        # every stage takes at least one step
        self.over = stage_step > 0 and self.share >= 1
        self.save_due = now - spent.total > max(SAVE_SECONDS, spent.save / SAVES_SHARE)


def test_seconds(total: float, test_windows: int, spent: TimeSpent) -> float:
    """Seconds reserved for the test split, of `total`: estimated from validation, at most the share
    `TEST_SHARE`.
    """
    most = TEST_SHARE * total
    return min(most, 1.2 * test_windows * spent.per_window) if spent.per_window else most


class StepResult(NamedTuple):
    """The outcome of an optimiser step; tensors are on the device."""

    loss: Tensor  # of the global batch, in nats per token
    norm: Tensor  # of the gradient of the global batch
    skipped: Tensor  # True if loss or norm is not finite, so that the step was not taken
    names: list[str]  # of the parameters that have a gradient
    norms: Tensor  # of these gradients


def optimizer_step(
    model: ParallelModel,
    optimizers: list[Optimizer],
    tokens: Tensor,
    *,
    generator: Generator,
    deferred: bool = False,
) -> StepResult:
    """Take one step on a global batch, of which `tokens` [B, T] are this process's rows.
    Collective.

    If loss or gradient norm of the global batch is not finite, parameters and optimisers stay as
    they are. If `deferred`, the host never waits for the device: the optimisers decide there, by
    `found_inf` (as in torch.amp).
    """
    loss = model.backward(tokens, generator)
    trained = {name: p for name, p in model.model.named_parameters() if p.grad is not None}
    each = norms(p.grad for p in trained.values() if p.grad is not None)
    norm = torch.linalg.vector_norm(each)
    skipped = ~(torch.isfinite(loss) & torch.isfinite(norm))
    if deferred or not skipped:
        clip_grads_with_norm_(trained.values(), model.config.optim.grad_clip, norm)
        for optimizer in optimizers:
            optimizer.found_inf = skipped.float() if deferred else None  # type: ignore[attr-defined]
            optimizer.step()
    for optimizer in optimizers:
        optimizer.zero_grad(set_to_none=True)
    return StepResult(loss, norm, skipped, [*trained], each)


class PendingStep(NamedTuple):
    """A step whose result the host has not read yet."""

    place: dict[str, int]
    result: StepResult


def take_step(run: TrainingRun, *, deferred: bool) -> PendingStep:
    """Take one step on the next batch and count it."""
    counters, start = run.counters, time.perf_counter()
    tokens = run.sampler.next()
    counters.window.waited += time.perf_counter() - start
    if (
        run.device.type == "cuda"
    ):  # a copy from pageable memory would wait for all work queued on the device
        tokens = tokens.pin_memory()
    tokens = tokens.to(run.device, non_blocking=True)
    result = optimizer_step(
        run.parallel_model, run.optimizers, tokens, generator=run.generator, deferred=deferred
    )
    num_tokens = tokens.numel() * run.processes.world
    counters.step, counters.stage_step = counters.step + 1, counters.stage_step + 1
    counters.tokens += num_tokens
    counters.stage_tokens[counters.stage] += num_tokens
    counters.window.tokens += num_tokens
    run.update_average()
    return PendingStep(_place(counters), result)


def _place(counters: Counters) -> dict[str, int]:
    return {"step": counters.step, "tokens": counters.tokens, "block": counters.stage + 1}


class StepLog:
    """Collects losses and gradient norms for the log, and reports skipped steps."""

    def __init__(self, run: TrainingRun) -> None:
        self.run, self.counters = run, run.counters
        self.unread: list[PendingStep] = []
        self.flops, stage = (
            0.0,
            run.counters.stage,
        )  # of a token, as a share of those of all devices in a second
        name = torch.cuda.get_device_name(run.device) if run.device.type == "cuda" else ""
        if peak := peak_flops(name):
            flops = training_flops(run.config.model_of_stage(stage), frozen=stage)
            self.flops = flops / run.config.model.context / peak / run.processes.world
        self.restart()

    def restart(self) -> None:  # the time since the last step does not count as training
        self.start = time.perf_counter()

    def read(self, *, timed: bool = True) -> None:
        """Read all pending steps, with one transfer: update the counters, record skipped steps.
        Unless `timed`, their time counts neither as training nor for `train.minutes`.
        """
        counters, window = self.counters, self.counters.window
        unread, self.unread = self.unread, []
        results = [torch.stack((r.loss, r.norm, r.skipped.to(r.loss.dtype))) for _, r in unread]
        values = torch.stack(results).tolist() if results else []
        for step, (loss, norm, skipped) in zip(unread, values, strict=True):
            if skipped:
                self._record_skipped(step, loss)
                continue
            counters.skipped = 0
            window.losses.append(loss)
            window.norms.append(norm)
        now = time.perf_counter()
        if timed:
            window.seconds += now - self.start
            counters.seconds[counters.stage] += now - self.start
        else:
            window.tokens, window.seconds, window.waited = 0, 0.0, 0.0
            self.run.session_start += now - self.start
        self.start = now

    def _record_skipped(self, step: PendingStep, loss: float) -> None:
        """Record what is not finite: gradients of the step, and parameters as they are now, perhaps
        some steps later. Collective.
        """
        counters, parameters = self.counters, trained_parameters(self.run.model)
        counters.skipped += 1
        gradients = not_finite(step.result.names, step.result.norms)
        found = {"parameters": not_finite(parameters, norms(parameters.values()))[:NAMED]}
        found["gradients"] = gradients[:NAMED]
        place = {
            "split": "skipped",
            **step.place,
            "nats_per_token": loss if math.isfinite(loss) else None,
        }
        self.run.log.write(place | found | {"num_gradients": len(gradients)})
        named = "; ".join(
            f"{part} {', '.join(names) or 'all finite'}" for part, names in found.items()
        )
        words = f"the loss or gradient is not finite at step {step.place['step']}: {named}"
        if counters.skipped > self.run.config.train.max_skipped:
            remedy = "lower optim.lr or optim.grad_clip in a new run; earlier checkpoints are kept"
            raise FloatingPointError(f"{words}; {counters.skipped} in a row: {remedy}")
        logger.warning("skipped: %s", words)

    def write_line(self, lr: float) -> None:
        """Write a line with the means since the last one to metrics.jsonl, and start the next
        window.
        """
        window, self.counters.window = self.counters.window, LogWindow()
        if not window.losses:
            return  # every step was skipped
        nats = sum(window.losses) / len(window.losses)
        figures = {"nats_per_token": nats, "bpc": bits(nats) / self.run.characters_ratio, "lr": lr}
        figures |= {
            "grad_norm": sum(window.norms) / len(window.norms),
            "grad_norm_max": max(window.norms),
        }
        speed = window.tokens / max(window.seconds, 1e-9)
        figures |= {
            "tokens_per_second": speed,
            "data_share": window.waited / max(window.seconds, 1e-9),
        }
        if self.run.device.type == "cuda":
            figures["memory_gb"] = torch.cuda.max_memory_allocated() / 1e9
            torch.cuda.reset_peak_memory_stats()
        if self.flops:
            figures["mfu"] = speed * self.flops
        self.run.log.write({"split": "train", **_place(self.counters), **figures})


def validate(run: TrainingRun) -> Likelihood:
    """Evaluate on the validation windows, log the bound, and save the weights if they are the best
    of the stage.
    """
    counters, start = run.counters, run.seconds()
    run.model.eval()
    result = run.evaluate(run.valid)  # with the same noise at every call
    run.model.train()
    figures = {"nats_per_token": result.nats_per_token, "bpc": result.bpc, "stderr": result.stderr}
    run.log.write({"split": "valid", **_place(counters), **figures})
    if result.nats_per_token < counters.lowest:
        counters.lowest = result.nats_per_token
        run.save_best(result)
    counters.due, counters.spent.evaluation = False, run.seconds() - start
    counters.spent.per_window = counters.spent.evaluation / len(run.valid)
    return result


def seconds_per_step(
    config: RunConfig,
    stage: int,
    batches: Callable[[], Tensor],
    device: torch.device,
    *,
    num_steps: int = 6,
) -> float:
    """Median seconds of a step of `stage` (0-based) on a throw-away model.
    `config.model.vocab_size` must be set.
    """
    with seeded(config.seed):
        model = config.model_of_stage(stage).build().to(device)
    model.train_only(stage)
    config = with_precision(config, model, device)
    config = replace(config, train=replace(config.train, accumulate=config.train.accumulate or 1))
    parallel_model, optimizers = (
        ParallelModel(model, config, frozen=stage),
        build_optimizers(config.optim, model),
    )
    generator, durations = Generator(device=device).manual_seed(0), []
    for _ in range(num_steps):
        start = time.perf_counter()
        optimizer_step(
            parallel_model, optimizers, batches().to(device), generator=generator
        ).loss.item()
        durations.append(time.perf_counter() - start)
    return sorted(durations)[len(durations) // 2]
