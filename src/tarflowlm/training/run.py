"""A training run in progress: its model, optimisers, data and counters, and its checkpoints."""

import logging
import math
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from tarflowlm.config import RunConfig
from tarflowlm.data import Corpus, WindowSampler, eval_windows
from tarflowlm.errors import Stopped, UserError
from tarflowlm.evaluation.likelihood import Likelihood
from tarflowlm.files import read_json
from tarflowlm.language_model import LanguageModel, seeded
from tarflowlm.progress import SILENT, Progress
from tarflowlm.runs.checkpoint import BEST, COUNTERS, STATE, TOKENIZER, save_weights, write_run
from tarflowlm.training.metrics import MetricsLog, Reporter, Trackers
from tarflowlm.training.optim import NAMED, RunningLoss, build_optimizers, with_precision
from tarflowlm.training.parallel import ParallelModel, Processes, whole_weights
from tarflowlm.training.state import Counters, Writer, load_state, local_part, snapshot, state_tensors, write_state

PLANNED_SHARE = 0.85
"""Share of a device's memory that `train.accumulate` 0 fills; the rest is for what single operations need."""

logger = logging.getLogger("tarflowlm")


class TrainingRun:
    """A run in progress. Every process holds the same, but only the first writes files, from `write_start` on.

    `model` has the blocks of the stages so far; `parallel_model` trains those of the current stage. If asked for,
    `average` holds the averages of the weights that train, by name, and `best` those of the best validation.
    """

    parallel_model: ParallelModel
    optimizers: list[torch.optim.Optimizer]
    average: dict[str, Tensor]
    best: dict[str, Tensor]

    def __init__(
        self, config: RunConfig, out: Path, corpus: Corpus, device: torch.device, reporter: Reporter, group: Processes
    ) -> None:
        self.out, self.corpus, self.device, self.reporter, self.processes = out, corpus, device, reporter, group
        self.session_start = time.monotonic()
        self.rows = group.rows_each(config.train.batch_size, config.train.accumulate or 1)
        part = {"batch": self.rows, "rank": group.rank, "world": group.world}
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
        self.counters, self.writer, self._reader = Counters(), Writer(group), ThreadPoolExecutor(1)
        self.log = MetricsLog(None, reporter)
        self.saved_step: int | None = None
        self.stop_signal: Callable[[], str | None] = lambda: None

    def write_start(self) -> None:
        """Write the files of a run directory; the empty folder of states distinguishes it from an exported model."""
        (self.out / STATE).mkdir(exist_ok=True)
        write_run(self.out, self.config, self.corpus.tokenizer)

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
            seed = (self.config.seed + 1_000_003 * self.counters.step) % 2**62
            parts = (self.model, self.optimizers, self.generator, self._copies())
            load_state(state, *parts, seed=seed, processes=self.processes)
            self.sampler.load_state_dict(saved["sampler"])
            # they may be damaged, or a kill came between the state and its weights
            self._write_weights(self.out, self._finite_weights())
        self.position = self.sampler.state_dict()
        self._next: Future[tuple[Tensor, dict[str, int]]] = self._reader.submit(self._read_batch)
        first, place = self.processes.first, saved["metrics"]
        trackers = Trackers(self.config, self.out, resume_at=saved["step"]) if first else None
        self.log = MetricsLog(self.out if first else None, self.reporter, resume_at=place, trackers=trackers)
        self.session_start -= self.counters.spent.total
        if not self.counters.step:
            self.counters.spent.stage_start = self.seconds()

    def seconds(self) -> float:
        """Wall-clock seconds since the run began, without the time between sessions and compilation. Collective."""
        return self.processes.from_first(time.monotonic() - self.session_start)

    def next_batch(self) -> Tensor:
        """This process's rows of the next batch; a thread reads the one after it meanwhile."""
        tokens, self.position = self._next.result()
        self._next = self._reader.submit(self._read_batch)
        # a copy from pageable memory would wait for all work queued on the device
        return tokens.to(self.device, non_blocking=True)

    def _read_batch(self) -> tuple[Tensor, dict[str, int]]:
        tokens = self.sampler.next()
        return tokens.pin_memory() if self.device.type == "cuda" else tokens, self.sampler.state_dict()

    def enter_stage(self, stage: int) -> None:
        """Append the blocks of `stage` to the model, freeze all blocks but its own, and build new optimisers."""
        while self.model.num_blocks < self.config.model_of_stage(stage).num_blocks:
            with seeded(self.config.seed + 1000 * self.model.num_blocks):
                self.model.append_block()
        if self.processes.world == 1 or self.config.train.parallel == "ddp":
            self.model.to(self.device)  # FSDP2 moves shards one by one: the whole model need not fit on the device
        self.model.train_only(stage)
        train = replace(self.config.train, accumulate=self.config.train.accumulate or self._fitting_parts(stage))
        self.average = _values(self.model) if train.ema else {}
        config, self.best = replace(self.config, train=train), _values(self.model) if train.keep == "best" else {}
        self.parallel_model = ParallelModel(self.model, config, self.processes, frozen=stage)
        self.optimizers = build_optimizers(self.config.optim, self.model)
        if len(self.counters.seconds) < stage + 1:
            self.counters.seconds.append(0.0)
            self.counters.stage_tokens.append(0)

    def _fitting_parts(self, stage: int) -> int:
        """What `train.accumulate` 0 means for a stage: the least that fits the device's memory. Collective."""
        if self.device.type != "cuda":
            return 1
        free, parts = torch.cuda.mem_get_info(self.device)[0] + torch.cuda.memory_reserved(self.device), 1
        if self.processes.first:
            shards = self.processes.world if self.config.train.parallel == "fsdp" else 1
            parts = fitting_parts(self.model, self.config, stage, self.rows, free, shards=shards)
            logger.info("train.accumulate 0: %d parts of %d sequences fit", parts, self.rows // parts)
        return self.processes.from_first(parts)

    def leave_stage(self, end: Likelihood) -> None:
        """Record the final validation `end` of a stage and enter the next one."""
        counters = self.counters
        counters.valid_bpc.append(end.bpc)
        counters.stage_steps.append(counters.stage_step)
        counters.stage, counters.stage_step = counters.stage + 1, 0
        counters.lowest, counters.running = math.inf, RunningLoss()
        _assign(_trained(self.model), self.best or self.average)
        _assign(self.average, self.best)
        if self.best:
            self._write_weights(self.out, self._finite_weights())
        if counters.stage < self.config.num_stages:
            self.model = self.parallel_model.whole_model()
            self.enter_stage(counters.stage)
        counters.spent.stage_start = self.seconds()
        # a stage with a time limit may end at an evaluation, some steps after its last checkpoint
        self.save()
        self.wait()

    def update_average(self) -> None:
        """Move the averaged weights towards the present ones; in the first steps of a stage by more."""
        if self.average:
            step = self.counters.stage_step
            decay = min(self.config.train.ema, (1 + step) / (10 + step))
            averages, weights = ([*map(local_part, d.values())] for d in (self.average, _trained(self.model)))
            torch._foreach_lerp_(averages, weights, 1 - decay)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """A context in which the model has its averaged weights, if it keeps them."""
        held = _values(self.model) if self.average else {}
        _assign(_trained(self.model), self.average)
        try:
            yield
        finally:
            _assign(_trained(self.model), held)

    def describe_stage(self) -> str:
        """The current stage in words, such as "stage 2/3: block 2 mix1"."""
        stage, num_stages = self.counters.stage, self.config.num_stages
        if num_stages > 1:
            return f"stage {stage + 1}/{num_stages}: {self.config.model.describe(stage)}"
        return self.config.model.describe(0) if self.config.model.num_blocks == 1 else "all blocks"

    def evaluate(self, windows: Tensor, progress: Progress = SILENT) -> Likelihood:
        """The bound over `windows` [W, T]. Stops in between if the run was asked to. Collective."""
        try:
            with self.averaged():
                return self.parallel_model.evaluate(
                    windows, self.characters_per_token, _StoppableProgress(self, progress)
                )
        except _StopRequest as request:
            self.stop(str(request))

    def save(self) -> None:
        """Copy a checkpoint, unless this step is saved, and begin to write it: the state, then the weights, so that
        the directory loads. The one before must be complete. Collective."""
        counters = self.counters
        if self.saved_step == counters.step:
            return
        self.wait()
        counters.spent.total = self.seconds()
        saved: dict[str, Any] = {"step": counters.step, "counters": asdict(counters), "metrics": self.log.position()}
        saved |= {"sampler": self.position, "corpus": self.corpus.fingerprint}
        weights = self._finite_weights()
        tensors = state_tensors(self.model, self.optimizers, self.generator, self._copies())
        group: dict[str, Any] = {"processes": self.processes, "group": self.writer.group}
        tensors, keep = snapshot(tensors, self.processes), self.config.train.keep_last
        self.writer.submit(partial(write_state, self.out, tensors, saved, keep=keep, **group))
        self._write_weights(self.out, weights)
        self.saved_step = counters.step

    def wait(self) -> None:
        """Return once everything that was saved is on disk. Collective."""
        self.writer.wait()
        self.counters.spent.save = self.processes.from_first(self.writer.seconds)

    def close(self) -> None:
        """Return once nothing is being written any more, even if it failed."""
        self.writer.close()
        self._reader.shutdown()
        self.log.close()

    def _copies(self) -> dict[str, dict[str, Tensor]]:
        return {name: copy for name, copy in (("average", self.average), ("best", self.best)) if copy}

    def save_best(self, result: Likelihood) -> None:
        """Save the weights of the best validation bound to best/, a run directory of its own."""
        best = self.out / BEST
        if self.processes.first and not (best / TOKENIZER).exists():
            best.mkdir(exist_ok=True)
            write_run(best, self.config, self.corpus.tokenizer)
        _assign(self.best, self.average or _trained(self.model))
        self._write_weights(best, self._finite_weights(), nats_per_token=repr(result.nats_per_token))

    def _finite_weights(self) -> dict[str, Tensor]:
        """A copy of the (averaged) weights, on the CPU of the first process; FloatingPointError if any is not finite.
        Collective."""
        with self.averaged():
            weights = {name: w.clone() for name, w in whole_weights(self.model, keep=self.processes.first).items()}
        broken = [name for name, tensor in weights.items() if not torch.isfinite(tensor).all()]
        if broken := self.processes.from_first(broken):
            where = f"parameters {', '.join(broken[:NAMED])} are not finite at step {self.counters.step}"
            raise FloatingPointError(f"{where}: lower optim.lr in a new run; earlier checkpoints are kept")
        return weights

    def _write_weights(self, directory: Path, weights: dict[str, Tensor], **more: str) -> None:
        info = {"step": self.counters.step, "tokens": self.counters.tokens, "blocks": self.model.num_blocks}
        if self.processes.first:
            header = {name: str(value) for name, value in info.items()} | more
            self.writer.submit(partial(save_weights, directory, weights, header))

    def stop_requested(self) -> str | None:
        """Why this process or another one was asked to stop, or None. Collective."""
        asked = self.stop_signal()
        return (asked or "a signal to another process") if self.processes.any(asked is not None) else None

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
            raise _StopRequest(reason)
        self.progress.advance(count)


class _StopRequest(Exception):
    """Leaves an evaluation, so that the run is saved with the weights that it trains."""


def _trained(model: LanguageModel) -> dict[str, Tensor]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def _values(model: LanguageModel) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in _trained(model).items()}


def _assign(targets: dict[str, Tensor], values: dict[str, Tensor]) -> None:
    """Copy `values` into the tensors of the same names; shards are copied by their local parts."""
    if names := targets.keys() & values.keys():
        parts = ([local_part(held[name]) for name in sorted(names)] for held in (targets, values))
        torch._foreach_copy_(*parts)


def saved_bytes(model: ParallelModel, num_sequences: int) -> int:
    """Bytes that autograd keeps for the backward pass of so many sequences; weights that it keeps are counted."""
    train, device, storages = model.config.train, model.model.device, dict[int, int]()

    def pack(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    tokens = torch.zeros(num_sequences, model.model.config.context, dtype=torch.long, device=device)
    noise = model.model.draw_noise(tokens, torch.Generator(device))
    with seeded(0), torch.autocast(device.type, torch.bfloat16, enabled=train.precision == "bfloat16"):
        with saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = model.loss(tokens, noise)
        assert loss.requires_grad  # and holds the graph, so that no storage is used twice
    return sum(storages.values())


def fitting_parts(
    model: LanguageModel, config: RunConfig, stage: int, rows: int, memory: float, *, shards: int = 1
) -> int:
    """The fewest equal parts of `rows` sequences with which `stage` (0-based) trains within `memory` bytes.

    The activations of a part are measured on one sequence and on two. Beside them are the weights and, for every
    weight that trains, its gradient, two states of the optimiser, and what `train.ema` and `train.keep` hold.
    """
    train = config.train
    measured = ParallelModel(model, replace(config, train=replace(train, compile=False)), frozen=stage)
    one, two = (saved_bytes(measured, count) for count in (1, 2))
    copies = 3 + bool(train.ema) + (train.keep == "best")
    weights = sum(p.nbytes * (1 + copies * p.requires_grad) for p in model.parameters()) / shards
    each, fixed = two - one, 2 * one - two + weights
    parts = (n for n in range(1, rows + 1) if rows % n == 0 and fixed + each * rows / n <= PLANNED_SHARE * memory)
    return next(parts, rows)
