"""A training run, from its configuration to its results.

`train` is the whole of it, and `train_stage` is the loop.
"""

import gc
import logging
import math
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Generator, Tensor, nn

from tarflowlm.config import RunConfig, TrainConfig
from tarflowlm.device import keep_freed_memory
from tarflowlm.errors import SILENT, Progress, Record, UserError
from tarflowlm.evaluation.flops import peak_flops, training_flops
from tarflowlm.evaluation.likelihood import Likelihood, bits
from tarflowlm.model import LanguageModel
from tarflowlm.processes import ALONE, Processes
from tarflowlm.runs.checkpoint import Checkpoint, has_whole_weights, read_summary
from tarflowlm.training import begin, checkpoint, optim, pace, parallel, stages
from tarflowlm.training.metrics import MetricsLog
from tarflowlm.training.state import Run
from tarflowlm.training.validation import validate

STEPS_BETWEEN_READS = {"cuda": 16}
"""Steps after which the host waits for the losses of a device, and asks whether to stop."""
STEPS_BETWEEN_COLLECTIONS = 1000  # of garbage, by several processes at once
StopRequests = Callable[[], AbstractContextManager[Callable[[], str | None]]]
"""A context that yields a function: the reason why the run was asked to stop, or None."""
Unread = list[tuple[int, Tensor, list[str], Tensor]]
"""Steps whose numbers are still on the device: the step, its loss and gradient norm [2], and the
names of the parameters that have a gradient with the norms of these.
"""

logger = logging.getLogger("tarflowlm")


@contextmanager
def no_stop_requests() -> Iterator[Callable[[], str | None]]:
    """The default `StopRequests`: never stop; signals keep their handlers."""
    yield lambda: None


def train(
    asked: RunConfig | None,
    out: Path,
    *,
    device: torch.device,
    reporter: Progress = SILENT,
    processes: Processes = ALONE,
    stop_requests: StopRequests = no_stop_requests,
    parent: Checkpoint | None = None,
) -> dict[str, Any]:
    """Train the run that is `asked` for in the directory `out`, or continue the one there.

    Returns the summary, which is also written to summary.json. Collective.

    If `out` holds this run already, it continues from the newest undamaged state, with the time
    that this had left; its weights come out as if it had never stopped. The number of processes may
    change. A finished run is left alone, unless its weights are damaged and have to be restored.
    With `asked` None, whatever run `out` holds continues. A run of `tuning` begins with the weights
    and the tokenizer of its `parent`, and keeps a copy of both.

    Raises UserError, before anything is written, if `out` is in use for anything else, or the text
    has changed; Stopped, with everything saved, if `stop_requests` says so; FloatingPointError as
    soon as the loss or a gradient is not finite.
    """
    begun = processes.from_first(processes.first and begin.is_begun(out))
    if begun:
        if asked is not None:
            begin.check_same(asked, out)
        is_left = processes.first and has_whole_weights(out)
        summary = processes.from_first(read_summary(out) if is_left else None)
        if summary is not None:
            logger.info("%s is finished", out)
            return summary
    config = begin.configured(asked, out, parent, begun=begun)
    processes.rows_each(config.train)  # for its error
    corpus = begin.corpus_of(config, out, parent, reporter, processes)
    config = processes.from_first(begin.decided(config, corpus, device))
    with begin.writing(out, processes):
        if processes.first and begin.is_begun(out) != begun:
            raise UserError(
                f"{out} has just been begun by another process: repeat the command to continue it"
            )
        folder = checkpoint.newest_state(out) if processes.first and begun else None
        folder = processes.from_first(folder)
        if processes.first and folder is None:
            begin.write_start(out, asked, config, corpus, parent)
        announce(config, out)
        keep_freed_memory()
        compiled = parallel.compiles(config.train, processes, device)
        group = dist.new_group(backend="gloo") if processes.world > 1 else None
        assert not isinstance(group, int), "every process is a member of the group"
        with stop_requests() as stop_signal, parallel.compiling(compiled):
            run = Run(
                config=config,
                out=out,
                corpus=corpus,
                device=device,
                processes=processes,
                compiles=compiled,
                log=MetricsLog(reporter),
                stop_signal=stop_signal,
                writer=ThreadPoolExecutor(1),
                writes=[],
                group=group,
            )
            try:
                stages.start(run, folder)
                while run.counters.stage < config.num_stages:
                    stages.leave_stage(run, train_stage(run))
                return stages.finish(run)
            finally:
                # returns once nothing is being written any more, even if something failed
                run.writer.shutdown()
                run.log.close()


def announce(config: RunConfig, out: Path) -> None:
    """Say what is trained, for how long, and where to."""
    train = config.train
    minutes = f"{round(train.minutes, 2):g} minutes"
    length = minutes if train.minutes else f"{train.num_steps:,} steps"
    tokens = f"{train.batch_size * config.model.context:,} tokens a step"
    logger.info("%s on %s: %s, %s, into %s", config.name, config.data.source, length, tokens, out)


def train_stage(run: Run) -> Likelihood:
    """Train until the steps or the time of the stage are used up; returns the last validation.

    With `train.patience`, it ends as soon as so many evaluations in a row were no better. Raises
    FloatingPointError, naming parameters, and Stopped, as `train` does. Collective.
    """
    config = run.config
    train = config.train
    counters = run.counters
    every = STEPS_BETWEEN_READS.get(run.device.type, 1)
    unread: Unread = []
    may_compile = run.compiles
    measure_pace = partial(pace.measure, train, counters, run.seconds, run.num_test_windows)
    measure_pace()
    if counters.stage_step == 0:
        # the best weights of a stage may be those that it begins with, and it may have no steps
        counters.evaluation_is_due |= train.keep == "best" or counters.stage_is_over
    done, total = pace.units(train, counters)
    run.log.reporter.stage(stages.describe_stage(run), total, done)

    mark = time.perf_counter()
    while True:
        # Evaluate. This comes after the checkpoint of the step, so that a kill during a long
        # evaluation loses nothing; a resumed run starts with it.
        if counters.evaluation_is_due:
            result = validate(run)
            measure_pace()
            has_stalled = 0 < train.patience <= counters.stalled
            if counters.stage_is_over or has_stalled:
                return result
            mark = time.perf_counter()

        if run.processes.world > 1 and counters.stage_step % STEPS_BETWEEN_COLLECTIONS == 0:
            gc.collect()

        tokens = next_batch(run)

        loss = accumulate_gradients(
            run.model, run.bound, tokens, run.generator, train, run.processes
        )
        trained = {n: p for n, p in run.model.named_parameters() if p.grad is not None}
        each = optim.norms({name: p.grad for name, p in trained.items() if p.grad is not None})
        norm = torch.linalg.vector_norm(each)

        # Read the numbers of the step. If one is not finite, the run ends here, before any weight
        # changes. A GPU is read every 16 steps: weights may be spoiled by then, none saved.
        unread.append((counters.step + 1, torch.stack((loss, norm)), [*trained], each))
        if len(unread) >= every:
            read(run, unread)

        # Change the weights.
        num_steps = max(counters.stage_step + 1, counters.expected_steps)
        lr = config.optim.lr * optim.schedule(config.optim, counters.stage_step, num_steps)
        optim.take_step(run.optimizers, trained, norm, lr=lr, grad_clip=config.optim.grad_clip)
        num_tokens = tokens.numel() * run.processes.world
        counters.step += 1
        counters.stage_step += 1
        counters.tokens += num_tokens
        counters.window_tokens += num_tokens
        optim.update_average(run.copies, run.model, counters.stage_step, train.ema)
        if may_compile:
            # the first step of a stage compiles layers, which is not training time
            read(run, unread)
            run.began += time.perf_counter() - mark
            counters.window_tokens = 0
            counters.window_seconds = 0.0
            counters.window_waited = 0.0
            mark = time.perf_counter()
            may_compile = False

        # Report.
        measure_pace()
        before = done
        done, _ = pace.units(train, counters)
        run.log.reporter.advance(done - before)

        # Log. Whatever is saved below has been read before.
        why = pace.stop_requested(run) if counters.step % every == 0 else None
        counters.evaluation_is_due = (
            counters.stage_is_over or counters.step % train.evaluate_every == 0
        )
        is_logged = counters.evaluation_is_due or counters.step % train.log_every == 0
        is_saved = (
            why is not None
            or counters.evaluation_is_due
            or counters.step % train.checkpoint_every == 0
            or (train.minutes > 0 and run.seconds() - counters.total > pace.SAVE_SECONDS)
        )
        if is_logged or is_saved:
            read(run, unread)
            now = time.perf_counter()
            counters.window_seconds += now - mark
            counters.training += now - mark
            mark = now
        if is_logged:
            write_line(run, lr)
            checkpoint.wait(run, until_done=False)

        # Save.
        if is_saved:
            checkpoint.save(run)
            mark = time.perf_counter()
        if why is not None:
            checkpoint.stop(run, why)


def next_batch(run: Run) -> Int[Tensor, "B T"]:
    """This process's rows of the next batch, on its device."""
    start = time.perf_counter()
    tokens = run.sampler.next()
    run.counters.window_waited += time.perf_counter() - start
    if run.device.type == "cuda":
        # a copy from pageable memory would wait for all work queued on the device
        tokens = tokens.pin_memory()
    return tokens.to(run.device, non_blocking=True)


def accumulate_gradients(
    model: LanguageModel,
    bound: nn.Module,
    tokens: Int[Tensor, "B T"],
    generator: Generator,
    train: TrainConfig,
    processes: Processes = ALONE,
) -> Float[Tensor, ""]:
    """Add up the gradients of the mean loss over the global batch; returns that mean, in nats per
    token. Collective.

    `tokens` are this process's rows. `generator` draws the noise of the whole batch, and must be in
    the same state in all processes.
    """
    first_row = processes.rank * len(tokens)
    global_batch = tokens.new_empty(processes.world * len(tokens), tokens.shape[1])
    noise = model.draw_noise(global_batch, generator)[first_row : first_row + len(tokens)]
    parts = zip(tokens.chunk(train.accumulate), noise.chunk(train.accumulate), strict=True)
    total = torch.zeros((), device=tokens.device)
    with parallel.seeded_dropout(train.dropout, generator, processes):
        for index, (part, part_noise) in enumerate(parts, start=1):
            # gradients are averaged over the processes with the last part
            parallel.synchronise(bound, index == train.accumulate)
            loss = bound(part, part_noise).mean() / tokens.shape[1] / train.accumulate
            loss.backward()
            total = total + loss.detach()
    return processes.gather(total[None]).mean()


def read(run: Run, unread: Unread) -> None:
    """Read the numbers of steps into the window of the log, with one transfer from the device.

    FloatingPointError for the first step that is not finite. Collective.
    """
    if not unread:
        return
    rows = torch.stack([numbers for _, numbers, _, _ in unread]).tolist()
    for (step, _, names, each), (loss, norm) in zip(unread, rows, strict=True):
        if not math.isfinite(loss + norm):
            raise not_finite(run, step, loss, names, each)
        run.counters.window_losses.append(loss)
        run.counters.window_norms.append(norm)
    unread.clear()


def not_finite(
    run: Run, step: int, loss: float, names: list[str], each: Tensor
) -> FloatingPointError:
    """The error for a step: the gradients that are not finite, and the parameters, if these are
    still the ones of that step. Collective.
    """
    culprits = {"gradients": dict(zip(names, each.tolist(), strict=True))}
    if step > run.counters.step:
        weights = optim.trained_parameters(run.model)
        culprits["parameters"] = dict(zip(weights, optim.norms(weights).tolist(), strict=True))
    found = [f"the loss is {loss:.4g}"]
    for kind, sizes in culprits.items():
        if broken := [name for name, size in sizes.items() if not math.isfinite(size)]:
            found.append(
                f"{len(broken)} {kind} are not finite: {', '.join(broken[: checkpoint.NAMED])}"
            )
    remedy = "lower optim.lr or optim.grad_clip in a new run; earlier checkpoints are kept"
    if run.counters.step == 0:
        remedy = "lower optim.lr, or check the values of model, which has learnt nothing yet"
    return FloatingPointError(f"the run ended at step {step}: {'; '.join(found)}; {remedy}")


def write_line(run: Run, lr: float) -> None:
    """Write a line of the log with the means since the last one, and start the next window."""
    counters = run.counters
    loss = statistics.fmean(counters.window_losses)
    duration = max(counters.window_seconds, 1e-9)
    speed = counters.window_tokens / duration
    characters = run.corpus.num_characters("train") / run.corpus.num_tokens("train")
    record: Record = {
        "split": "train",
        **counters.place(),
        "nats_per_token": loss,
        "grad_norm": statistics.fmean(counters.window_norms),
        "bpc": bits(loss) / characters,
        "lr": lr,
        "tokens_per_second": speed,
        "data_share": counters.window_waited / duration,
    }
    if run.device.type == "cuda":
        record["memory_gb"] = torch.cuda.max_memory_allocated() / 1e9
        torch.cuda.reset_peak_memory_stats()
        if peak := peak_flops(torch.cuda.get_device_name(run.device)):
            model = run.config.model_of_stage(counters.stage)
            flops = training_flops(model, frozen=counters.stage) / model.context  # of a token
            record["mfu"] = speed * flops / peak / run.processes.world
    run.log.write(record)
    counters.window_losses = []
    counters.window_norms = []
    counters.window_tokens = 0
    counters.window_seconds = 0.0
    counters.window_waited = 0.0
