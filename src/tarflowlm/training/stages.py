"""The stages of a run: its first or resumed state, validation, the next stage, and the end."""

import logging
import math
import platform
import time
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from jaxtyping import Int
from torch import Generator, Tensor

from tarflowlm import chunks
from tarflowlm.config import RunConfig
from tarflowlm.data import WindowSampler, eval_windows
from tarflowlm.errors import SILENT, Progress, Record, UserError
from tarflowlm.evaluation.likelihood import Likelihood, bits, summarise
from tarflowlm.files import read_json, write_json
from tarflowlm.model import as_flow, seeded
from tarflowlm.presets import with_blocks
from tarflowlm.runs import BEST, COUNTERS, PARENT, SUMMARY
from tarflowlm.runs.checkpoint import Summary, read_weights, write_run
from tarflowlm.schema import flatten, from_dict
from tarflowlm.training.checkpoint import (
    averaged,
    load_tensors,
    save_best,
    stop,
    submit_run,
    submit_weights,
    wait,
)
from tarflowlm.training.configure import native_precision
from tarflowlm.training.log import Window
from tarflowlm.training.optim import assign, build_optimizers, copy_of
from tarflowlm.training.optim import trained_parameters as trained
from tarflowlm.training.parallel import first_blocks, parallelise, reshard
from tarflowlm.training.sample import text_so_far
from tarflowlm.training.state import Counters, Run, State, num_test_windows, seconds, update_pace

T = TypeVar("T")

logger = logging.getLogger("tarflowlm")


def new_state(run: Run, config: RunConfig) -> State:
    """The state of a run before its first step, with its log opened. Collective."""
    state = built_state(run, config, Counters())
    begin_stage(run, state)
    if run.processes.first:
        run.log.open(run.out)
        run.log.track(config, run.out, resume_at=0)
    return state


def load_state(run: Run, present: RunConfig, folder: Path) -> State:
    """The state in the `folder` of a checkpoint, with the log cut back to it. Collective.

    Its configuration may have other blocks than the `present` one, because blocks may have left
    since. The weights are written again, because a kill may have come between the state and its
    weights, or the file may be damaged. UserError for a state of another run or another text.
    """
    saved = read_json(folder / COUNTERS)
    config = from_dict(RunConfig, saved["config"], where=str(folder / COUNTERS))
    theirs = flatten(config)
    for name, value in flatten(present).items():
        if not name.startswith(("model.blocks", "train.")) and theirs.get(name) != value:
            what = f"it has {name} {theirs.get(name)}, not {value}"
            raise UserError(f"{folder} does not fit this run ({what}): restore the run's own state")
    if saved["corpus"] != run.corpus.fingerprint:
        what = f"{config.data.source} is not the text that {run.out} was trained on"
        raise UserError(f"{what}: restore that text to resume")
    counters = restored(Counters, saved, "counters", folder)
    window = restored(Window, saved, "window", folder)
    logger.info("resuming %s at step %d", run.out, counters.step)
    state = built_state(run, config, counters)
    load_tensors(run, state, folder)
    state.sampler.load_state_dict(saved["sampler"])
    if run.processes.first:
        # if its weights were damaged, it is finished only once they are whole again
        (run.out / SUMMARY).unlink(missing_ok=True)
    # the configuration first: this state may have more blocks than the one that was written last
    submit_run(run, state)
    submit_weights(run, state, run.out)
    if run.processes.first:
        run.log.open(run.out, resume_at=saved["metrics"], window=window)
        run.log.track(config, run.out, resume_at=counters.step)
    return state


def restored(kind: type[T], saved: dict[str, Any], part: str, folder: Path) -> T:
    """A dataclass from its `part` of counters.json in `folder`; what is missing has its default.

    UserError for a count that it does not know. A manifest covers the file, so types are trusted.
    """
    known = {one.name for one in fields(cast(Any, kind))}
    for name in saved[part]:
        if name not in known:
            what = f"{folder / COUNTERS}: {part}.{name} is of another version"
            raise UserError(f"{what}; resume with the version of tarflowlm that wrote it")
    return kind(**saved[part])


def built_state(run: Run, config: RunConfig, counters: Counters) -> State:
    """The state at the place of `counters`, with initial weights and optimisers. Collective."""
    with seeded(config.seed):
        model = config.model_of_stage(0).build()
    model.config = config.model
    state = State(
        config=config,
        counters=counters,
        model=model,
        sampler=WindowSampler(
            run.corpus.split("train"),
            window=config.model.context,
            batch=run.processes.rows_each(config.train),
            seed=config.seed,
            rank=run.processes.rank,
            world=run.processes.world,
            end=run.corpus.tokenizer.end,
        ),
        generator=torch.Generator(device=run.device).manual_seed(config.seed),
    )
    enter_stage(run, state)
    state.began = time.monotonic() - counters.total
    return state


def enter_stage(run: Run, state: State) -> None:
    """Append the blocks of the stage to the model, freeze the others, and build optimisers. If the
    run is over, take the last stage. Collective.
    """
    config, counters, model = state.config, state.counters, state.model
    stage = min(counters.stage, config.num_stages - 1)
    while model.num_blocks < config.model_of_stage(stage).num_blocks:
        with seeded(config.seed + 1000 * (model.num_blocks + counters.idle)):
            as_flow(model).append_block()
    if config.parent:
        # this run has trained the blocks below
        own = f"prior.blocks.{stage}." if stage else ""
        inherited, _ = read_weights(run.out / PARENT)
        weights = {name: w for name, w in inherited.items() if name.startswith(own)}
        model.load_state_dict(weights, strict=False)
    if not run.processes.shards(config.train):
        # FSDP2 moves shards one by one: the whole model need not fit on the device
        model.to(run.device)
    model.train_only(stage)
    state.bound = parallelise(
        model, config.train, run.processes, frozen=stage, compiled=run.compiles
    )
    precision = run.processes.from_first(native_precision(run.device))
    state.optimizers = build_optimizers(config.optim, model, precision)
    state.copies = {}
    if config.train.ema:
        state.copies["average"] = copy_of(trained(model))
    if config.train.keep == "best":
        state.copies["best"] = copy_of(trained(model))


def begin_stage(run: Run, state: State) -> None:
    """Let the counters of the stage start. Collective."""
    counters, train = state.counters, state.config.train
    counters.stage_step = 0
    counters.share = 0.0
    counters.lowest = math.inf
    counters.lowest_at = 0
    counters.stalled = 0
    counters.stage_start = seconds(run, state)
    if counters.stage < state.config.num_stages:
        update_pace(run, state)
        # the best weights of a stage may be those that it begins with, and it may have no steps
        counters.evaluation_is_due = train.keep == "best" or counters.stage_is_over


def validate(run: Run, state: State) -> Likelihood:
    """Evaluate on the validation windows, log the bound and a text, and save the weights if they
    are the best of the stage. Collective.
    """
    counters, config = state.counters, state.config
    windows = eval_windows(
        run.corpus.split("valid"), config.model.context, config.train.evaluate_windows
    )
    start = seconds(run, state)
    if run.compiles and state.validated is not state.bound:
        # the first evaluation compiles layers, which is not training time
        evaluate(run, state, windows)
        state.began += seconds(run, state) - start
        state.validated = state.bound
    result = evaluate(run, state, windows)
    evaluated = seconds(run, state)
    record: Record = {
        "split": "valid",
        **counters.place(),
        "nats_per_token": result.nats_per_token,
        "bpc": result.bpc,
        "stderr": result.stderr,
    }
    if text := text_so_far(run, state):
        record["text"] = text
    run.log.write(record)
    counters.stalled += 1
    if result.nats_per_token < counters.lowest:
        counters.lowest = result.nats_per_token
        counters.lowest_at = counters.stage_step
        counters.stalled = 0
        save_best(run, state)
    counters.evaluation_is_due = False
    counters.evaluation = seconds(run, state) - start
    counters.per_window = (evaluated - start) / len(windows)
    update_pace(run, state)
    return result


@torch.no_grad()
def evaluate(
    run: Run, state: State, windows: Int[Tensor, "W T"], progress: Progress = SILENT
) -> Likelihood:
    """The bound over `windows`, with the noise of `evaluation.likelihood.evaluate`.

    Each process computes its own rows of every batch. Stops in between if the run was asked to.
    Collective.
    """
    model, processes = state.model, run.processes
    size = chunks.rows_at_once(windows.shape[1], chunks.EVALUATED_TOKENS)
    generator = Generator(device=run.device).manual_seed(0)
    bound = state.bound if processes.shards(state.config.train) else model.bound
    nats = list[Tensor]()
    why: str | None = None
    model.eval()
    with averaged(state):
        for batch in windows.split(processes.world * size):
            tokens = batch.to(run.device)
            # draw noise in the same parts as a single process
            noise = torch.cat([model.draw_noise(part, generator) for part in tokens.split(size)])
            # in the last batch, processes without own rows repeat one, because all must take part
            each = -(-len(tokens) // processes.world)
            own = processes.rank * each + torch.arange(each, device=run.device)
            rows = own.clamp(max=len(tokens) - 1).split(
                chunks.bound_rows(tokens.shape[1], run.device)
            )
            parts = [bound(tokens[some], noise[some]) for some in rows]
            nats.append(processes.gather(torch.cat(parts))[: len(tokens)])
            reshard(state.bound)
            progress.advance(len(batch))
            why = run.stop_requested()
            if why is not None:
                break
    model.train()
    if why is not None:  # out here, so that the weights in training are saved
        stop(run, state, why)
    characters = torch.from_numpy(run.corpus.tokenizer.characters_per_token)
    log_weights = -torch.cat(nats)[None].cpu().double()
    return summarise(model, log_weights, windows, characters)


def leave_stage(run: Run, state: State, end: Likelihood) -> None:
    """Record how a stage ended, with `end` as its last validation, and enter the next one.

    A block above the first that gained nothing leaves the model, and its stage leaves the record,
    unless `train.keep_idle` keeps it. In `train --from` a block that gained nothing stays: it works
    as the parent trained it. Collective.
    """
    config, counters = state.config, state.counters
    final = state.copies.get("best") or state.copies.get("average")
    if final:
        assign(trained(state.model), final)
        assign(state.copies.get("average", {}), final)
    kept = counters.lowest if config.train.keep == "best" else end.nats_per_token
    bpc = bits(kept) * end.tokens / end.characters
    # a coupling that does not start as the identity may end worse than the model without it
    is_worse = counters.stage > 0 and config.train.keep == "best" and bpc > counters.valid_bpc[-1]
    is_idle = counters.stage > 0 and (is_worse or not counters.lowest_at)
    leaves = is_idle and not (config.train.keep_idle or config.parent)
    if is_idle:
        why = "gained nothing" if counters.stage_step else "has no time"
        stays = "stays" if counters.lowest_at else "stays as it started"
        what = "leaves the model" if leaves else stays
        logger.info("%s %s: the block %s", state.stage_name, why, what)
    if leaves:
        drop_block(run, state)
    else:
        if final:
            submit_weights(run, state, run.out)
        counters.valid_bpc.append(bpc)
        counters.stage_steps.append(counters.stage_step)
        counters.stage += 1
    if leaves or counters.stage < config.num_stages:
        if run.processes.shards(config.train):
            state.model = first_blocks(state.model, state.model.num_blocks)
        enter_stage(run, state)
    begin_stage(run, state)
    wait(run)


def drop_block(run: Run, state: State) -> None:
    """Take the block of the stage out of the model and of the configuration, on disk as well.
    Collective.
    """
    stage = state.counters.stage
    state.counters.idle += 1
    others = [block for block in range(state.config.num_stages) if block != stage]
    state.config = with_blocks(state.config, others)
    state.model = first_blocks(state.model, stage)
    state.model.config = state.config.model
    state.copies = {}
    # The configuration comes last, because one of more blocks can load fewer.
    submit_weights(run, state, run.out, run.out / BEST)
    submit_run(run, state)


def finish(run: Run, state: State) -> Summary:
    """Evaluate the test split, and write the summary. Collective."""
    config, counters = state.config, state.counters
    minutes = config.train.minutes
    if minutes:
        # take the steps of the run instead, and the test windows that the time left allows, at
        # least 32
        left = 60 * minutes - seconds(run, state)
        fitting = max(32, int(left / max(counters.per_window, 1e-9)))
        lengths = replace(
            config.train,
            minutes=0.0,
            stage_steps=tuple(counters.stage_steps),
            test_windows=min(
                num_test_windows(run.corpus, config), run.processes.from_first(fitting)
            ),
        )
        config = replace(config, train=lengths)
    windows = eval_windows(
        run.corpus.split("test"), config.model.context, config.train.test_windows or None
    )
    run.log.reporter.stage("evaluating the test split", len(windows))
    test = evaluate(run, state, windows, run.log.reporter)
    sizes = {name: p.numel() for name, p in state.model.named_parameters()}
    summary = {
        "preset": config.name,
        "seed": config.seed,
        "steps": counters.step,
        "tokens": counters.tokens,
        "stage_valid_bpc": counters.valid_bpc,
        "seconds": round(counters.training, 2),
        "wall_seconds": round(seconds(run, state), 2),
        "minutes": minutes,
        "parameters": sum(sizes.values()),
        "trunk_parameters": sum(n for name, n in sizes.items() if "transformer." in name),
        "test": test.to_json(),
        "source": config.data.source,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "processes": run.processes.world,
        "device": str(run.device),
        "machine": platform.machine(),
    }
    if run.processes.first:
        for directory in (run.out, run.out / BEST) if minutes else ():
            write_run(directory, config, run.corpus.tokenizer)
        write_json(run.out / SUMMARY, summary)  # last: it says that the run is finished
    return summary
