"""The stages of a run: its first or resumed state, the next stage, and the end."""

import logging
import math
import platform
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from tarflowlm.data import WindowSampler, eval_windows
from tarflowlm.errors import UserError
from tarflowlm.evaluation.likelihood import Likelihood
from tarflowlm.files import read_json, write_json
from tarflowlm.language_model import seeded
from tarflowlm.runs.checkpoint import BEST, COUNTERS, PARENT, SUMMARY, write_run
from tarflowlm.runs.weights import read_weights
from tarflowlm.training.checkpoint import finite_weights, load_state, save, submit_weights, wait
from tarflowlm.training.optim import assign, build_optimizers, copy_of, muon_precision
from tarflowlm.training.optim import trained_parameters as trained
from tarflowlm.training.parallel import parallelise, whole_model
from tarflowlm.training.state import Counters, Job, State, seconds
from tarflowlm.training.validation import evaluate

LEAST_TEST_WINDOWS = 32
"""Test windows that a run with a time limit evaluates at least, even if its time is over."""

logger = logging.getLogger("tarflowlm")


def first_state(job: Job) -> State:
    """The state before the first step; opens the log. Collective."""
    state = build_state(job, Counters())
    state.counters.stage_start = seconds(job, state)
    open_log(job, step=0, position=0)
    return state


def resumed_state(job: Job, folder: Path) -> State:
    """The state in the `folder` of a checkpoint; cuts the log back. Collective."""
    saved = read_json(folder / COUNTERS)
    if saved["corpus"] != job.corpus.fingerprint:
        raise UserError(
            f"{job.config.data.source} is not the text that {job.out} was trained on: "
            "restore that text to resume"
        )
    step = saved["step"]
    logger.info("resuming %s at step %d", job.out, step)
    state = build_state(job, Counters(**saved["counters"]))
    load_state(folder, state, job.processes, seed=(job.config.seed + 1_000_003 * step) % 2**62)
    state.sampler.load_state_dict(saved["sampler"])
    # weights may be damaged, or a kill came between the state and its weights
    submit_weights(job, state, job.out, finite_weights(job, state))
    open_log(job, step=step, position=saved["metrics"])
    return state


def build_state(job: Job, counters: Counters) -> State:
    """A state with new weights, in the stage that the counters say."""
    config, processes = job.config, job.processes
    began = time.monotonic() - counters.total
    with seeded(config.seed):
        model = config.model_of_stage(0).build()
    model.config = config.model
    sampler = WindowSampler(
        job.corpus.split("train"),
        window=config.model.context,
        batch=processes.rows_each(config.train),
        seed=config.seed,
        rank=processes.rank,
        world=processes.world,
        end=job.corpus.tokenizer.end,
    )
    state = State(
        model=model,
        bound=model,  # until a stage is entered
        optimizers=[],
        copies={},
        sampler=sampler,
        generator=torch.Generator(device=job.device).manual_seed(config.seed),
        counters=counters,
        began=began,
    )
    # a finished run has left its last stage
    enter_stage(job, state, min(counters.stage, config.num_stages - 1))
    return state


def open_log(job: Job, *, step: int, position: int) -> None:
    if job.processes.first:
        job.log.open(job.out, resume_at=position)
        job.log.track(job.config, job.out, resume_at=step)


def enter_stage(job: Job, state: State, stage: int) -> None:
    """Append the blocks of `stage`, freeze the others, and build optimisers. Collective."""
    config = job.config
    model = state.model
    while model.num_blocks < config.model_of_stage(stage).num_blocks:
        with seeded(config.seed + 1000 * model.num_blocks):
            model.append_block()
    if config.parent:
        # blocks below are as this run has trained them
        own = f"prior.blocks.{stage}." if stage else ""
        inherited, _ = read_weights(job.out / PARENT)
        weights = {name: w for name, w in inherited.items() if name.startswith(own)}
        model.load_state_dict(weights, strict=False)
    if not job.is_sharded:
        # FSDP2 moves shards one by one: the whole model need not fit on the device
        model.to(job.device)
    model.train_only(stage)
    state.bound = parallelise(
        model, config.train, job.processes, frozen=stage, compiled=job.compiles
    )
    precision = job.processes.from_first(muon_precision(config.optim, model, job.device))
    state.optimizers = build_optimizers(config.optim, model, precision)
    state.copies = {}
    if config.train.ema:
        state.copies["average"] = copy_of(trained(model))
    if config.train.keep == "best":
        state.copies["best"] = copy_of(trained(model))


def leave_stage(job: Job, state: State, end: Likelihood) -> None:
    """Record how a stage ended, with `end` as its last validation, and enter the next one.
    Collective.
    """
    counters = state.counters
    keeps_best = job.config.train.keep == "best"
    kept = counters.lowest / end.nats_per_token if keeps_best else 1.0
    counters.valid_bpc.append(kept * end.bpc)
    if counters.stage and not counters.lowest_at:
        why = "gained nothing" if counters.stage_step else "has no time"
        name = describe_stage(job, counters.stage)
        logger.info("%s %s: the block stays as it started", name, why)
    counters.stage_steps.append(counters.stage_step)
    counters.stage += 1
    counters.stage_step = 0
    counters.share = 0.0
    counters.lowest = math.inf
    counters.stalled = 0
    final = state.copies.get("best") or state.copies.get("average")
    if final:
        assign(trained(state.model), final)
        assign(state.copies.get("average", {}), final)
        submit_weights(job, state, job.out, finite_weights(job, state))
    if counters.stage < job.config.num_stages:
        if job.is_sharded:
            state.model = whole_model(state.model)
        enter_stage(job, state, counters.stage)
    counters.stage_start = seconds(job, state)
    # a stage with a time limit may end at an evaluation, some steps after its last checkpoint
    save(job, state)
    wait(job)


def describe_stage(job: Job, stage: int) -> str:
    """A stage in words, such as "stage 2/3: block 2 mix1"."""
    model, count = job.config.model, job.config.num_stages
    if count > 1:
        return f"stage {stage + 1}/{count}: {model.describe(stage)}"
    return model.describe(0) if model.num_blocks == 1 else "all blocks"


def finish(job: Job, state: State) -> dict[str, Any]:
    """Evaluate the test split, and write the summary. Collective."""
    counters = state.counters
    minutes = job.config.train.minutes
    config = job.config
    if minutes:
        # the steps that the run took instead, and the test windows for which there is time left
        left = 60 * minutes - seconds(job, state)
        fitting = max(LEAST_TEST_WINDOWS, int(left / max(counters.per_window, 1e-9)))
        lengths = replace(
            config.train,
            minutes=0.0,
            stage_steps=tuple(counters.stage_steps),
            test_windows=min(job.num_test_windows, job.processes.from_first(fitting)),
        )
        config = replace(config, train=lengths)
    windows = eval_windows(
        job.corpus.split("test"), config.model.context, config.train.test_windows or None
    )
    job.reporter.stage("evaluating the test split", len(windows))
    test = evaluate(job, state, windows, job.reporter)
    sizes = {name: p.numel() for name, p in state.model.named_parameters()}
    summary = {
        "preset": config.name,
        "seed": config.seed,
        "steps": counters.step,
        "tokens": counters.tokens,
        "stage_valid_bpc": counters.valid_bpc,
        "seconds": round(counters.training, 2),
        "wall_seconds": round(seconds(job, state), 2),
        "minutes": minutes,
        "parameters": sum(sizes.values()),
        "trunk_parameters": sum(n for name, n in sizes.items() if "transformer." in name),
        "test": test.to_json(),
        "source": config.data.source,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "processes": job.processes.world,
        "device": str(job.device),
        "machine": platform.machine(),
    }
    if job.processes.first:
        write_json(job.out / SUMMARY, summary)
        for directory in (job.out, job.out / BEST) if minutes else ():
            write_run(directory, config, job.corpus.tokenizer)
    return summary
