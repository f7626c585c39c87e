"""The training loop of one stage: optimiser steps, logging, validation and checkpoints."""

import time
from dataclasses import dataclass

import torch
from torch import Tensor

from tarflowlm.evaluation.likelihood import Likelihood, bits
from tarflowlm.progress import Counted
from tarflowlm.training.guards import POLL, Guard, broken_gradients, in_words, skipped_record
from tarflowlm.training.optim import schedule, set_learning_rate
from tarflowlm.training.pace import Pace, StepPace, TimePace
from tarflowlm.training.run import Run
from tarflowlm.training.state import Counters, Window
from tarflowlm.training.step import optimizer_step


def train_stage(run: Run) -> Likelihood:
    """Train until the stage's budget is used up or its validation bound stalls; returns the last validation.

    Raises FloatingPointError, naming terms and parameters, if too many steps in a row have a non-finite loss or
    gradient; Stopped if the run was asked to stop.
    """
    config, counters = run.config.train, run.counters
    every = steps_between_looks(run.device)
    pace = stage_pace(run, every)
    steps = _StepLog(run)
    while True:
        # after the checkpoint: a kill during a long evaluation loses nothing, and a resumed run starts with it
        if counters.due:
            result = validate(run)
            pace.look(0)
            stalled = config.advance == "stall" and counters.stalled >= config.stall_evaluations
            if pace.over(counters.stage_step) or stalled:
                return result
            steps.restart()
        lr = run.config.optim.lr * schedule(run.config.optim, *pace.steps(counters.stage_step))
        set_learning_rate(run.optimizers, lr)
        num_tokens = _step(run, steps, deferred=every > 1)
        if counters.stage_step % every == 0:
            steps.read()
        pace.look(counters.stage_step)
        run.reporter.step(num_tokens, pace.share)
        last = pace.over(counters.stage_step)
        counters.due = last or counters.step % config.evaluate_every == 0
        asked = run.stop_requested() is not None
        save = last or asked or counters.step % config.checkpoint_every == 0 or pace.save_due()
        line = counters.due or counters.step % config.log_every == 0
        if line or save:
            steps.read()
        if line:
            steps.write_line(lr)
        if save:
            run.save()
            steps.restart()
        if asked:
            run.stop_if_asked()


def steps_between_looks(device: torch.device) -> int:
    """Steps between reads of results from `device`: `POLL` on CUDA, where a read synchronises, otherwise 1.

    (1 on mps too: fused AdamW cannot skip a step there.)
    """
    return POLL if device.type == "cuda" else 1


def stage_pace(run: Run, every: int) -> Pace:
    """The pace of the current stage, by steps or by time; the clock is read every `every` steps."""
    train, counters = run.config.train, run.counters
    if not train.minutes:
        return StepPace(train.stage_steps[counters.stage])
    return TimePace(train, counters.stage, counters.spent, run.clock, run.num_test_windows, every)


def _step(run: Run, steps: "_StepLog", *, deferred: bool) -> int:
    """Take one step on the next batch and count it; `steps` reads its loss, perhaps later. Returns its tokens."""
    counters, tokens = run.counters, run.sampler.next()
    if run.device.type == "cuda":
        # a copy from pageable memory would wait for all work queued on the device
        tokens = tokens.pin_memory()
    tokens = tokens.to(run.device, non_blocking=True)
    before = run.generator.get_state()
    guard = Guard(deferred=deferred)
    loss, norm = optimizer_step(run.engine, run.optimizers, tokens, generator=run.generator, guard=guard)
    num_tokens = tokens.numel() * run.processes.world
    counters.step += 1
    counters.stage_step += 1
    counters.tokens += num_tokens
    counters.stage_tokens[counters.stage] += num_tokens
    steps.add(_PendingStep(_place(counters), loss, norm, tokens, before, guard), num_tokens)
    return num_tokens


def _place(counters: Counters) -> dict[str, int]:
    """The fields that place a record: step, tokens and block (1-based)."""
    return {"step": counters.step, "tokens": counters.tokens, "block": counters.stage + 1}


@dataclass(frozen=True)
class _PendingStep:
    """A step whose results the host has not read yet, with everything needed to repeat it."""

    place: dict[str, int]
    loss: Tensor
    norm: Tensor
    tokens: Tensor
    noise: Tensor
    """State of the noise generator before the step."""
    guard: Guard

    def values(self) -> Tensor:
        """Loss, gradient norm, and 1 if the step was skipped, else 0: [3]."""
        on_host = float(self.guard.broken is not None)
        skipped = torch.full_like(self.loss, on_host) if self.guard.found_inf is None else self.guard.found_inf
        return torch.stack((self.loss, self.norm, skipped.to(self.loss.dtype)))


class _StepLog:
    """Collects losses and gradient norms for the log, and reports spikes and skipped steps."""

    def __init__(self, run: Run) -> None:
        self.run, self.counters = run, run.counters
        self.unread: list[_PendingStep] = []
        self.start = time.perf_counter()

    def restart(self) -> None:
        """Do not count the time since the last step as training."""
        self.start = time.perf_counter()

    def add(self, step: _PendingStep, num_tokens: int) -> None:
        """Add a step over `num_tokens` tokens, to be read later."""
        self.counters.window.tokens += num_tokens
        self.unread.append(step)

    def read(self) -> None:
        """Read all pending steps, with one transfer: update the counters, record spikes and skipped steps."""
        counters, window = self.counters, self.counters.window
        unread, self.unread = self.unread, []
        values = torch.stack([step.values() for step in unread]).tolist() if unread else []
        for step, (loss, norm, skipped) in zip(unread, values, strict=True):
            if skipped:
                self._record_skipped(step)
                continue
            counters.skipped = 0
            window.losses.append(loss)
            window.norms.append(norm)
            mean, sigmas = counters.running.mean, counters.running.take_in(loss)
            if sigmas > self.run.config.train.spike_sigma:
                figures = {"nats_per_token": loss, "mean": mean, "sigmas": sigmas, "grad_norm": norm}
                place = {name: step.place[name] for name in ("step", "block")}
                self.run.log.write({"split": "spike", **place, **figures})
        now = time.perf_counter()
        window.seconds += now - self.start
        counters.seconds[counters.stage] += now - self.start
        self.start = now

    def _record_skipped(self, step: _PendingStep) -> None:
        """Record a skipped step; FloatingPointError after too many in a row."""
        counters, engine, noise = self.counters, self.run.engine, torch.Generator(device=self.run.device)
        counters.skipped += 1
        gradients = step.guard.broken
        if gradients is None:
            # repeat the step. The parameters may have changed since, but usually the cause is in the batch
            noise.set_state(step.noise)
            engine.backward(step.tokens, noise)
            gradients = broken_gradients(engine.model)
            engine.model.zero_grad(set_to_none=True)
        noise.set_state(step.noise)
        tokens = self.run.processes.gather(step.tokens)
        details = skipped_record(engine.whole(), tokens, noise, gradients, step.loss)
        record = {"split": "skipped", **step.place} | details
        self.run.log.write(record)
        if counters.skipped > self.run.config.train.max_skipped:
            raise FloatingPointError(
                f"{in_words(record)}; {counters.skipped} in a row: lower optim.lr or optim.grad_clip in a new run; "
                f"earlier checkpoints are kept"
            )
        self.run.reporter.notice(f"skipped: {in_words(record)}")

    def write_line(self, lr: float) -> None:
        """Write a line with the means since the last one to metrics.jsonl, and start the next window."""
        window, self.counters.window = self.counters.window, Window()
        if not window.losses:
            return  # every step was skipped
        nats = sum(window.losses) / len(window.losses)
        self.run.log.write(
            {
                "split": "train",
                **_place(self.counters),
                "nats_per_token": nats,
                "bpc": bits(nats) / self.run.characters_ratio,
                "lr": lr,
                "grad_norm": sum(window.norms) / len(window.norms),
                "grad_norm_max": max(window.norms),
                "tokens_per_second": window.tokens / max(window.seconds, 1e-9),
            }
        )


def validate(run: Run) -> Likelihood:
    """Evaluate on the validation windows: log the bound, save the best weights, count evaluations that stalled."""
    counters = run.counters
    run.model.eval()
    start = run.clock.seconds()
    # `evaluate` uses the same noise at every call
    result = run.engine.evaluate(run.valid, run.characters_per_token, progress=Counted(lambda _: run.stop_if_asked()))
    run.model.train()
    run.log.write(
        {
            "split": "valid",
            **_place(counters),
            "nats_per_token": result.nats_per_token,
            "bpc": result.bpc,
            "stderr": result.stderr,
        }
    )
    if result.nats_per_token < counters.best - run.config.train.stall_tolerance:
        counters.best, counters.stalled = result.nats_per_token, 0
    else:
        counters.stalled += 1
    if result.nats_per_token < counters.lowest:
        counters.lowest = result.nats_per_token
        run.save_best(result)
    counters.due = False
    counters.spent.evaluation = run.clock.seconds() - start
    counters.spent.per_window = counters.spent.evaluation / len(run.valid)
    return result
