"""A training run in progress: its model, optimisers, data and counters, and its checkpoints."""

import logging
import math
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tarflowlm.config import RunConfig
from tarflowlm.data import Corpus, WindowSampler, eval_windows
from tarflowlm.errors import Stopped, UserError
from tarflowlm.evaluation.likelihood import Likelihood
from tarflowlm.files import read_json
from tarflowlm.language_model import seeded
from tarflowlm.progress import SILENT, Progress
from tarflowlm.runs.checkpoint import BEST, COUNTERS, STATE, TOKENIZER, save_weights, write_run
from tarflowlm.training.metrics import MetricsLog, Reporter, Trackers
from tarflowlm.training.optim import NAMED, RunningLoss, build_optimizers, with_precision
from tarflowlm.training.parallel import ParallelModel, Processes, whole_weights
from tarflowlm.training.state import Counters, load_state, save_state

logger = logging.getLogger("tarflowlm")


class TrainingRun:
    """A run in progress. Every process holds the same, but only the first writes files, from `write_start` on.

    `model` has the blocks of the stages so far; `parallel_model` trains those of the current stage.
    """

    parallel_model: ParallelModel
    optimizers: list[torch.optim.Optimizer]
    log: MetricsLog

    def __init__(
        self, config: RunConfig, out: Path, corpus: Corpus, device: torch.device, reporter: Reporter, group: Processes
    ) -> None:
        self.out, self.corpus, self.device, self.reporter, self.processes = out, corpus, device, reporter, group
        self.session_start = time.monotonic()
        batch = group.rows_each(config.train.batch_size, config.train.accumulate)
        part = {"batch": batch, "rank": group.rank, "world": group.world}
        self.sampler = WindowSampler(corpus.split("train"), window=config.model.context, seed=config.seed, **part)
        self.valid = eval_windows(corpus.split("valid"), config.model.context, config.train.evaluate_windows)
        self.characters_per_token = torch.from_numpy(corpus.tokenizer.characters_per_token)
        self.characters_ratio = corpus.num_characters("train") / corpus.num_tokens("train")
        self.generator = torch.Generator(device=device).manual_seed(config.seed)
        with seeded(config.seed):
            self.model = config.model_of_stage(0).build()
        self.model.config = config.model
        # decided by one process for all, and recorded in the configuration
        self.config = replace(config, optim=group.from_first(with_precision(config.optim, self.model, device)))
        available = corpus.num_tokens("test") // config.model.context
        self.num_test_windows = min(config.train.test_windows or available, available)
        self.counters = Counters()
        self.saved_step: int | None = None
        self.stop_signal: Callable[[], str | None] = lambda: None

    def write_start(self) -> None:
        """Write the files of a run directory; the empty folder of states distinguishes it from an exported model."""
        write_run(self.out, self.config, self.corpus.tokenizer)
        (self.out / STATE).mkdir(exist_ok=True)

    def start(self, state: Path | None) -> None:
        """Enter the first stage, or load `state` and enter its stage; open the log, cut back to where it was then."""
        saved: dict[str, Any] = {"step": 0, "metrics": 0} if state is None else read_json(state / COUNTERS)
        if state is not None:
            if saved["corpus"] != self.corpus.fingerprint:
                text = f"{self.config.data.source} is not the text that {self.out} was trained on"
                raise UserError(f"{text}: restore that text to resume")
            logger.info("resuming %s at step %d", self.out, saved["step"])
            self.counters, self.saved_step = Counters.restored(saved["counters"]), saved["step"]
        self.enter_stage(min(self.counters.stage, self.config.num_stages - 1))
        if state is not None:
            load_state(state, self.model, self.optimizers, self.generator, processes=self.processes)
            self.sampler.load_state_dict(saved["sampler"])
            # they may be damaged, or a kill came between the state and its weights
            self._write_weights(self.out, self._finite_weights())
        first, place = self.processes.first, saved["metrics"]
        trackers = Trackers(self.config, self.out, resume_at=saved["step"]) if first else None
        self.log = MetricsLog(self.out if first else None, self.reporter, resume_at=place, trackers=trackers)
        self.session_start -= self.counters.spent.total
        if not self.counters.step:
            self.counters.spent.stage_start = self.seconds()

    def seconds(self) -> float:
        """Wall-clock seconds since the run began, without the time between sessions. Collective."""
        return self.processes.from_first(time.monotonic() - self.session_start)

    def enter_stage(self, stage: int) -> None:
        """Append the blocks of `stage` to the model, freeze all blocks but its own, and build new optimisers."""
        while self.model.num_blocks < self.config.model_of_stage(stage).num_blocks:
            with seeded(self.config.seed + 1000 * self.model.num_blocks):
                self.model.append_block()
        if self.processes.world == 1 or self.config.train.parallel == "ddp":
            self.model.to(self.device)  # FSDP2 moves shards one by one: the whole model need not fit on the device
        self.model.train_only(stage)
        self.parallel_model = ParallelModel(self.model, self.config, self.processes, frozen=stage)
        self.optimizers = build_optimizers(self.config.optim, self.model)
        if len(self.counters.seconds) < stage + 1:
            self.counters.seconds.append(0.0)
            self.counters.stage_tokens.append(0)

    def leave_stage(self, end: Likelihood) -> None:
        """Record the final validation `end` of a stage and enter the next one."""
        counters = self.counters
        counters.valid_bpc.append(end.bpc)
        counters.stage_steps.append(counters.stage_step)
        counters.stage, counters.stage_step = counters.stage + 1, 0
        counters.lowest, counters.running = math.inf, RunningLoss()
        if counters.stage < self.config.num_stages:
            self.model = self.parallel_model.whole_model()
            self.enter_stage(counters.stage)
        counters.spent.stage_start = self.seconds()
        # a stage with a time limit may end at an evaluation, some steps after its last checkpoint
        self.save()

    def describe_stage(self) -> str:
        """The current stage in words, such as "stage 2/3: block 2 mix1"."""
        stage, num_stages = self.counters.stage, self.config.num_stages
        if num_stages > 1:
            return f"stage {stage + 1}/{num_stages}: {self.config.model.describe(stage)}"
        return self.config.model.describe(0) if self.config.model.num_blocks == 1 else "all blocks"

    def evaluate(self, windows: Tensor, progress: Progress = SILENT) -> Likelihood:
        """The bound over `windows` [W, T]. Stops in between if the run was asked to. Collective."""
        return self.parallel_model.evaluate(windows, self.characters_per_token, _StoppableProgress(self, progress))

    def save(self) -> None:
        """Save a checkpoint, unless this step is saved: the state, then the weights, so that the directory loads."""
        counters = self.counters
        if self.saved_step == counters.step:
            return
        start, weights = self.seconds(), self._finite_weights()
        counters.spent.total = start + counters.spent.save  # the time of this save is estimated from the last one
        saved: dict[str, Any] = {"step": counters.step, "counters": asdict(counters), "metrics": self.log.position()}
        saved |= {"sampler": self.sampler.state_dict(), "corpus": self.corpus.fingerprint}
        keep, processes = self.config.train.keep_last, self.processes
        save_state(self.out, self.model, self.optimizers, self.generator, saved, keep=keep, processes=processes)
        self._write_weights(self.out, weights)
        self.saved_step = counters.step
        counters.spent.save = self.seconds() - start

    def save_best(self, result: Likelihood) -> None:
        """Save the weights of the best validation bound to best/, a run directory of its own."""
        best = self.out / BEST
        if self.processes.first and not (best / TOKENIZER).exists():
            best.mkdir(exist_ok=True)
            write_run(best, self.config, self.corpus.tokenizer)
        self._write_weights(best, self._finite_weights(), nats_per_token=repr(result.nats_per_token))

    def _finite_weights(self) -> dict[str, Tensor]:
        """The weights, on the CPU of the first process; FloatingPointError if any is not finite. Collective."""
        weights = whole_weights(self.model, keep=self.processes.first)
        broken = [name for name, tensor in weights.items() if not torch.isfinite(tensor).all()]
        if broken := self.processes.from_first(broken):
            where = f"parameters {', '.join(broken[:NAMED])} are not finite at step {self.counters.step}"
            raise FloatingPointError(f"{where}: lower optim.lr in a new run; earlier checkpoints are kept")
        return weights

    def _write_weights(self, directory: Path, weights: dict[str, Tensor], **more: str) -> None:
        info = {"step": self.counters.step, "tokens": self.counters.tokens, "blocks": self.model.num_blocks}
        if self.processes.first:
            save_weights(directory, weights, {name: str(value) for name, value in info.items()} | more)

    def stop_requested(self) -> str | None:
        """Why this process or another one was asked to stop, or None. Collective."""
        asked = self.stop_signal()
        return (asked or "a signal to another process") if self.processes.any(asked is not None) else None

    def stop(self, reason: str) -> None:
        """Save the run and raise Stopped. Collective."""
        self.save()
        saved = f"saved at step {self.counters.step}; continue with `tarflowlm train --resume {self.out}`"
        raise Stopped(f"stopped by {reason} and {saved}")


class _StoppableProgress:
    """Passes the progress of an evaluation on, and stops the run if it was asked to."""

    def __init__(self, run: TrainingRun, progress: Progress) -> None:
        self.run, self.progress, self.stage = run, progress, progress.stage

    def advance(self, count: int = 1) -> None:
        if reason := self.run.stop_requested():
            self.run.stop(reason)
        self.progress.advance(count)
