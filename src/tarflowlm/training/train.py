"""A training run, from its configuration to its results.

`train` is the whole run, `train_stage` is the loop, `accumulate_gradients` is the loss of a step.
"""

import gc
import logging
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager
from pathlib import Path

import torch
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
from tarflowlm.training.checkpoint import newest_state, save, stop
from tarflowlm.training.configure import complete
from tarflowlm.training.directory import check_same, is_begun, only_writer, write_start
from tarflowlm.training.evaluate import finish, validate
from tarflowlm.training.log import MetricsLog
from tarflowlm.training.losses import Losses
from tarflowlm.training.pace import StepClock, find_due, update_pace
from tarflowlm.training.run import Run
from tarflowlm.training.stages import leave_stage
from tarflowlm.training.start import begin_run, resume_run
from tarflowlm.training.writer import Writer

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
    model: LanguageModel | None = None,
) -> Summary:
    """Train the run that is `asked` for in the directory `out`, or continue the one there.

    Returns the summary, which is also written to summary.json. Collective.

    If `out` holds this run already, it continues from the newest undamaged state, with the time
    that was left then; its weights are the same as if it had never stopped. The number of processes
    may change. A finished run is left alone, unless its weights are damaged and must be restored.
    With `asked` None, any run in `out` continues. A run of `tuning` begins with the weights and the
    tokenizer of its `parent`, and keeps a copy of both; any other run may begin with the weights of
    a `model`, of which frozen parameters stay as they are.

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
        asked if not begun else None, out, parent, model, device, processes, reporter
    )
    compiles = parallel.compiles(config.train, processes, device)
    with only_writer(out, processes, begun=begun):
        folder = processes.from_first(newest_state(out) if processes.first and begun else None)
        if processes.first and folder is None:
            first, info = (model, {}) if parent is None else (parent.model, parent.info)
            write_start(out, asked, config, corpus, first, info)
        announce(config, out)
        with (
            stop_requests() as stop_signal,
            parallel.compiling(compiles),
            closing(MetricsLog(reporter)) as log,
            Writer(device, processes) as writer,
        ):
            run = Run(
                out=out,
                corpus=corpus,
                device=device,
                processes=processes,
                compiles=compiles,
                log=log,
                writer=writer,
                stop_signal=stop_signal,
                config=config,
            )
            if folder is None:
                begin_run(run)
            else:
                resume_run(run, folder)
            while run.counters.stage < run.config.num_stages:
                leave_stage(run, train_stage(run))
            return finish(run)


def announce(config: RunConfig, out: Path) -> None:
    """Log the run, its text, its length and its directory."""
    train = config.train
    minutes = f"{round(train.minutes, 2):g} minutes"
    length = minutes if train.minutes else f"{train.num_steps:,} steps"
    tokens = f"{train.batch_size * config.model.context:,} tokens a step"
    logger.info("%s on %s: %s, %s, into %s", config.name, config.data.source, length, tokens, out)


def train_stage(run: Run) -> Likelihood:
    """Train until the steps or the time of the stage are used up; returns the last validation.

    With `train.patience`, it ends as soon as that many evaluations in a row were no better. Raises
    FloatingPointError, naming parameters, and Stopped, as `train` does. Collective.
    """
    config, counters, model = run.config, run.counters, run.model
    train = config.train
    losses, clock = Losses(run), StepClock(run)
    while True:
        # Evaluate. This comes after the checkpoint of the step, so that a kill during a long
        # evaluation loses nothing; a resumed run starts with it.
        if counters.evaluation_is_due:
            result = validate(run)
            if counters.stage_is_over or 0 < train.patience <= counters.stalled:
                return result

        # Take a batch.
        clock.start()
        tokens = next_batch(run)
        num_tokens = tokens.numel() * run.processes.world
        clock.got_batch(num_tokens)

        # Compute its loss and the gradients. If they are not finite, the run ends here, before any
        # weight changes.
        loss = accumulate_gradients(model, run.bound, tokens, run.generator, train, run.processes)
        trained = {name: p for name, p in model.named_parameters() if p.grad is not None}
        norm = losses.add(loss, trained)

        # Change the weights.
        num_steps = max(counters.stage_step + 1, counters.expected_steps)
        lr = config.optim.lr * optim.schedule(config.optim, counters.stage_step, num_steps)
        optim.take_step(run.optimizers, trained, norm, lr=lr, grad_clip=config.optim.grad_clip)
        counters.step += 1
        counters.stage_step += 1
        counters.tokens += num_tokens
        optim.update_average(run.copies, model, counters.stage_step, train.ema)
        if clock.is_compiling:
            # the first step of a stage compiles layers, which is not training time
            losses.read()
            clock.leave_out()

        # Record it.
        update_pace(run)
        due = find_due(run)
        if due.anything:
            losses.read()
        clock.stop()
        if due.log:
            write_line(run, lr)
            run.writer.wait(until_done=False)

        # Save it.
        if due.save:
            save(run)
        if due.stop is not None:
            stop(run, due.stop)


def next_batch(run: Run) -> Int[Tensor, "B T"]:
    """The rows of this process of the next batch, on its device."""
    if run.processes.world > 1 and run.counters.stage_step % 1000 == 0:
        gc.collect()  # by all processes at once, as none collects by itself
    tokens = run.sampler.next()
    if run.device.type == "cuda":
        # a copy from pageable memory would wait for all work queued there
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

    `bound` maps tokens and their noise to negative bounds [B] in nats, as
    `parallel.parallelise` wraps those of the model.
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


def write_line(run: Run, lr: float) -> None:
    """Write a line of the log with the means over the steps since the last one."""
    counters = run.counters
    means = run.log.means()
    characters = run.corpus.num_characters("train") / run.corpus.num_tokens("train")
    bpc = bits(means["nats_per_token"]) / characters if characters else math.inf
    record: Record = {"split": "train", **counters.place(), **means, "bpc": bpc, "lr": lr}
    if run.device.type == "cuda":
        record["memory_gb"] = torch.cuda.max_memory_allocated(run.device) / 1e9
        torch.cuda.reset_peak_memory_stats(run.device)
        if peak := peak_flops(torch.cuda.get_device_name(run.device)):
            model = run.config.model_of_stage(counters.stage)
            flops = training_flops(model, frozen=counters.stage) / model.context  # of a token
            record["mfu"] = means["tokens_per_second"] * flops / peak / run.processes.world
    run.log.write(record)
