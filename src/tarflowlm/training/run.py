"""A training run in progress: its model, optimisers, data and counters, and its checkpoints."""

import logging
import math
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from tarflowlm.config import RunConfig
from tarflowlm.data import Corpus, WindowSampler, eval_windows
from tarflowlm.errors import Stopped, UserError
from tarflowlm.evaluation.likelihood import Likelihood
from tarflowlm.files import read_json
from tarflowlm.language_model import LanguageModel, seeded
from tarflowlm.progress import SILENT, Progress
from tarflowlm.runs.checkpoint import (
    BEST,
    COUNTERS,
    PARENT,
    STATE,
    TOKENIZER,
    Checkpoint,
    save_weights,
    write_run,
)
from tarflowlm.runs.weights import read_weights, write_weights
from tarflowlm.training.metrics import MetricsLog, Reporter, Trackers
from tarflowlm.training.optim import NAMED, build_optimizers, with_precision
from tarflowlm.training.parallel import ParallelModel, Processes, whole_weights
from tarflowlm.training.state import (
    Counters,
    load_state,
    local_parts,
    save_state,
    snapshot,
    state_tensors,
)

PLANNED_SHARE = 0.85
"""Share of a device's memory that `train.accumulate` 0 fills; the rest is for what single
operations need.
"""

logger = logging.getLogger("tarflowlm")


class TrainingRun:
    """A run in progress. Every process holds the same, but only the first writes files, from
    `write_start` on.

    `model` has the blocks of the stages so far; `parallel_model` trains those of the current stage.
    Of the weights that train, `copies` has the "average" and those of the "best" validation, as far
    as the configuration asks.
    """

    parallel_model: ParallelModel
    optimizers: list[torch.optim.Optimizer]
    copies: dict[str, dict[str, Tensor]]

    def __init__(
        self,
        config: RunConfig,
        out: Path,
        corpus: Corpus,
        device: torch.device,
        reporter: Reporter,
        group: Processes,
    ) -> None:
        self.out, self.corpus, self.device, self.reporter, self.processes = (
            out,
            corpus,
            device,
            reporter,
            group,
        )
        self.session_start = time.monotonic()
        batch = group.rows_each(config.train.batch_size, config.train.accumulate or 1)
        part = {"batch": batch, "rank": group.rank, "world": group.world}
        self.sampler = WindowSampler(
            corpus.split("train"), window=config.model.context, seed=config.seed, **part
        )
        self.valid = eval_windows(
            corpus.split("valid"), config.model.context, config.train.evaluate_windows
        )
        self.characters_per_token = torch.from_numpy(corpus.tokenizer.characters_per_token)
        self.characters_ratio = corpus.num_characters("train") / corpus.num_tokens("train")
        self.generator = torch.Generator(device=device).manual_seed(config.seed)
        with seeded(config.seed):
            self.model = config.model_of_stage(0).build()
        self.model.config = config.model
        # decided by one process for all, and recorded in the configuration
        self.config = group.from_first(with_precision(config, self.model, device))
        available = corpus.num_tokens("test") // config.model.context
        self.num_test_windows = min(config.train.test_windows or available, available)
        # not `async_save` of PyTorch, which is done before manifest and rename: these would need a
        # thread, too. Collectives of the thread must not mix with those of training
        self._writer, self._writes = ThreadPoolExecutor(1), list[Future[None]]()
        self._group = dist.new_group(backend="gloo") if group.world > 1 else None
        self.counters, self.log = Counters(), MetricsLog(None, reporter)
        self.saved_step: int | None = None
        self.stop_signal: Callable[[], str | None] = lambda: None

    def write_start(self, parent: Checkpoint | None) -> None:
        """Write the files of a run directory; the empty folder of states distinguishes it from an
        exported model.
        """
        (self.out / STATE).mkdir(exist_ok=True)
        if parent is not None:
            write_weights(self.out / PARENT, parent.model.state_dict(), parent.info)
        write_run(self.out, self.config, self.corpus.tokenizer)

    def start(self, state: Path | None) -> None:
        """Enter the first stage, or load `state` and enter its stage; open the log, cut back to
        where it was then.
        """
        saved: dict[str, Any] = (
            {"step": 0, "metrics": 0} if state is None else read_json(state / COUNTERS)
        )
        if state is not None:
            if saved["corpus"] != self.corpus.fingerprint:
                text = f"{self.config.data.source} is not the text that {self.out} was trained on"
                raise UserError(f"{text}: restore that text to resume")
            logger.info("resuming %s at step %d", self.out, saved["step"])
            self.counters, self.saved_step = Counters.restored(saved["counters"]), saved["step"]
        self.enter_stage(min(self.counters.stage, self.config.num_stages - 1))
        if state is not None:
            seed = (self.config.seed + 1_000_003 * saved["step"]) % 2**62
            parts = (self.model, self.optimizers, self.generator, self.copies)
            load_state(state, *parts, seed=seed, processes=self.processes)
            self.sampler.load_state_dict(saved["sampler"])
            # they may be damaged, or a kill came between the state and its weights
            self._write_weights(self.out, self._finite_weights())
        first, place = self.processes.first, saved["metrics"]
        trackers = Trackers(self.config, self.out, resume_at=saved["step"]) if first else None
        self.log = MetricsLog(
            self.out if first else None, self.reporter, resume_at=place, trackers=trackers
        )
        self.session_start -= self.counters.spent.total
        if not self.counters.step:
            self.counters.spent.stage_start = self.seconds()

    def seconds(self) -> float:
        """Wall-clock seconds since the run began, without the time between sessions and
        compilation. Collective.
        """
        return self.processes.from_first(time.monotonic() - self.session_start)

    def enter_stage(self, stage: int) -> None:
        """Append the blocks of `stage` to the model, freeze all blocks but its own, and build new
        optimisers.
        """
        while self.model.num_blocks < self.config.model_of_stage(stage).num_blocks:
            with seeded(self.config.seed + 1000 * self.model.num_blocks):
                self.model.append_block()
        if self.config.parent:
            # blocks below are as this run has trained them
            own = f"prior.blocks.{stage}." if stage else ""
            inherited = read_weights(self.out / PARENT)[0].items()
            self.model.load_state_dict(
                {n: w for n, w in inherited if n.startswith(own)}, strict=False
            )
        if self.processes.world == 1 or self.config.train.parallel == "ddp":
            self.model.to(
                self.device
            )  # FSDP2 moves shards one by one: the whole model need not fit on the device
        self.model.train_only(stage)
        train, parts = self.config.train, self.config.train.accumulate or 1
        if not train.accumulate and self.device.type == "cuda":
            memory = torch.cuda.mem_get_info(self.device)[0] + torch.cuda.memory_reserved(
                self.device
            )
            fitting = fitting_parts(self.model, self.config, stage, self.processes.world, memory)
            parts = self.processes.from_first(fitting)
            logger.info("train.accumulate 0 is %d here", parts)
        config = replace(self.config, train=replace(train, accumulate=parts))
        self.parallel_model = ParallelModel(self.model, config, self.processes, frozen=stage)
        asked = {"average": train.ema > 0, "best": train.keep == "best"}
        self.copies = {
            name: _copy(trained_parameters(self.model))
            for name, is_asked in asked.items()
            if is_asked
        }
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
        counters.lowest = math.inf
        if final := self.copies.get("best") or self.copies.get("average"):
            _assign(trained_parameters(self.model), final)
            _assign(self.copies.get("average", {}), final)
            self._write_weights(self.out, self._finite_weights())
        if counters.stage < self.config.num_stages:
            self.model = self.parallel_model.whole_model()
            self.enter_stage(counters.stage)
        counters.spent.stage_start = self.seconds()
        # a stage with a time limit may end at an evaluation, some steps after its last checkpoint
        self.save()
        self.wait()

    def update_average(self) -> None:
        """Move the averaged weights towards the present ones: by more in the first steps of a
        stage.
        """
        if average := self.copies.get("average"):
            decay = min(
                self.config.train.ema,
                (1 + self.counters.stage_step) / (10 + self.counters.stage_step),
            )
            torch._foreach_lerp_(
                local_parts(average), local_parts(trained_parameters(self.model)), 1 - decay
            )

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """A context in which the model has its averaged weights, if it keeps them."""
        weights, average = trained_parameters(self.model), self.copies.get("average", {})
        held = _copy(weights) if average else {}
        _assign(weights, average)
        try:
            yield
        finally:
            _assign(weights, held)

    def describe_stage(self) -> str:
        """The current stage in words, such as "stage 2/3: block 2 mix1"."""
        stage, num_stages = self.counters.stage, self.config.num_stages
        if num_stages > 1:
            return f"stage {stage + 1}/{num_stages}: {self.config.model.describe(stage)}"
        return self.config.model.describe(0) if self.config.model.num_blocks == 1 else "all blocks"

    def evaluate(self, windows: Tensor, progress: Progress = SILENT) -> Likelihood:
        """The bound over `windows` [W, T]. Stops in between if the run was asked to. Collective."""
        stoppable = _StoppableProgress(self, progress)
        try:
            with self.averaged():
                return self.parallel_model.evaluate(windows, self.characters_per_token, stoppable)
        except Stopped as asked:  # outside, so that the weights in training are saved
            self.stop(str(asked))

    def save(self) -> None:
        """Copy a checkpoint, unless this step is saved, for a thread to write: the state, then the
        weights, so that the directory loads. Waits for the one before, and also for the first one
        of a session. Collective.
        """
        counters = self.counters
        if self.saved_step == counters.step:
            return
        self.wait()
        start, weights = self.seconds(), self._finite_weights()
        counters.spent.total = start
        saved: dict[str, Any] = {
            "step": counters.step,
            "counters": asdict(counters),
            "metrics": self.log.position(),
        }
        saved |= {"sampler": self.sampler.state_dict(), "corpus": self.corpus.fingerprint}
        tensors = state_tensors(self.model, self.optimizers, self.generator, self.copies)
        copied, keep = snapshot(tensors, self.processes), self.config.train.keep_last
        group: dict[str, Any] = {"processes": self.processes, "group": self._group}
        self._writes.append(
            self._writer.submit(save_state, self.out, copied, saved, keep=keep, **group)
        )
        self._write_weights(self.out, weights)
        self.saved_step = counters.step
        if not counters.spent.save:
            self.wait()
            counters.spent.save = self.seconds() - start

    def wait(self) -> None:
        """Return once everything that was saved is on disk."""
        while self._writes:
            self._writes.pop(0).result()

    def close(self) -> None:
        """Return once nothing is being written any more, even if it failed."""
        self._writer.shutdown()
        self.log.close()

    def save_best(self, result: Likelihood) -> None:
        """Save the weights of the best validation bound to best/, a run directory of its own."""
        best = self.out / BEST
        if self.processes.first and not (best / TOKENIZER).exists():
            best.mkdir(exist_ok=True)
            write_run(best, self.config, self.corpus.tokenizer)
        _assign(
            self.copies.get("best", {}),
            self.copies.get("average") or trained_parameters(self.model),
        )
        self._write_weights(
            best, self._finite_weights(), nats_per_token=repr(result.nats_per_token)
        )

    def _finite_weights(self) -> dict[str, Tensor]:
        """A copy of the weights to evaluate, on the CPU of the first process; FloatingPointError if
        they are not finite. Collective.
        """
        with self.averaged():
            weights = _copy(whole_weights(self.model, keep=self.processes.first))
        broken = [name for name, tensor in weights.items() if not torch.isfinite(tensor).all()]
        if broken := self.processes.from_first(broken):
            where = f"parameters {', '.join(broken[:NAMED])} are not finite at step {self.counters.step}"
            raise FloatingPointError(
                f"{where}: lower optim.lr in a new run; earlier checkpoints are kept"
            )
        return weights

    def _write_weights(self, directory: Path, weights: dict[str, Tensor], **more: str) -> None:
        info = {
            "step": self.counters.step,
            "tokens": self.counters.tokens,
            "blocks": self.model.num_blocks,
        }
        if self.processes.first:
            header = {name: str(value) for name, value in info.items()} | more
            self._writes.append(self._writer.submit(save_weights, directory, weights, header))

    def stop_requested(self) -> str | None:
        """Why this process or another one was asked to stop, or None. Collective."""
        asked = self.stop_signal()
        return (
            (asked or "a signal to another process")
            if self.processes.any(asked is not None)
            else None
        )

    def stop(self, reason: str) -> NoReturn:
        """Save the run and raise Stopped. Collective."""
        self.save()
        self.wait()
        saved = f"saved at step {self.counters.step}; continue with `tarflowlm train --resume {self.out}`"
        raise Stopped(f"stopped by {reason} and {saved}")


class _StoppableProgress:
    """Passes the progress of an evaluation on, and stops the run if it was asked to."""

    def __init__(self, run: TrainingRun, progress: Progress) -> None:
        self.run, self.progress, self.stage = run, progress, progress.stage

    def advance(self, count: int = 1) -> None:
        if reason := self.run.stop_requested():
            raise Stopped(reason)
        self.progress.advance(count)


def trained_parameters(model: LanguageModel) -> dict[str, Tensor]:
    """The parameters that train, by name; others are not sharded where these are."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def _copy(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def _assign(targets: dict[str, Tensor], values: dict[str, Tensor]) -> None:
    if targets and values:
        torch._foreach_copy_(local_parts(targets), local_parts(values))


def fitting_parts(
    model: LanguageModel, config: RunConfig, stage: int, world: int, memory: float
) -> int:
    """The least `train.accumulate` with which `stage` (0-based) of the model trains within `memory`
    bytes.

    What autograd keeps for the backward pass is measured for one sequence and for two. It joins the
    weights and, for every weight that trains, its gradient, two states of an optimiser, and what
    `train.ema` and `train.keep` hold.
    """
    train, rows = config.train, config.train.batch_size // world
    measured = ParallelModel(
        model, replace(config, train=replace(train, compile=False)), frozen=stage
    )
    one, two = (_saved_bytes(measured, count) for count in (1, 2))
    copies = 3 + (train.ema > 0) + (train.keep == "best")
    weights = sum(p.nbytes * (1 + copies * p.requires_grad) for p in model.parameters())
    fixed = 2 * one - two + weights / (world if train.parallel == "fsdp" else 1)
    room = (PLANNED_SHARE * memory - fixed) / (two - one)  # in sequences
    return next(
        (parts for parts in range(1, rows) if rows % parts == 0 and rows / parts <= room), rows
    )


def _saved_bytes(model: ParallelModel, num_sequences: int) -> int:
    storages: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    tokens = torch.zeros(
        num_sequences, model.config.model.context, dtype=torch.long, device=model.model.device
    )
    with seeded(0), saved_tensors_hooks(keep, lambda tensor: tensor):
        model.loss(tokens, model.model.draw_noise(tokens))
    return sum(storage.nbytes() for storage in storages.values())
