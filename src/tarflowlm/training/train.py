"""A training run, from its configuration to its results.

`train` is the whole run, `train_stage` is the loop, `accumulate_gradients` is the loss of a step.
"""

import gc
import logging
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, closing, contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Generator, Tensor, nn

from tarflowlm import chunks
from tarflowlm.config import RunConfig, TrainConfig
from tarflowlm.errors import SILENT, Progress, Record
from tarflowlm.evaluation.flops import peak_flops, training_flops
from tarflowlm.evaluation.likelihood import Likelihood, bits
from tarflowlm.model import LanguageModel
from tarflowlm.processes import ALONE, Processes
from tarflowlm.runs.checkpoint import Checkpoint, Summary, finished_summary
from tarflowlm.training import optim, parallel
from tarflowlm.training.checkpoint import newest_state, save, stop, wait
from tarflowlm.training.configure import complete
from tarflowlm.training.directory import check_same, is_begun, only_writer, write_start
from tarflowlm.training.log import MetricsLog, PendingStep, read_losses
from tarflowlm.training.stages import finish, leave_stage, load_state, new_state, validate
from tarflowlm.training.state import Run, State, is_time_to_save, update_pace

STEPS_BETWEEN_READS = {"cuda": 16}
"""Steps after which the host waits for the losses of a device, and asks whether to stop."""
StopRequests = Callable[[], AbstractContextManager[Callable[[], str | None]]]
"""A context that yields a function: the reason why the run was asked to stop, or None."""

logger = logging.getLogger("tarflowlm")


@contextmanager
def no_stop_requests() -> Iterator[Callable[[], None]]:
    """A context in which nothing asks a run to stop."""
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
) -> Summary:
    """Train the run that is `asked` for in the directory `out`, or continue the one there.

    Returns the summary, which is also written to summary.json. Collective.

    If `out` holds this run already, it continues from the newest undamaged state, with the time
    that was left then; its weights are the same as if it had never stopped. The number of processes
    may change. A finished run is left alone, unless its weights are damaged and must be restored.
    With `asked` None, any run in `out` continues. A run of `tuning` begins with the weights and the
    tokenizer of its `parent`, and keeps a copy of both.

    Raises UserError, before anything is written, if `out` is in use for anything else, or the text
    has changed; Stopped, with everything saved, if `stop_requests` says so; FloatingPointError as
    soon as the loss or a gradient is not finite. By default nothing asks it to stop.
    """
    begun = processes.from_first(processes.first and is_begun(out))
    if begun and asked is not None:
        check_same(asked, out)
    summary = processes.from_first(finished_summary(out) if processes.first and begun else None)
    if summary is not None:
        logger.info("%s is finished", out)
        return summary

    config, corpus = complete(
        asked if not begun else None, out, parent, device, processes, reporter
    )
    compiles = parallel.compiles(config.train, processes, device)
    with only_writer(out, processes, begun=begun):
        folder = processes.from_first(newest_state(out) if processes.first and begun else None)
        if processes.first and folder is None:
            write_start(out, asked, config, corpus, parent)
        announce(config, out)
        group = dist.new_group(backend="gloo") if processes.world > 1 else None
        assert not isinstance(group, int), "every process is a member of the group"
        with (
            stop_requests() as stop_signal,
            parallel.compiling(compiles),
            closing(MetricsLog(reporter)) as log,
            ThreadPoolExecutor(1) as writer,  # leaving waits until all is written
        ):
            run = Run(
                out=out,
                corpus=corpus,
                device=device,
                processes=processes,
                compiles=compiles,
                log=log,
                stop_signal=stop_signal,
                writer=writer,
                writes=[],
                group=group,
            )
            state = new_state(run, config) if folder is None else load_state(run, config, folder)
            while state.counters.stage < state.config.num_stages:
                last_validation = train_stage(run, state)
                leave_stage(run, state, last_validation)
            return finish(run, state)


def announce(config: RunConfig, out: Path) -> None:
    """Log the run, its text, its length and its directory."""
    train = config.train
    minutes = f"{round(train.minutes, 2):g} minutes"
    length = minutes if train.minutes else f"{train.num_steps:,} steps"
    tokens = f"{train.batch_size * config.model.context:,} tokens a step"
    logger.info("%s on %s: %s, %s, into %s", config.name, config.data.source, length, tokens, out)


def train_stage(run: Run, state: State) -> Likelihood:
    """Train until the steps or the time of the stage are used up; returns the last validation.

    With `train.patience`, it ends as soon as that many evaluations in a row were no better. Raises
    FloatingPointError, naming parameters, and Stopped, as `train` does. Collective.
    """
    config, counters, model = state.config, state.counters, state.model
    train = config.train
    every = STEPS_BETWEEN_READS.get(run.device.type, 1)
    pending = list[PendingStep]()
    may_compile = run.compiles
    done, total = counters.progress(train)
    run.log.reporter.stage(state.stage_name, total, done)

    while True:
        # Evaluate. This comes after the checkpoint of the step, so that a kill during a long
        # evaluation loses nothing; a resumed run starts with it.
        if counters.evaluation_is_due:
            result = validate(run, state)
            if counters.stage_is_over or 0 < train.patience <= counters.stalled:
                return result

        # Compute the gradients of a batch.
        start = time.perf_counter()
        if run.processes.world > 1 and counters.stage_step % 1000 == 0:
            gc.collect()  # by all processes at once, as none collects by itself
        before_batch = time.perf_counter()
        tokens = state.sampler.next()
        waited = time.perf_counter() - before_batch
        num_tokens = tokens.numel() * run.processes.world
        if run.device.type == "cuda":
            # a copy from pageable memory would wait for all work queued there
            tokens = tokens.pin_memory()
        tokens = tokens.to(run.device, non_blocking=True)
        loss = accumulate_gradients(
            model, state.bound, tokens, state.generator, train, run.processes
        )
        trained = {name: p for name, p in model.named_parameters() if p.grad is not None}
        norms = optim.norms({n: p.grad for n, p in trained.items() if p.grad is not None})
        norm = torch.linalg.vector_norm(norms)

        # Read the numbers of the step. If one is not finite, the run ends here, before any weight
        # changes. A GPU is read only every 16 steps: weights may be bad by then, but are not saved.
        numbers = torch.stack((loss, norm))
        pending.append(PendingStep(counters.step + 1, numbers, [*trained], norms))
        read = read_losses(pending, model, counters.step) if len(pending) >= every else []

        # Change the weights.
        num_steps = max(counters.stage_step + 1, counters.expected_steps)
        lr = config.optim.lr * optim.schedule(config.optim, counters.stage_step, num_steps)
        optim.take_step(state.optimizers, trained, norm, lr=lr, grad_clip=config.optim.grad_clip)
        counters.step += 1
        counters.stage_step += 1
        counters.tokens += num_tokens
        optim.update_average(state.copies, model, counters.stage_step, train.ema)
        if may_compile:
            # the first step of a stage compiles layers, which is not training time
            read += read_losses(pending, model, counters.step)
            state.began += time.perf_counter() - start
            start, num_tokens, waited, may_compile = time.perf_counter(), 0, 0.0, False

        # Find what is due now. The numbers of a step are read before it is logged or saved.
        update_pace(run, state)
        why = run.stop_requested() if counters.step % every == 0 else None
        counters.evaluation_is_due = (
            counters.stage_is_over or counters.step % train.evaluate_every == 0
        )
        log_is_due = counters.evaluation_is_due or counters.step % train.log_every == 0
        save_is_due = counters.evaluation_is_due or is_time_to_save(run, state)
        if log_is_due or save_is_due or why is not None:
            read += read_losses(pending, model, counters.step)

        # Report, log, save.
        before, (done, _) = done, counters.progress(train)
        run.log.reporter.advance(done - before)
        duration = time.perf_counter() - start
        counters.training += duration
        run.log.step(read, tokens=num_tokens, seconds=duration, waited=waited)
        if log_is_due:
            write_line(run, state, lr)
            wait(run, until_done=False)
        if save_is_due:
            save(run, state)
        if why is not None:
            stop(run, state, why)


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
    budget = train.tokens_at_once or tokens.numel()
    parts = [*chunks.row_ranges(len(tokens), tokens.shape[1], budget)]
    total = torch.zeros((), device=tokens.device)
    with parallel.seeded_dropout(train.dropout, generator, processes):
        for part in parts:
            # gradients are averaged over the processes with the last part
            parallel.synchronise(bound, part == parts[-1])
            loss = bound(tokens[part], noise[part]).sum() / tokens.numel()
            loss.backward()
            total = total + loss.detach()
    return processes.gather(total[None]).mean()


def write_line(run: Run, state: State, lr: float) -> None:
    """Write a line of the log with the means over the steps since the last one."""
    counters = state.counters
    means = run.log.means()
    characters = run.corpus.num_characters("train") / run.corpus.num_tokens("train")
    bpc = bits(means["nats_per_token"]) / characters
    record: Record = {"split": "train", **counters.place(), **means, "bpc": bpc, "lr": lr}
    if run.device.type == "cuda":
        record["memory_gb"] = torch.cuda.max_memory_allocated(run.device) / 1e9
        torch.cuda.reset_peak_memory_stats(run.device)
        if peak := peak_flops(torch.cuda.get_device_name(run.device)):
            model = state.config.model_of_stage(counters.stage)
            flops = training_flops(model, frozen=counters.stage) / model.context  # of a token
            record["mfu"] = means["tokens_per_second"] * flops / peak / run.processes.world
    run.log.write(record)
