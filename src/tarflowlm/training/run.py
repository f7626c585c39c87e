"""The state of a training run, and its checkpoints.

`lifecycle` creates a `Run` and takes it through its stages; `loop` trains a stage.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from tarflowlm.config import RunConfig
from tarflowlm.data import Corpus, WindowSampler, eval_windows
from tarflowlm.errors import Stopped
from tarflowlm.evaluation.likelihood import Likelihood
from tarflowlm.language_model import LanguageModel, seeded
from tarflowlm.runs.checkpoint import BEST, TOKENIZER, save_weights, write_run
from tarflowlm.training.distributed import Processes
from tarflowlm.training.guards import NAMED, RunningLoss
from tarflowlm.training.metrics import MetricsLog, NoLog, Reporter
from tarflowlm.training.optim import build_optimizers, with_precision
from tarflowlm.training.pace import Clock
from tarflowlm.training.parallel import Engine, whole_weights
from tarflowlm.training.state import Counters, load_state, save_state
from tarflowlm.training.tracking import Sinks

StopRequests = Callable[[], AbstractContextManager[Callable[[], str | None]]]
"""A context in which a run can be asked to stop. It yields a function that returns the reason, or None."""


@contextmanager
def no_stop_requests() -> Iterator[Callable[[], str | None]]:
    """The default `StopRequests`: never stop; signals keep their handlers."""
    yield lambda: None


class Run:
    """The model, optimisers, data and counters of a training run, and the methods that save them.

    Every process holds the same, but only the first writes files. `model` has the blocks of the stages so far;
    `engine` computes its loss and gradients in the current stage, with the blocks below frozen.
    """

    engine: Engine
    log: MetricsLog
    clock: Clock
    """Seconds since the run began, earlier sessions included."""

    def __init__(
        self,
        config: RunConfig,
        out: Path,
        corpus: Corpus,
        device: torch.device,
        reporter: Reporter,
        processes: Processes,
        begun: float,
    ) -> None:
        """`begun`: the start of this session on `time.monotonic`. UserError if the batch does not divide evenly."""
        self.out, self.corpus, self.device, self.reporter = out, corpus, device, reporter
        self.processes, self.begun = processes, begun
        self.sampler = WindowSampler(
            corpus.split("train"),
            window=config.model.context,
            batch=processes.rows_each(config.train.batch_size, config.train.accumulate),
            seed=config.seed,
            rank=processes.rank,
            world=processes.world,
        )
        self.valid = eval_windows(corpus.split("valid"), config.model.context, config.train.evaluate_windows)
        self.characters_per_token = torch.from_numpy(corpus.tokenizer.characters_per_token)
        self.characters_ratio = corpus.num_characters("train") / corpus.num_tokens("train")
        self.generator = torch.Generator(device=device).manual_seed(config.seed)
        self.model = initial_model(config)
        # decided by one process for all, and recorded in the configuration
        optim = processes.from_first(with_precision(config.optim, self.model, device))
        self.config = replace(config, optim=optim)
        available = corpus.num_tokens("test") // config.model.context
        self.num_test_windows = min(config.train.test_windows or available, available)
        self.optimizers: list[torch.optim.Optimizer] = []
        self.counters = Counters()
        self.saved_step: int | None = None
        self.stop_signal: Callable[[], str | None] = lambda: None

    def begin(self, state: Path | None, saved: dict[str, Any] | None, *, afresh: bool = False) -> None:
        """Enter the first stage, or load a saved state with its counters `saved` and enter its stage.

        `afresh`: the log is that of an earlier start without a state, and is cleared.
        """
        if saved is not None:
            self.counters, self.saved_step = Counters.restored(saved["counters"]), saved["step"]
        self.clock = Clock(self.counters.spent.total, since=self.begun, processes=self.processes)
        self.enter_stage(min(self.counters.stage, self.config.num_stages - 1))
        if state is not None and saved is not None:
            load_state(state, self.model, self.optimizers, self.generator, processes=self.processes)
            self.sampler.load_state_dict(saved["sampler"])
        self.log = self._open_log({"step": 0, "metrics": 0} if afresh else saved)
        if not self.counters.step:
            self.counters.spent.stage_start = self.clock.seconds()

    def _open_log(self, saved: dict[str, Any] | None) -> MetricsLog:
        """The log, cut back to the position saved with the checkpoint, if there is one."""
        if not self.processes.first:
            return NoLog(self.reporter)
        step, position = (saved["step"], saved["metrics"]) if saved else (None, None)
        sinks = Sinks(self.config, self.out, self.reporter.notice, resume_at=step)
        return MetricsLog(self.out, self.reporter, resume_at=position, sinks=sinks)

    def enter_stage(self, stage: int) -> None:
        """Append the blocks of `stage` to the model, freeze all blocks but its own, and build new optimisers."""
        num_blocks = self.config.model_of_stage(stage).num_blocks
        is_new = not self.optimizers
        if self.model.num_blocks < num_blocks:
            self.model, is_new = self.model if is_new else self.engine.whole(), True
            while self.model.num_blocks < num_blocks:
                with seeded(self.config.seed + 1000 * self.model.num_blocks):
                    self.model.append_block()
        if is_new:
            if self.processes.world == 1 or self.config.train.parallel == "ddp":
                # FSDP2 moves shards one by one: the whole model need not fit on the device
                self.model.to(self.device)
            self.model.train_only(stage)
            self.engine = Engine(self.model, self.config, self.processes, frozen=stage)
            self.optimizers = build_optimizers(self.config.optim, self.model)
        if len(self.counters.seconds) < stage + 1:
            self.counters.seconds.append(0.0)
            self.counters.stage_tokens.append(0)

    def leave_stage(self, end: Likelihood) -> None:
        """Record the final validation `end` of a stage and enter the next one; saves a stage that ended early."""
        counters = self.counters
        counters.valid_bpc.append(end.bpc)
        counters.stage_steps.append(counters.stage_step)
        counters.stage, counters.stage_step = counters.stage + 1, 0
        counters.best = counters.lowest = math.inf
        counters.stalled, counters.running = 0, RunningLoss()
        unsaved = self.saved_step != counters.step
        if unsaved:
            self.save_weights(self.out)  # without the next block
        if counters.stage < self.config.num_stages:
            self.enter_stage(counters.stage)
        counters.spent.stage_start = self.clock.seconds()
        if unsaved:
            self._save_state()

    def announce_stage(self) -> None:
        """Tell the reporter which stage begins or continues."""
        stage, train = self.counters.stage, self.config.train
        joint = self.config.num_stages < self.config.model.num_blocks
        steps = 0 if train.minutes else train.stage_steps[stage]
        what = "all blocks" if joint else self.config.model.describe(stage)
        self.reporter.stage(stage, self.config.num_stages, steps, self.counters.stage_step, what)

    def save(self) -> None:
        """Save a checkpoint, unless this step is saved: the weights, so that the directory loads, then the state."""
        if self.saved_step != self.counters.step:
            start = self.clock.seconds()
            self.save_weights(self.out)
            self._save_state()
            self.counters.spent.save = self.clock.seconds() - start

    def save_weights(self, directory: Path, **more: str) -> None:
        """Write the weights, with step, tokens, blocks and `more` in the header. Collective.

        FloatingPointError if any parameter is not finite.
        """
        weights = whole_weights(self.model, keep=self.processes.first)
        broken = [name for name, tensor in weights.items() if not torch.isfinite(tensor).all()]
        if broken := self.processes.from_first(broken):
            raise FloatingPointError(
                f"parameters {', '.join(broken[:NAMED])} are not finite at step {self.counters.step}: lower optim.lr "
                f"in a new run; earlier checkpoints are kept"
            )
        counters = self.counters
        info = {"step": counters.step, "tokens": counters.tokens, "blocks": self.model.num_blocks}
        if self.processes.first:
            save_weights(directory, weights, {name: str(value) for name, value in info.items()} | more)

    def _save_state(self) -> None:
        # includes the time of this save, estimated from the last one
        self.counters.spent.total = self.clock.seconds() + self.counters.spent.save
        saved = {
            "step": self.counters.step,
            "counters": asdict(self.counters),
            "sampler": self.sampler.state_dict(),
            "corpus": self.corpus.fingerprint,
            "metrics": self.log.position(),
        }
        save_state(
            self.out,
            self.model,
            self.optimizers,
            self.generator,
            saved,
            keep=self.config.train.keep_last,
            processes=self.processes,
        )
        self.saved_step = self.counters.step

    def save_best(self, result: Likelihood) -> None:
        """Save the weights of the best validation bound to best/, which every command accepts as a run directory."""
        best = self.out / BEST
        if self.processes.first:
            best.mkdir(exist_ok=True)
            if not (best / TOKENIZER).exists():
                write_run(best, self.config, self.corpus.tokenizer)
        self.save_weights(best, nats_per_token=repr(result.nats_per_token))

    def stop_requested(self) -> str | None:
        """Why this process or another one was asked to stop, or None. Collective."""
        asked = self.stop_signal()
        return (asked or "a signal to another process") if self.processes.any(asked is not None) else None

    def stop_if_asked(self) -> None:
        """If the run was asked to stop: save it and raise Stopped. Collective."""
        asked = self.stop_requested()
        if asked is not None:
            self.save()
            raise Stopped(
                f"stopped by {asked} and saved at step {self.counters.step}; continue with "
                f"`tarflowlm train --resume {self.out}`"
            )


def initial_model(config: RunConfig) -> LanguageModel:
    """A new model for the first stage of a run: block 1 alone if progressive, otherwise all blocks."""
    with seeded(config.seed):
        model = config.model_of_stage(0).build()
    model.config = config.model
    return model
