"""A run from its first step, or from a saved state, to its summary: the stages one after another, and checkpoints."""

import math
import platform
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from tarflowlm.data import Corpus, WindowSampler, eval_windows
from tarflowlm.errors import Stopped
from tarflowlm.evaluation.likelihood import Likelihood
from tarflowlm.files import write_json
from tarflowlm.model import FlowConfig, TarFlowLM, seeded
from tarflowlm.runs.checkpoint import BEST, TOKENIZER, Model, build_model, save_weights, write_run
from tarflowlm.runs.config import RunConfig
from tarflowlm.training.distributed import Processes
from tarflowlm.training.guards import NAMED, RunningLoss
from tarflowlm.training.loop import Counters, StageContext, train_stage
from tarflowlm.training.metrics import MetricsLog, NoLog, Reporter
from tarflowlm.training.optim import build_optimizers, with_precision
from tarflowlm.training.pace import Clock, test_seconds
from tarflowlm.training.parallel import Engine, whole_weights
from tarflowlm.training.state import load_state, read_counters, save_state
from tarflowlm.training.tracking import Sinks

StopRequests = Callable[[], AbstractContextManager[Callable[[], str | None]]]
"""A context in which a run can be asked to stop. It yields a function that names what asked, or returns None."""


@contextmanager
def no_stop_requests() -> Iterator[Callable[[], str | None]]:
    """Signals do what they did before."""
    yield lambda: None


SUMMARY = "summary.json"
LEAST_TEST_WINDOWS = 32
"""That a run by minutes ends with, however little of its time is left."""


def freeze_below(model: Model, stage: int) -> None:
    """Leave only block `stage` trainable; stage 0 trains all that is there, the codebook included."""
    if stage > 0 and isinstance(model, TarFlowLM):
        model.requires_grad_(False)
        model.prior.blocks[stage].requires_grad_(True)
    for parameter in model.parameters():
        if not parameter.numel():
            # what a head has for earlier channels where there are none: no gradient would ever arrive
            parameter.requires_grad_(False)


class Run:
    """The parts of one run, from its first step or from a saved state."""

    def __init__(
        self,
        run: RunConfig,
        out: Path,
        corpus: Corpus,
        device: torch.device,
        reporter: Reporter,
        processes: Processes,
        begun: float,
    ) -> None:
        self.run, self.out, self.corpus, self.device, self.reporter = run, out, corpus, device, reporter
        self.processes, self.begun = processes, begun
        self.sampler = WindowSampler(
            corpus.split("train"),
            window=run.model.context,
            batch=processes.rows_each(run.train.batch_size, run.train.accumulate),
            seed=run.seed,
            rank=processes.rank,
            world=processes.world,
        )
        self.characters_per_token = torch.from_numpy(corpus.tokenizer.characters_per_token)
        self.generator = torch.Generator(device=device).manual_seed(run.seed)
        self.progressive = run.num_stages > 1
        self.model = self._initial_model()
        # one process decides, and the configuration keeps what it found
        self.run = replace(run, optim=processes.from_first(with_precision(run.optim, self.model, device)))
        available = corpus.num_tokens("test") // run.model.context
        self.num_test_windows = min(run.train.test_windows or available, available)
        self.engine: Engine | None = None
        self.optimizers: list[torch.optim.Optimizer] = []
        self.counters = Counters()
        self.saved_step: int | None = None
        self.stop_signal: Callable[[], str | None] = lambda: None

    def _initial_model(self) -> Model:
        """Block 1 alone where the run is progressive; everything otherwise."""
        config = self.run.model
        if self.progressive and isinstance(config, FlowConfig):
            with seeded(self.run.seed):
                model = TarFlowLM(config.first_blocks(1))
            model.config = config
            return model
        with seeded(self.run.seed):
            return build_model(config)

    def go(self, state: Path | None = None, *, weights: bool = False, afresh: bool = False) -> dict[str, Any]:
        """All stages from the first step, or from a state; `weights` has the weights written from that at once.

        `afresh`: what an earlier beginning left in the log is not this run's.
        """
        saved = None if state is None else read_counters(state)
        if saved is not None:
            self.counters, self.saved_step = Counters.restored(saved["counters"]), saved["step"]
        counters = self.counters
        self.clock = Clock(counters.spent.total, since=self.begun, processes=self.processes)
        self._enter(min(counters.stage, self.run.num_stages - 1))
        if state is not None and saved is not None:
            load_state(state, self.model, self.optimizers, self.generator, processes=self.processes)
            self.sampler.load_state_dict(saved["sampler"])
        if weights:
            self._save_weights(self.out)
        self.log = self._open_log({"step": 0, "metrics": 0} if afresh else saved)
        if not counters.step:
            counters.spent.stage_start = self.clock.seconds()
        try:
            context = self._context()
            while counters.stage < self.run.num_stages:
                self._announce(counters.stage)
                end = train_stage(self.optimizers, context, counters, engine=self._engine())
                counters.valid_bpc.append(end.bpc)
                self._leave_stage()
            return self._finish()
        finally:
            self.log.close()

    def _open_log(self, saved: dict[str, Any] | None) -> MetricsLog:
        """From the checkpoint on, where there is one."""
        if not self.processes.first:
            return NoLog(self.reporter)
        step, position = (saved["step"], saved["metrics"]) if saved else (None, None)
        sinks = Sinks(self.run, self.out, self.reporter.notice, resume_at=step)
        return MetricsLog(self.out, self.reporter, resume_at=position, sinks=sinks)

    def _context(self) -> StageContext:
        return StageContext(
            run=self.run,
            sampler=self.sampler,
            valid=eval_windows(self.corpus.split("valid"), self.run.model.context, self.run.train.evaluate_windows),
            characters_per_token=self.characters_per_token,
            characters_ratio=self.corpus.num_characters("train") / self.corpus.num_tokens("train"),
            generator=self.generator,
            device=self.device,
            clock=self.clock,
            num_test_windows=self.num_test_windows,
            log=self.log,
            checkpoint=self.save,
            keep_best=self._keep_best,
            stop_requested=self._stop_requested,
            leave_if_asked=self._leave_if_asked,
        )

    def _enter(self, stage: int) -> None:
        """Grow the model to `stage` + 1 blocks, freeze all but the last, and build fresh optimisers."""
        if self.progressive and isinstance(self.model, TarFlowLM) and self.model.num_blocks < stage + 1:
            model = self.engine.whole() if self.engine is not None else self.model
            assert isinstance(model, TarFlowLM)
            while model.num_blocks < stage + 1:
                with seeded(self.run.seed + 1000 * model.num_blocks):
                    model.append_block()
            self.model, self.engine = model, None
        if self.engine is None:
            if self.processes.world == 1 or self.run.train.parallel == "ddp":
                # shards move to the device one by one: the whole model need not fit there
                self.model.to(self.device)
            freeze_below(self.model, stage)
            self.engine = Engine(self.model, self.run, self.processes, frozen=stage)
            self.optimizers = build_optimizers(self.run.optim, self.model)
        if len(self.counters.seconds) < stage + 1:
            self.counters.seconds.append(0.0)
            self.counters.stage_tokens.append(0)

    def _engine(self) -> Engine:
        assert self.engine is not None, "no stage was entered yet"
        return self.engine

    def _leave_stage(self) -> None:
        """On to the next stage. The end of this one is saved already, unless it came early."""
        counters = self.counters
        counters.stage_steps.append(counters.stage_step)
        counters.stage, counters.stage_step = counters.stage + 1, 0
        counters.best = counters.lowest = math.inf
        counters.stalled, counters.running = 0, RunningLoss()
        unsaved = self.saved_step != counters.step
        if unsaved:
            self._save_weights(self.out)  # without the next block
        if counters.stage < self.run.num_stages:
            self._enter(counters.stage)
        counters.spent.stage_start = self.clock.seconds()
        if unsaved:
            self._save_state()

    def _announce(self, stage: int) -> None:
        steps, done = self.run.train.stage_steps[stage], self.counters.stage_step
        steps = 0 if self.run.train.minutes else steps
        self.reporter.stage(stage, self.run.num_stages, steps, done, self._describe(stage))

    def _describe(self, stage: int) -> str:
        config = self.run.model
        if not isinstance(config, FlowConfig):
            return "baseline"
        return f"block {stage + 1} {config.couplings[stage]}" if self.progressive else "all blocks"

    def save(self) -> None:
        """Weights first, so that the directory loads; then the state to resume from."""
        if self.saved_step != self.counters.step:
            start = self.clock.seconds()
            self._save_weights(self.out)
            self._save_state()
            self.counters.spent.save = self.clock.seconds() - start

    def _save_weights(self, directory: Path, **more: str) -> None:
        weights = whole_weights(self.model, keep=self.processes.first)
        broken = [name for name, tensor in weights.items() if not torch.isfinite(tensor).all()]
        if broken := self.processes.from_first(broken):
            raise FloatingPointError(
                f"parameters {', '.join(broken[:NAMED])} are not finite at step {self.counters.step}: lower optim.lr "
                f"in a new run; the checkpoints before are kept"
            )
        blocks = self.model.num_blocks if isinstance(self.model, TarFlowLM) else 0
        info = {"step": str(self.counters.step), "tokens": str(self.counters.tokens), "blocks": str(blocks)}
        if self.processes.first:
            save_weights(directory, weights, info | more)

    def _save_state(self) -> None:
        # and what this will take, as far as known
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
            keep=self.run.train.keep_last,
            processes=self.processes,
        )
        self.saved_step = self.counters.step

    def _keep_best(self, result: Likelihood) -> None:
        """The weights as a directory that every command takes."""
        best = self.out / BEST
        if self.processes.first:
            best.mkdir(exist_ok=True)
            if not (best / TOKENIZER).exists():
                write_run(best, self.run, self.corpus.tokenizer)
        self._save_weights(best, nats_per_token=repr(result.nats_per_token))

    def _stop_requested(self) -> str | None:
        """By what this process or another one was asked to stop; all of them look at the same instants."""
        asked = self.stop_signal()
        return (asked or "a signal to another process") if self.processes.any(asked is not None) else None

    def _leave_if_asked(self) -> None:
        asked = self._stop_requested()
        if asked is not None:
            self.save()
            raise Stopped(
                f"stopped by {asked} and saved at step {self.counters.step}; go on with "
                f"`tarflowlm train --resume {self.out}`"
            )

    def _settle(self) -> None:
        """A run by minutes has ended: its configuration becomes that of the same run by steps."""
        train, spent = self.run.train, self.counters.spent
        total = 60 * train.minutes
        seconds = max(total - self.clock.seconds(), 0.0)
        fitting = int(min(seconds, test_seconds(total, self.num_test_windows, spent)) / max(spent.per_window, 1e-9))
        count = self.processes.from_first(min(self.num_test_windows, max(LEAST_TEST_WINDOWS, fitting)))
        steps = tuple(self.counters.stage_steps)
        self.run = replace(self.run, train=replace(train, minutes=0.0, stage_steps=steps, test_windows=count))
        for directory in (self.out, self.out / BEST) if self.processes.first else ():
            if directory.exists():
                write_run(directory, self.run, self.corpus.tokenizer)

    def _finish(self) -> dict[str, Any]:
        self.model.eval()
        minutes = self.run.train.minutes
        if minutes:
            self._settle()
        count = self.run.train.test_windows or None
        windows = eval_windows(self.corpus.split("test"), self.run.model.context, count)
        self.reporter.notice(f"evaluating {len(windows):,} windows of the test split")

        def progress(done: int, total: int) -> None:
            self._leave_if_asked()
            self.reporter.testing(done, total)

        self.reporter.testing(0, len(windows))
        test = self._engine().evaluate(windows, self.characters_per_token, progress=progress)
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
            "wall_seconds": round(self.clock.seconds(), 2),
            "minutes": minutes,
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "trunk_parameters": sum(p.numel() for n, p in self.model.named_parameters() if "transformer." in n),
            "test": test.to_json(),
            "source": self.run.data.source,
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "processes": self.processes.world,
            "device": str(self.device),
            "machine": platform.machine(),
        }
        if self.processes.first:
            write_json(self.out / SUMMARY, summary)
        return summary
