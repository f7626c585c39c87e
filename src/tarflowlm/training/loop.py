"""One stage of training: the optimiser steps, and what is logged about them."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tarflowlm.baseline import TokenLM
from tarflowlm.checkpoint import Model
from tarflowlm.data import WindowSampler
from tarflowlm.evaluation.likelihood import Likelihood
from tarflowlm.model import TarFlowLM
from tarflowlm.objective import elbo
from tarflowlm.training.config import RunConfig
from tarflowlm.training.metrics import MetricsLog
from tarflowlm.training.optim import schedule, set_learning_rate
from tarflowlm.training.parallel import Engine
from tarflowlm.training.step import optimizer_step


@dataclass
class Counters:
    """Where a run stands. All of it is saved, so that a resumed run goes on as if it had never stopped."""

    step: int = 0
    """Optimiser steps of all stages."""
    tokens: int = 0
    stage: int = 0
    stage_step: int = 0
    """Steps of the current stage."""
    best: float = math.inf
    """Best validation bound of the stage, in nats per token."""
    stalled: int = 0
    """Evaluations since it improved."""
    seconds: list[float] = field(default_factory=list)
    """Training time of every stage."""
    stage_tokens: list[int] = field(default_factory=list)
    valid_bpc: list[float] = field(default_factory=list)
    """Validation bound at the end of every finished stage, bits per character."""


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


def train_stage(
    model: Model,
    optimizers: list[torch.optim.Optimizer],
    context: StageContext,
    counters: Counters,
    *,
    engine: Engine,
) -> Likelihood:
    """Optimiser steps until the stage's budget is used up, or its validation bound stalls; returns that bound.

    `engine` was made of `model`, with the blocks below the stage frozen. Raises FloatingPointError, naming block and
    term, when the loss is no longer finite.
    """
    config = context.run.train
    num_steps = config.stage_steps[counters.stage]
    averages = _Averages(context, engine)
    while True:
        lr = context.run.optim.lr * schedule(context.run.optim, counters.stage_step, num_steps)
        tokens = context.sampler.next().to(context.device)
        set_learning_rate(optimizers, lr)
        loss, norm = optimizer_step(engine, optimizers, tokens, generator=context.generator)
        num_tokens = tokens.numel() * engine.processes.world
        counters.step += 1
        counters.stage_step += 1
        counters.tokens += num_tokens
        counters.stage_tokens[counters.stage] += num_tokens
        context.log.reporter.step(num_tokens)
        averages.add(loss, norm, num_tokens)
        last = counters.stage_step == num_steps
        look = last or counters.step % config.evaluate_every == 0
        save = counters.step % config.checkpoint_every == 0
        if look or save or counters.step % config.log_every == 0:
            counters.seconds[counters.stage] += averages.flush(tokens, counters, lr)
        # The checkpoint comes after all else that belongs to its step, so that a resumed run leaves nothing out
        # and repeats nothing; the caller saves the end of a stage.
        if look:
            result = validate(engine, context, counters)
            if last or (config.advance == "stall" and counters.stalled >= config.stall_evaluations):
                return result
        if save:
            context.checkpoint()
        if look or save:
            averages.restart()


class _Averages:
    """Sums over the steps since the last line of the log; reads the device once per line."""

    def __init__(self, context: StageContext, engine: Engine) -> None:
        self.context, self.engine = context, engine
        self._reset()

    def _reset(self) -> None:
        self.loss: Tensor | float = 0.0
        self.norm: Tensor | float = 0.0
        self.steps = self.tokens = 0
        self.elapsed, self.start = 0.0, time.perf_counter()

    def restart(self) -> None:
        """Time spent since the last step was not training."""
        self.start = time.perf_counter()

    def add(self, loss: Tensor, norm: Tensor, tokens: int) -> None:
        self.loss, self.norm = self.loss + loss, self.norm + norm
        self.steps, self.tokens = self.steps + 1, self.tokens + tokens
        now = time.perf_counter()
        self.elapsed, self.start = self.elapsed + now - self.start, now

    def flush(self, tokens: Tensor, counters: Counters, lr: float) -> float:
        """Write the line; returns the seconds of training it covers."""
        nats, norm, seconds = float(self.loss) / self.steps, float(self.norm) / self.steps, self.elapsed
        if not math.isfinite(nats) or not math.isfinite(norm):
            everyones = self.engine.processes.gather(tokens)
            raise FloatingPointError(non_finite_report(self.engine.whole(), everyones, counters.step))
        self.context.log.write(
            {
                "split": "train",
                "step": counters.step,
                "tokens": counters.tokens,
                "block": counters.stage + 1,
                "nats_per_token": nats,
                "bpc": nats / math.log(2) / self.context.characters_ratio,
                "lr": lr,
                "grad_norm": norm,
                "tokens_per_second": self.tokens / max(seconds, 1e-9),
            }
        )
        self._reset()
        return seconds


def validate(engine: Engine, context: StageContext, counters: Counters) -> Likelihood:
    """Evaluate on the validation windows, log it, and count the evaluations without an improvement."""
    engine.model.eval()
    # the same noise at every call
    result = engine.evaluate(context.valid, context.characters_per_token)
    engine.model.train()
    context.log.write(
        {
            "split": "valid",
            "step": counters.step,
            "tokens": counters.tokens,
            "block": counters.stage + 1,
            "nats_per_token": result.nats_per_token,
            "bpc": result.bpc,
            "stderr": result.stderr,
        }
    )
    if result.nats_per_token < counters.best - context.run.train.stall_tolerance:
        counters.best, counters.stalled = result.nats_per_token, 0
    else:
        counters.stalled += 1
    return result


@torch.no_grad()
def non_finite_report(model: Model, tokens: Tensor, step: int) -> str:
    """One line that names the block, the term and the parameters that are no longer finite."""
    bad = [name for name, p in model.named_parameters() if not torch.isfinite(p).all()]
    terms: dict[str, Any] = {}
    if isinstance(model, TokenLM):
        terms = {"log_prob": model.log_prob(tokens)}
    elif isinstance(model, TarFlowLM):
        parts = elbo(model, tokens)
        terms = {"reconstruction": parts.reconstruction, "log_q": parts.log_q, "base": parts.base}
        terms |= {f"log-det of block {i + 1}": value for i, value in enumerate(parts.log_dets)}
    broken = [name for name, value in terms.items() if not torch.isfinite(value).all()]
    return (
        f"the loss or gradient is not finite at step {step}: terms {', '.join(broken) or 'all finite now'}; "
        f"parameters {', '.join(bad[:5]) or 'all finite'}; lower optim.lr, or resume from the last checkpoint"
    )
