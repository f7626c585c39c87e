"""A whole run: data, model, the stages one after another, checkpoints, summary; and going on with a stopped run."""

import math
import platform
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from tarflowlm.checkpoint import Model, build_model, read_run, save_weights, write_run
from tarflowlm.data import SOURCE_NAMES, Corpus, WindowSampler, cached_corpus, eval_windows
from tarflowlm.errors import UserError
from tarflowlm.evaluation.likelihood import evaluate
from tarflowlm.files import write_json
from tarflowlm.model import FlowConfig, TarFlowLM, seeded
from tarflowlm.training.config import RunConfig
from tarflowlm.training.loop import Counters, StageContext, train_stage
from tarflowlm.training.metrics import MetricsLog, Reporter
from tarflowlm.training.optim import build_optimizers
from tarflowlm.training.state import load_state, newest_state, read_counters, save_state

SUMMARY = "summary.json"


def train(
    run: RunConfig,
    out: Path,
    *,
    device: torch.device,
    reporter: Reporter | None = None,
) -> dict[str, Any]:
    """Train `run` into the new directory `out` and return its summary (also written to summary.json).

    Raises UserError, before anything is written, when `out` exists and is not empty.
    """
    reporter = reporter or Reporter()
    check_new(out)
    corpus = cached_corpus(
        run.data.source, run.data.tokenizer, progress=reporter.preparing, notice=reporter.notice
    )
    if run.data.source not in SOURCE_NAMES:
        # the run directory is used from other folders too
        run = replace(run, data=replace(run.data, source=str(Path(run.data.source).expanduser().resolve())))
    run = replace(run, model=replace(run.model, vocab_size=_checked_vocab_size(run, corpus)))
    _check_lengths(run, corpus)
    parts = _Run(run, out, corpus, device, reporter)
    out.mkdir(parents=True, exist_ok=True)
    write_run(out, run, corpus.tokenizer)
    return parts.go(Counters())


def resume(out: Path, *, device: torch.device, reporter: Reporter | None = None) -> dict[str, Any]:
    """Continue a stopped run from its newest complete state, to the same weights as if it had never stopped."""
    reporter = reporter or Reporter()
    run = read_run(out)
    if (out / SUMMARY).exists():
        raise UserError(f"{out} is finished: there is nothing to resume; train anew with another --out")
    state = newest_state(out)
    corpus = cached_corpus(
        run.data.source, run.data.tokenizer, progress=reporter.preparing, notice=reporter.notice
    )
    saved = read_counters(state)
    reporter.notice(f"resuming {out} at step {saved['counters']['step']}")
    return _Run(run, out, corpus, device, reporter).go(Counters(**saved["counters"]), state, saved["sampler"])


def check_new(out: Path) -> None:
    """UserError unless `out` is free to be written."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists already: choose another --out, or continue it with `train --resume {out}`")


def freeze_below(model: Model, stage: int) -> None:
    """Leave only block `stage` trainable; stage 0 trains all that is there, the codebook included."""
    if stage > 0 and isinstance(model, TarFlowLM):
        model.requires_grad_(False)
        model.prior.blocks[stage].requires_grad_(True)


def _checked_vocab_size(run: RunConfig, corpus: Corpus) -> int:
    size, asked = corpus.tokenizer.vocab_size, run.model.vocab_size
    if asked not in (0, size):
        raise UserError(f"model.vocab_size {asked}: the tokenizer has {size} symbols; leave it at 0")
    return size


def _check_lengths(run: RunConfig, corpus: Corpus) -> None:
    for name in ("train", "valid", "test"):
        have = corpus.num_tokens(name)
        if have < run.model.context:
            raise UserError(
                f"the {name} split of {run.data.source} has {have} tokens, fewer than the context of "
                f"{run.model.context}: use a longer text or a smaller model.context"
            )


class _Run:
    """The parts of one run, from its first step or from a saved state."""

    def __init__(
        self,
        run: RunConfig,
        out: Path,
        corpus: Corpus,
        device: torch.device,
        reporter: Reporter,
    ) -> None:
        self.run, self.out, self.corpus, self.device, self.reporter = run, out, corpus, device, reporter
        self.sampler = WindowSampler(
            corpus.split("train"), window=run.model.context, batch=run.train.batch_size, seed=run.seed
        )
        self.characters_per_token = torch.from_numpy(corpus.tokenizer.characters_per_token)
        self.generator = torch.Generator(device=device).manual_seed(run.seed)
        self.progressive = run.num_stages > 1
        self.model = self._initial_model()
        self.optimizers: list[torch.optim.Optimizer] = []
        self.counters = Counters()

    def _initial_model(self) -> Model:
        """Block 1 alone where the run is progressive; everything otherwise."""
        config = self.run.model
        if self.progressive and isinstance(config, FlowConfig):
            with seeded(self.run.seed):
                model = TarFlowLM(config.first_blocks(1))
            model.config = config
            return model.to(self.device)
        with seeded(self.run.seed):
            return build_model(config).to(self.device)

    def go(
        self, counters: Counters, state: Path | None = None, sampler: dict[str, int] | None = None
    ) -> dict[str, Any]:
        self.counters = counters
        log = MetricsLog(self.out, self.reporter, resume_at=counters.step if state else None)
        context = StageContext(
            run=self.run,
            sampler=self.sampler,
            valid=eval_windows(self.corpus.split("valid"), self.run.model.context, self.run.train.evaluate_windows),
            characters_per_token=self.characters_per_token,
            characters_ratio=self.corpus.num_characters("train") / self.corpus.num_tokens("train"),
            generator=self.generator,
            device=self.device,
            log=log,
            checkpoint=self.save,
        )
        start = time.perf_counter()
        try:
            self._enter(min(counters.stage, self.run.num_stages - 1))
            if state is not None and sampler is not None:
                load_state(state, self.model, self.optimizers, self.generator)
                self.sampler.load_state_dict(sampler)
            while counters.stage < self.run.num_stages:
                self._announce(counters.stage)
                end = train_stage(self.model, self.optimizers, context, counters, frozen=counters.stage)
                counters.valid_bpc.append(end.bpc)
                self._leave_stage()
            return self._finish(time.perf_counter() - start)
        finally:
            log.close()

    def _enter(self, stage: int) -> None:
        """Grow the model to `stage` + 1 blocks, freeze all but the last, and build fresh optimisers."""
        if self.progressive and isinstance(self.model, TarFlowLM):
            while self.model.num_blocks < stage + 1:
                with seeded(self.run.seed + 1000 * self.model.num_blocks):
                    self.model.append_block()
                self.optimizers = []
            freeze_below(self.model, stage)
        if not self.optimizers:
            self.optimizers = build_optimizers(self.run.optim, self.model)
        if len(self.counters.seconds) < stage + 1:
            self.counters.seconds.append(0.0)
            self.counters.stage_tokens.append(0)

    def _leave_stage(self) -> None:
        """Save the end of a stage: weights without the next block, and a state that goes on with it."""
        counters = self.counters
        counters.stage, counters.stage_step = counters.stage + 1, 0
        counters.best, counters.stalled = math.inf, 0
        self._save_weights()
        if counters.stage < self.run.num_stages:
            self._enter(counters.stage)
        self._save_state()

    def _announce(self, stage: int) -> None:
        steps, done = self.run.train.stage_steps[stage], self.counters.stage_step
        self.reporter.stage(stage, self.run.num_stages, steps, done, self._describe(stage))

    def _describe(self, stage: int) -> str:
        config = self.run.model
        if not isinstance(config, FlowConfig):
            return "baseline"
        return f"block {stage + 1} {config.couplings[stage]}" if self.progressive else "all blocks"

    def save(self) -> None:
        """Weights first, so that the directory loads; then the state to resume from."""
        self._save_weights()
        self._save_state()

    def _save_weights(self) -> None:
        blocks = self.model.num_blocks if isinstance(self.model, TarFlowLM) else 0
        info = {"step": str(self.counters.step), "tokens": str(self.counters.tokens), "blocks": str(blocks)}
        save_weights(self.out, self.model, info)

    def _save_state(self) -> None:
        saved = {
            "step": self.counters.step,
            "counters": asdict(self.counters),
            "sampler": self.sampler.state_dict(),
        }
        save_state(self.out, self.model, self.optimizers, self.generator, saved)

    def _finish(self, wall: float) -> dict[str, Any]:
        self.model.eval()
        windows = eval_windows(self.corpus.split("test"), self.run.model.context, self.run.train.test_windows or None)
        self.reporter.notice(f"evaluating {len(windows):,} windows of the test split")
        test = evaluate(self.model, windows, self.characters_per_token)
        counters = self.counters
        summary = {
            "preset": self.run.name,
            "seed": self.run.seed,
            "steps": counters.step,
            "tokens": counters.tokens,
            "stage_tokens": counters.stage_tokens,
            "stage_seconds": [round(s, 2) for s in counters.seconds],
            "stage_valid_bpc": counters.valid_bpc,
            "seconds": round(sum(counters.seconds), 2),
            "wall_seconds": round(wall, 2),
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "trunk_parameters": sum(p.numel() for n, p in self.model.named_parameters() if "transformer." in n),
            "test": test.to_json(),
            "source": self.run.data.source,
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "device": str(self.device),
            "machine": platform.machine(),
        }
        write_json(self.out / SUMMARY, summary)
        return summary
