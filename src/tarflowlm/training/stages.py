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
from tarflowlm.evaluation.likelihood import Likelihood, bits
from tarflowlm.files import read_json, write_json
from tarflowlm.model import as_flow, seeded
from tarflowlm.runs.checkpoint import BEST, COUNTERS, PARENT, SUMMARY, write_run
from tarflowlm.runs.weights import read_weights
from tarflowlm.training.checkpoint import finite_weights, load_state, save, submit_weights, wait
from tarflowlm.training.optim import assign, build_optimizers, copy_of, muon_precision
from tarflowlm.training.optim import trained_parameters as trained
from tarflowlm.training.parallel import parallelise, whole_model
from tarflowlm.training.state import Counters, Run
from tarflowlm.training.validation import evaluate

LEAST_TEST_WINDOWS = 32
"""Test windows that a run with a time limit evaluates at least, even if its time is over."""

logger = logging.getLogger("tarflowlm")


def start(run: Run, folder: Path | None) -> None:
    """Bring a run to before its first step, or to the state in the `folder` of a checkpoint; open
    its log, or cut it back. Collective.
    """
    config = run.config
    saved: dict[str, Any] = {}
    if folder is not None:
        saved = read_json(folder / COUNTERS)
        if saved["corpus"] != run.corpus.fingerprint:
            what = f"{config.data.source} is not the text that {run.out} was trained on"
            raise UserError(f"{what}: restore that text to resume")
        logger.info("resuming %s at step %d", run.out, saved["step"])
    run.counters = Counters(**saved.get("counters", {}))
    run.began = time.monotonic() - run.counters.total
    run.generator = torch.Generator(device=run.device).manual_seed(config.seed)
    run.sampler = WindowSampler(
        run.corpus.split("train"),
        window=config.model.context,
        batch=run.processes.rows_each(config.train),
        seed=config.seed,
        rank=run.processes.rank,
        world=run.processes.world,
        end=run.corpus.tokenizer.end,
    )
    with seeded(config.seed):
        run.model = config.model_of_stage(0).build()
    run.model.config = config.model
    # a finished run has left its last stage
    enter_stage(run, min(run.counters.stage, config.num_stages - 1))
    if folder is None:
        run.counters.stage_start = run.seconds()
    else:
        load_state(run, folder)
        run.sampler.load_state_dict(saved["sampler"])
        # weights may be damaged, or a kill came between the state and its weights
        submit_weights(run, run.out, finite_weights(run))
    if run.processes.first:
        run.log.open(run.out, resume_at=saved.get("metrics", 0))
        run.log.track(config, run.out, resume_at=run.counters.step)


def enter_stage(run: Run, stage: int) -> None:
    """Append the blocks of `stage`, freeze the others, and build optimisers. Collective."""
    config = run.config
    model = run.model
    while model.num_blocks < config.model_of_stage(stage).num_blocks:
        with seeded(config.seed + 1000 * model.num_blocks):
            as_flow(model).append_block()
    if config.parent:
        # blocks below are as this run has trained them
        own = f"prior.blocks.{stage}." if stage else ""
        inherited, _ = read_weights(run.out / PARENT)
        weights = {name: w for name, w in inherited.items() if name.startswith(own)}
        model.load_state_dict(weights, strict=False)
    if not run.is_sharded:
        # FSDP2 moves shards one by one: the whole model need not fit on the device
        model.to(run.device)
    model.train_only(stage)
    run.bound = parallelise(model, config.train, run.processes, frozen=stage, compiled=run.compiles)
    precision = run.processes.from_first(muon_precision(config.optim, model, run.device))
    run.optimizers = build_optimizers(config.optim, model, precision)
    run.copies = {}
    if config.train.ema:
        run.copies["average"] = copy_of(trained(model))
    if config.train.keep == "best":
        run.copies["best"] = copy_of(trained(model))


def leave_stage(run: Run, end: Likelihood) -> None:
    """Record how a stage ended, with `end` as its last validation, and enter the next one.
    Collective.
    """
    counters = run.counters
    keeps_best = run.config.train.keep == "best"
    kept = counters.lowest if keeps_best else end.nats_per_token
    counters.valid_bpc.append(bits(kept) * end.tokens / end.characters)
    if counters.stage and not counters.lowest_at:
        why = "gained nothing" if counters.stage_step else "has no time"
        logger.info("%s %s: the block stays as it started", describe_stage(run), why)
    counters.stage_steps.append(counters.stage_step)
    counters.stage += 1
    counters.stage_step = 0
    counters.share = 0.0
    counters.lowest = math.inf
    counters.stalled = 0
    final = run.copies.get("best") or run.copies.get("average")
    if final:
        assign(trained(run.model), final)
        assign(run.copies.get("average", {}), final)
        submit_weights(run, run.out, finite_weights(run))
    if counters.stage < run.config.num_stages:
        if run.is_sharded:
            run.model = whole_model(run.model)
        enter_stage(run, counters.stage)
    counters.stage_start = run.seconds()
    # a stage with a time limit may end at an evaluation, some steps after its last checkpoint
    save(run)
    wait(run)


def describe_stage(run: Run) -> str:
    """The stage in words, such as "stage 2/3: block 2 mix1"."""
    model, stage, count = run.config.model, run.counters.stage, run.config.num_stages
    if count > 1:
        return f"stage {stage + 1}/{count}: {model.describe(stage)}"
    return model.describe(0) if model.num_blocks == 1 else "all blocks"


def finish(run: Run) -> dict[str, Any]:
    """Evaluate the test split, and write the summary. Collective."""
    counters = run.counters
    minutes = run.config.train.minutes
    config = run.config
    if minutes:
        # the steps that the run took instead, and the test windows for which there is time left
        left = 60 * minutes - run.seconds()
        fitting = max(LEAST_TEST_WINDOWS, int(left / max(counters.per_window, 1e-9)))
        lengths = replace(
            config.train,
            minutes=0.0,
            stage_steps=tuple(counters.stage_steps),
            test_windows=min(run.num_test_windows, run.processes.from_first(fitting)),
        )
        config = replace(config, train=lengths)
    windows = eval_windows(
        run.corpus.split("test"), config.model.context, config.train.test_windows or None
    )
    run.log.reporter.stage("evaluating the test split", len(windows))
    test = evaluate(run, windows, run.log.reporter)
    sizes = {name: p.numel() for name, p in run.model.named_parameters()}
    summary = {
        "preset": config.name,
        "seed": config.seed,
        "steps": counters.step,
        "tokens": counters.tokens,
        "stage_valid_bpc": counters.valid_bpc,
        "seconds": round(counters.training, 2),
        "wall_seconds": round(run.seconds(), 2),
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
        write_json(run.out / SUMMARY, summary)
        for directory in (run.out, run.out / BEST) if minutes else ():
            write_run(directory, config, run.corpus.tokenizer)
    return summary
