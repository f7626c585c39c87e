"""The stages of a run: entered with a block, left with or without it."""

import logging
import math

from tarflowlm.evaluation.likelihood import Likelihood, bits
from tarflowlm.model import as_flow, seeded
from tarflowlm.presets import with_blocks
from tarflowlm.runs import BEST, PARENT
from tarflowlm.runs.weights import read_weights
from tarflowlm.training.checkpoint import submit_run, submit_weights
from tarflowlm.training.configure import native_precision
from tarflowlm.training.directory import FROZEN
from tarflowlm.training.optim import assign, build_optimizers, copy_of
from tarflowlm.training.optim import trained_parameters as trained
from tarflowlm.training.pace import seconds, update_pace
from tarflowlm.training.parallel import first_blocks, parallelise
from tarflowlm.training.run import Run

logger = logging.getLogger("tarflowlm")


def enter_stage(run: Run) -> None:
    """Append the blocks of the stage to the model, freeze the others, and build optimisers. If the
    run is over, take the last stage. Collective.
    """
    config, counters, model = run.config, run.counters, run.model
    stage = min(counters.stage, config.num_stages - 1)
    while model.num_blocks < config.model_of_stage(stage).num_blocks:
        with seeded(config.seed + 1000 * (model.num_blocks + counters.idle)):
            as_flow(model).append_block()
    kept: list[str] = []
    if config.parent:
        # this run has trained the blocks below
        own = f"prior.blocks.{stage}." if stage else ""
        inherited, info = read_weights(run.out / PARENT)
        kept = info.get(FROZEN, "").split()
        weights = {name: w for name, w in inherited.items() if name.startswith(own)}
        model.load_state_dict(weights, strict=False)
    if not run.is_sharded:
        # FSDP2 moves shards one by one: the whole model need not fit on the device
        model.to(run.device)
    model.train_only(stage)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.requires_grad and name not in kept)
    run.bound = parallelise(model, config.train, run.processes, frozen=stage, compiled=run.compiles)
    precision = run.processes.from_first(native_precision(run.device))
    run.optimizers = build_optimizers(config.optim, model, precision)
    run.copies = {}
    if config.train.ema:
        run.copies["average"] = copy_of(trained(model))
    if config.train.keep == "best":
        run.copies["best"] = copy_of(trained(model))


def begin_stage(run: Run) -> None:
    """Let the counters of the stage start. Collective."""
    counters, train = run.counters, run.config.train
    counters.stage_step = 0
    counters.share = 0.0
    counters.lowest = math.inf
    counters.lowest_at = 0
    counters.stalled = 0
    counters.stage_start = seconds(run)
    if counters.stage < run.config.num_stages:
        update_pace(run)
        # the best weights of a stage may be those that it begins with, and it may have no steps
        counters.evaluation_is_due = train.keep == "best" or counters.stage_is_over


def leave_stage(run: Run, end: Likelihood) -> None:
    """Record how a stage ended, with `end` as its last validation, and enter the next one.

    A block above the first that gained nothing leaves the model, and its stage leaves the record,
    unless `train.keep_idle` keeps it. In `train --from` a block that gained nothing stays: it works
    as the parent trained it. Collective.
    """
    config, counters = run.config, run.counters
    final = run.copies.get("best") or run.copies.get("average")
    if final:
        assign(trained(run.model), final)
        assign(run.copies.get("average", {}), final)
    kept = counters.lowest if config.train.keep == "best" else end.nats_per_token
    # bits per token under a tokenizer that loses characters
    bpc = bits(kept) * end.tokens / (end.characters or end.tokens)
    # a coupling that does not start as the identity may end worse than the model without it
    is_worse = counters.stage > 0 and config.train.keep == "best" and bpc > counters.valid_bpc[-1]
    is_idle = counters.stage > 0 and (is_worse or not counters.lowest_at)
    leaves = is_idle and not (config.train.keep_idle or config.parent)
    if is_idle:
        why = "gained nothing" if counters.stage_step else "has no time"
        stays = "stays" if counters.lowest_at else "stays as it started"
        what = "leaves the model" if leaves else stays
        logger.info("%s %s: the block %s", run.stage_name, why, what)
    if leaves:
        drop_block(run)
    else:
        if final:
            submit_weights(run, run.out)
        counters.valid_bpc.append(bpc)
        counters.stage_steps.append(counters.stage_step)
        counters.stage += 1
    if leaves or counters.stage < config.num_stages:
        if run.is_sharded:
            run.model = first_blocks(run.model, run.model.num_blocks)
        enter_stage(run)
    begin_stage(run)
    run.writer.wait()


def drop_block(run: Run) -> None:
    """Take the block of the stage out of the model and of the configuration, on disk as well.
    Collective.
    """
    stage = run.counters.stage
    run.counters.idle += 1
    others = [block for block in range(run.config.num_stages) if block != stage]
    run.config = with_blocks(run.config, others)
    run.model = first_blocks(run.model, stage)
    run.model.config = run.config.model
    run.copies = {}
    # The configuration comes last, because one of more blocks can load fewer.
    submit_weights(run, run.out, run.out / BEST)
    submit_run(run)
