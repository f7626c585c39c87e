"""Training the draft of a finished run: `train_draft`, which also resumes (docs/math.md, section 7, "Drafts")."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from tarflowlm.data import Corpus, WindowSampler, cached_corpus, eval_windows
from tarflowlm.draft import Draft, DraftConfig
from tarflowlm.errors import Stopped, UserError
from tarflowlm.files import full_disk_as_user_error, write_json, writer_lock
from tarflowlm.language_model import seeded
from tarflowlm.model import TarFlowLM, as_flow
from tarflowlm.runs.checkpoint import STATE, SUMMARY, Checkpoint, export, load_checkpoint
from tarflowlm.runs.config import OptimConfig, checked_seed
from tarflowlm.runs.drafts import DRAFT, WEIGHTS, save_draft
from tarflowlm.runs.strict_json import from_dict
from tarflowlm.training.draft_pairs import draft_loss, draw_frontiers, pairs_of, tokens_per_pass
from tarflowlm.training.metrics import MetricsLog, Reporter
from tarflowlm.training.optim import build_optimizers, schedule, set_learning_rate, with_precision
from tarflowlm.training.pace import Clock
from tarflowlm.training.run import StopRequests, no_stop_requests
from tarflowlm.training.state import load_state, newest_state, read_counters, remove_partial, save_state

VALID_WINDOWS = 16
"""Windows of the validation split on which tokens per pass are measured."""
MAX_NORM = 1.0
"""Largest gradient norm."""


@dataclass(frozen=True, kw_only=True)
class DraftTraining:
    """How a draft is trained."""

    steps: int = 4000
    """Optimiser steps."""
    minutes: float = 0.0
    """Train for this time instead, over all sessions; 0 counts steps."""
    batch_size: int = 8
    """Sequences per step."""
    frontiers: int = 64
    """Positions of each sequence from which is drafted in a step. Neighbours teach nearly the same."""
    lr: float = 6e-3
    """Peak learning rate."""
    seed: int = 0
    """Seed of the start, the order of the data, the noise and the frontiers."""
    evaluate_every: int = 250
    """Steps between measurements on the validation split, and between checkpoints."""

    def __post_init__(self) -> None:
        checked_seed(self.seed)
        for name in ("steps", "batch_size", "frontiers", "evaluate_every"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} {getattr(self, name)}: must be at least 1")
        if not 0 <= self.minutes < float("inf"):
            raise UserError(f"minutes {self.minutes}: must be above 0 and finite, or 0 to train by steps")
        if not self.lr > 0:
            raise UserError(f"lr {self.lr}: must be above 0")


def train_draft(
    directory: Path,
    *,
    config: DraftConfig,
    training: DraftTraining | None = None,
    data: str | None = None,
    out: Path | None = None,
    resume: bool = False,
    device: torch.device,
    reporter: Reporter | None = None,
    stop_requests: StopRequests = no_stop_requests,
) -> dict[str, Any]:
    """Train a draft for the run in `directory`, and store it in its folder draft/; returns the summary.

    `out`: leave the run as it is, and train for an exported copy of it there. `data`: another text than the run's.
    `resume` continues from the newest state, with the `config` it had, and the steps and minutes of `training`; by
    default those it had.

    UserError for a baseline, an unfinished run, a draft that exists already, nothing to resume, and as in
    `load_checkpoint`. Stopped, with everything saved, if `stop_requests` says so.
    """
    reporter = reporter or Reporter()
    if not resume:
        training = training or DraftTraining()
    checkpoint = _finished(directory, device)
    model = as_flow(checkpoint.model)
    folder = (directory if out is None else out) / DRAFT
    can_resume = _has_state(folder)
    if not resume and (can_resume or (folder / WEIGHTS).exists()):
        go_on = "continue it with --resume, or " if can_resume else ""
        raise UserError(f"{folder} exists already: {go_on}remove it to start again")
    if resume and not can_resume:
        raise UserError(f"{folder} holds no training state: leave --resume out to start")
    model.new_draft(config)
    corpus = _corpus(checkpoint, data, reporter)
    if out is not None:
        export(directory, out)
        shutil.rmtree(out / DRAFT, ignore_errors=True)
        directory = out

    def remedy() -> str:
        if _has_state(folder):
            return f"continue with `tarflowlm draft {directory} --resume`"
        rest = f"remove {folder} and " if (folder / WEIGHTS).exists() else ""
        return f"{rest}start again with `tarflowlm draft {directory}`"

    with full_disk_as_user_error(directory, remedy), writer_lock(directory):
        folder.mkdir(exist_ok=True)
        run = _DraftRun(directory, model, corpus, config, training, reporter, resume=resume)
        with stop_requests() as run.stop_signal, run.logging():
            return run.train()


def _has_state(folder: Path) -> bool:
    """Whether there is something to resume. The folder of the states is there before the first of them."""
    return any((folder / STATE).glob("step-*"))


def _finished(directory: Path, device: torch.device) -> Checkpoint:
    """The model of a finished run that a draft can serve."""
    if (directory / STATE).exists() and not (directory / SUMMARY).exists():
        raise UserError(f"{directory} is not finished: continue it with `tarflowlm train --resume {directory}` first")
    checkpoint = load_checkpoint(directory, device)
    if checkpoint.model.is_exact:
        raise UserError(f"{directory} is a baseline, which has no block 1: give the run of a flow")
    return checkpoint


def _corpus(checkpoint: Checkpoint, data: str | None, reporter: Reporter) -> Corpus:
    source = checkpoint.run.data.source if data is None else data
    return cached_corpus(source, checkpoint.tokenizer, progress=reporter.preparing, notice=reporter.notice)


class _DraftRun:
    """The state of a training: draft, optimisers, data, and the counters that are saved with them."""

    def __init__(
        self,
        directory: Path,
        model: TarFlowLM,
        corpus: Corpus,
        config: DraftConfig,
        training: DraftTraining | None,
        reporter: Reporter,
        *,
        resume: bool,
    ) -> None:
        self.directory, self.folder, self.model = directory, directory / DRAFT, model.requires_grad_(False)
        self.corpus, self.reporter = corpus, reporter
        saved: dict[str, Any] = {}
        if resume:
            remove_partial(self.folder)
            state = newest_state(self.folder, reporter.notice)
            saved = read_counters(state)
            config = from_dict(DraftConfig, saved["config"])
            if corpus.fingerprint != saved["corpus"]:
                raise UserError(f"{self.folder} was trained on another text: give that one with --data")
            before = from_dict(DraftTraining, saved["training"])
            if training is not None:
                before = replace(before, steps=training.steps, minutes=training.minutes)
            training = before
        assert training is not None
        self.training = training
        with seeded(self.training.seed):
            self.draft: Draft = model.new_draft(config).to(model.device)
        optim = OptimConfig(lr=self.training.lr)
        self.optim = with_precision(optim, self.draft, model.device)
        self.optimizers = build_optimizers(self.optim, self.draft)
        self.generator = torch.Generator().manual_seed(self.training.seed)
        context = model.config.context
        self.sampler = WindowSampler(
            corpus.split("train"), window=context, batch=self.training.batch_size, seed=self.training.seed
        )
        self.valid = pairs_of(
            model,
            eval_windows(corpus.split("valid"), context, VALID_WINDOWS).to(model.device),
            torch.Generator().manual_seed(self.training.seed),
        )
        self.step, self.tokens_per_pass = 0, saved.get("tokens_per_pass", 0.0)
        if saved:
            load_state(state, self.draft, self.optimizers, self.generator)
            self.sampler.load_state_dict(saved["sampler"])
            self.step = saved["step"]
            reporter.notice(f"resuming {self.folder} at step {self.step}")
        self.clock = Clock(saved.get("seconds", 0.0))
        self.validation = saved.get("validation", 0.0)
        """The longest measurement on the validation split so far, in seconds. The last one ends the training."""
        self._log_at = saved.get("metrics", 0)
        self.stop_signal: Any = lambda: None
        self.log: MetricsLog

    @contextmanager
    def logging(self) -> Iterator[None]:
        """With metrics.jsonl open, cut back to where the state was saved."""
        self.log = MetricsLog(self.folder, self.reporter, resume_at=self._log_at)
        try:
            yield
        finally:
            self.log.close()

    def share(self) -> float:
        """How much of the steps or of the time is over, 0 to 1."""
        if not self.training.minutes:
            return min(1.0, self.step / self.training.steps)
        left = 60 * self.training.minutes - self.validation
        return min(1.0, self.clock.seconds() / left) if left > 0 else 1.0

    def train(self) -> dict[str, Any]:
        """Train to the end; returns the summary, which is also written to draft/summary.json."""
        limited = self.training.minutes > 0
        self.reporter.stage(0, 1, 0 if limited else self.training.steps, self.step, "draft of block 1")
        begun, tokens, share = self.clock.seconds(), 0, self.share()
        while share < 1 or not self.step:
            loss, count = self._step(share)
            tokens += count
            share = self.share()
            self.reporter.step(count, share if limited else None)
            asked = self.stop_signal()
            if self.step % self.training.evaluate_every == 0 or share >= 1 or asked is not None:
                rate = tokens / max(self.clock.seconds() - begun, 1e-9)
                self.log.write({"step": self.step, "split": "train", "loss": loss, "tokens_per_second": rate})
                self._validate()
                self._save()
                share = self.share()
                begun, tokens = self.clock.seconds(), 0
            if asked is not None:
                raise Stopped(
                    f"stopped by {asked} and saved at step {self.step}; continue with "
                    f"`tarflowlm draft {self.directory} --resume`"
                )
        summary = {
            "steps": self.step,
            "seconds": round(self.clock.seconds(), 1),
            "tokens_per_pass": round(self.tokens_per_pass, 4),
            "parameters": sum(p.numel() for p in self.draft.parameters()),
        }
        write_json(self.folder / SUMMARY, summary)
        return summary

    def _step(self, share: float) -> tuple[float, int]:
        """One optimiser step; returns its loss in nats per token, and how many tokens block 1 saw."""
        steps = self.training.steps if not self.training.minutes else self.step / share if share > 0 else 1000.0
        rate = self.training.lr * schedule(self.optim, self.step, max(steps, self.step + 1))
        set_learning_rate(self.optimizers, rate)
        pairs = pairs_of(self.model, self.sampler.next().to(self.model.device), self.generator)
        front = draw_frontiers(self.draft, pairs, self.training.frontiers, self.generator)
        loss = draft_loss(self.model, self.draft, pairs, front)
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.draft.parameters(), MAX_NORM, error_if_nonfinite=False)
        for optimizer in self.optimizers:
            optimizer.step()
        self.step += 1
        return loss.item(), pairs.tokens.numel()

    def _validate(self) -> None:
        begun = self.clock.seconds()
        self.tokens_per_pass = tokens_per_pass(self.model, self.draft, self.valid)
        record = {"step": self.step, "split": "valid", "tokens_per_pass": self.tokens_per_pass}
        self.log.write(record | {"seconds": round(self.clock.seconds(), 1)})
        self.validation = max(self.validation, self.clock.seconds() - begun)

    def _save(self) -> None:
        info = {"step": str(self.step), "tokens_per_pass": f"{self.tokens_per_pass:.4f}"}
        save_draft(self.directory, self.draft, info)
        counters = {
            "step": self.step,
            "seconds": self.clock.seconds(),
            "validation": self.validation,
            "tokens_per_pass": self.tokens_per_pass,
            "config": asdict(self.draft.config),
            "training": asdict(self.training),
            "sampler": self.sampler.state_dict(),
            "corpus": self.corpus.fingerprint,
            "metrics": self.log.position(),
        }
        save_state(self.folder, self.draft, self.optimizers, self.generator, counters)
