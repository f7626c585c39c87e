"""One stage of training: the optimiser steps, and what is logged about them."""

import time
from dataclasses import dataclass

import torch
from torch import Tensor

from tarflowlm.evaluation.likelihood import Likelihood, bits
from tarflowlm.training.guards import POLL, Guard, broken_gradients, in_words, skipped_record
from tarflowlm.training.optim import schedule, set_learning_rate
from tarflowlm.training.pace import Pace, StepPace, TimePace
from tarflowlm.training.run import Run
from tarflowlm.training.state import Counters, Window
from tarflowlm.training.step import optimizer_step


def train_stage(run: Run) -> Likelihood:
    """Optimiser steps until the stage's budget is used up, or its validation bound stalls; returns that bound.

    Raises FloatingPointError, naming terms and parameters, when the loss or gradient of too many steps in a row is
    not finite, and Stopped when asked to stop.
    """
    config, counters = run.config.train, run.counters
    every = steps_between_looks(run.device)
    pace = stage_pace(run, every)
    steps = _StepLog(run)
    while True:
        # checkpoints are made before this: a kill in a long evaluation loses nothing, a resumed run begins with it
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
    """A CPU can be read at any time; a GPU would have to wait. (On mps fused AdamW cannot leave a step out.)"""
    return POLL if device.type == "cuda" else 1


def stage_pace(run: Run, every: int) -> Pace:
    """Steps or time, as the run has it."""
    train, counters = run.config.train, run.counters
    if not train.minutes:
        return StepPace(train.stage_steps[counters.stage])
    return TimePace(train, counters.stage, counters.spent, run.clock, run.num_test_windows, every)


def _step(run: Run, steps: "_StepLog", *, deferred: bool) -> int:
    """One step on the next batch, counted; its loss goes to `steps`, which may read it later. Returns its tokens."""
    counters, tokens = run.counters, run.sampler.next()
    if run.device.type == "cuda":
        # from pageable memory the host would wait for all work queued on the device
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

    def __init__(self, run: Run) -> None:
        self.run, self.counters = run, run.counters
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
            if sigmas > self.run.config.train.spike_sigma:
                figures = {"nats_per_token": loss, "mean": mean, "sigmas": sigmas, "grad_norm": norm}
                place = {name: taken.place[name] for name in ("step", "block")}
                self.run.log.write({"split": "spike", **place, **figures})
        now = time.perf_counter()
        window.seconds += now - self.start
        counters.seconds[counters.stage] += now - self.start
        self.start = now

    def _tell(self, taken: _Taken) -> None:
        """Record a step that was left out; too many in a row are an error."""
        counters, engine, noise = self.counters, self.run.engine, torch.Generator(device=self.run.device)
        counters.skipped += 1
        gradients = taken.guard.broken
        if gradients is None:
            # the parameters may have moved on since; the batch is the same, and mostly so is what is wrong with it
            noise.set_state(taken.noise)
            engine.backward(taken.tokens, noise)
            gradients = broken_gradients(engine.model)
            engine.model.zero_grad(set_to_none=True)
        noise.set_state(taken.noise)
        everyones = self.run.processes.gather(taken.tokens)
        told = skipped_record(engine.whole(), everyones, noise, gradients, taken.loss)
        record = {"split": "skipped", **taken.place} | told
        self.run.log.write(record)
        if counters.skipped > self.run.config.train.max_skipped:
            raise FloatingPointError(
                f"{in_words(record)}; {counters.skipped} in a row: lower optim.lr or optim.grad_clip in a new run; "
                f"the checkpoints before are kept"
            )
        self.run.reporter.notice(f"skipped: {in_words(record)}")

    def write_line(self, lr: float) -> None:
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
    """Evaluate on the validation windows, log it, keep the best, and count what did not improve enough."""
    counters = run.counters
    run.model.eval()
    start = run.clock.seconds()
    # the same noise at every call
    result = run.engine.evaluate(run.valid, run.characters_per_token, progress=lambda *_: run.stop_if_asked())
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
