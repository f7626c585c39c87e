"""Checkpoints of a run: its weights, and the training state from which `train --resume` continues.

state/step-NNNNNNNN/ is written by PyTorch's distributed checkpoint under a temporary name, with a
manifest.json, and renamed when complete, all in a thread of its own. A run resumes from the newest
undamaged one. Unlike weights, states are trusted data: reading one may unpickle.
"""

import logging
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save as save_shards
from torch.utils._pytree import tree_map_only

from tarflowlm.errors import Stopped, UserError
from tarflowlm.files import sync_file, sync_folder, write_json
from tarflowlm.runs import BEST, COUNTERS, STATE, TOKENIZER, WEIGHTS
from tarflowlm.runs.checkpoint import resume_command, undamaged_state, write_run
from tarflowlm.runs.weights import SETTINGS, settings_sha256, write_manifest, write_weights
from tarflowlm.schema import to_dict
from tarflowlm.training.losses import NAMED
from tarflowlm.training.optim import assign, averaged, trained_parameters
from tarflowlm.training.pace import seconds
from tarflowlm.training.parallel import whole_weights
from tarflowlm.training.run import Run

KEPT = 2
"""Number of training states that are kept: the newest one, and one more in case it is damaged.

The newest one from before the rate fell is kept, too (`training.extend`).
"""

logger = logging.getLogger("tarflowlm")


def save(run: Run) -> None:
    """Copy a checkpoint for the thread to write, unless this step is saved. Collective."""
    counters = run.counters
    if counters.saved_step == counters.step:
        return
    run.writer.wait()  # for the last checkpoint
    counters.total = seconds(run)
    weights = finite_weights(run)
    counters.saved_step = counters.step
    if run.has_full_rate:
        counters.flat_step = counters.step
    saved = {
        "config": to_dict(run.config),
        "counters": asdict(counters),
        "metrics": run.log.position(),
        "window": asdict(run.log.window),
        "sampler": run.sampler.state_dict(),
        "corpus": run.corpus.fingerprint,
    }
    # a copy, since training continues
    tensors = tree_map_only(Tensor, lambda t: t.detach().to("cpu", copy=True), tensors_of(run))
    run.writer.submit(write_state, run, tensors, saved, weights)


def save_best(run: Run) -> None:
    """Save the weights of the best validation bound to best/, a run directory of its own."""
    best = run.out / BEST
    if run.processes.first and not (best / TOKENIZER).exists():
        best.mkdir(exist_ok=True)
        write_run(best, run.config, run.corpus.tokenizer)
    present = run.copies.get("average") or trained_parameters(run.model)
    assign(run.copies.get("best", {}), present)
    submit_weights(run, best)


def stop(run: Run, reason: str) -> NoReturn:
    """Save the run and raise Stopped. Collective."""
    save(run)
    run.writer.wait()
    remedy = f"continue with `{resume_command(run.out)}`"
    raise Stopped(f"stopped by {reason} and saved at step {run.counters.step}; {remedy}")


# weights


def finite_weights(run: Run) -> tuple[dict[str, Tensor], dict[str, str]]:
    """A copy of the weights to evaluate, on the CPU of the first process, and for their header the
    counts of this step. Collective.

    FloatingPointError if they are not finite, so that such weights are never saved.
    """
    with averaged(run.copies, run.model):
        weights = whole_weights(run.model, keep=run.processes.first)
    broken = [name for name, tensor in weights.items() if not torch.isfinite(tensor).all()]
    if broken := run.processes.from_first(broken):
        where = f"parameters {', '.join(broken[:NAMED])} are not finite"
        remedy = "lower optim.lr in a new run; earlier checkpoints are kept"
        raise FloatingPointError(f"{where} at step {run.counters.step}: {remedy}")
    counts = {
        "step": run.counters.step,
        "tokens": run.counters.tokens,
        "blocks": run.model.num_blocks,
    }
    info = {name: str(count) for name, count in counts.items()}
    return weights, info | {SETTINGS: settings_sha256(to_dict(run.config))}


def submit_weights(run: Run, *folders: Path) -> None:
    """Let the thread write the `finite_weights` to the folders. Collective."""
    weights = finite_weights(run)
    if run.processes.first:
        for folder in folders:
            run.writer.submit(write_weights, folder / WEIGHTS, *weights)


def submit_run(run: Run) -> None:
    """Let the thread write config.json of the run, and of its best weights if there are any."""
    if run.processes.first:
        for folder in filter(Path.exists, (run.out, run.out / BEST)):
            run.writer.submit(write_run, folder, run.config, run.corpus.tokenizer)


# the training state


def write_state(
    run: Run,
    tensors: dict[str, object],
    saved: dict[str, Any],
    weights: tuple[dict[str, Tensor], dict[str, str]],
) -> None:
    """Write a state, with `saved` as its counters.json, delete all but the newest ones, and write
    its `finite_weights`. Collective: all processes write their shards into one folder.

    Weights whose state cannot be written are not written either: nothing could continue from them.
    """
    root = run.out / STATE
    name = f"step-{saved['counters']['step']:08d}"
    temporary = root / f".{name}"
    group = run.writer.group
    try:
        # not the run's folder, which PyTorch would make again if it was moved away
        root.mkdir(exist_ok=True)
        temporary.mkdir(exist_ok=True)
        save_shards(tensors, checkpoint_id=temporary, process_group=group, no_dist=group is None)
        if run.processes.first:
            write_json(temporary / COUNTERS, saved)
            # network file systems list the files of other machines late
            shards = FileSystemReader(temporary).read_metadata().storage_data.values()
            files = {COUNTERS, ".metadata", *(shard.relative_path for shard in shards)}
            write_manifest(temporary, files)
            for file in files:
                sync_file(temporary / file)
            sync_folder(temporary)
            temporary.rename(root / name)
            sync_folder(root)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)  # on a full disk its space is needed
        if isinstance(error, CheckpointException):  # no Exception, so that nobody would catch it
            raise next(failure for failure, _ in error.failures.values()) from error
        raise
    if run.processes.first:
        # renamed first, so that no partial state is ever visible
        flat = f"step-{saved['counters']['flat_step']:08d}"
        for old in sorted(root.glob("step-*"))[:-KEPT]:
            if old.name == flat:
                continue
            shutil.rmtree(old.rename(root / f".{old.name}"))
        write_weights(run.out / WEIGHTS, *weights)


def tensors_of(run: Run) -> dict[str, Any]:
    """All tensors of a state: of model, optimisers and generator, and the copies of weights."""
    model, optimizers = get_state_dict(run.model, run.optimizers)
    reset_optimizers(run)
    generator = run.generator.get_state()
    return {"model": model, "optimizers": optimizers, "generator": generator, **run.copies}


def reset_optimizers(run: Run) -> None:
    """Empty the optimisers of a stage that has no step yet. To read or write their state, PyTorch
    takes a step with a rate of zero, which would count.
    """
    if not run.counters.stage_step:
        for optimizer in run.optimizers:
            optimizer.state.clear()


def load_tensors(run: Run, folder: Path) -> None:
    """Load the tensors in `folder`, from any number of processes, into a state built for the same
    stage. Collective.

    A generator of another kind of device cannot continue; it gets a seed of this step.
    """
    tensors = tensors_of(run)
    try:
        saved = FileSystemReader(folder).read_metadata().state_dict_metadata["generator"]
        is_moved = saved.size != tensors["generator"].shape  # type: ignore[union-attr]
        if is_moved:
            del tensors["generator"]
        load(tensors, checkpoint_id=folder, no_dist=run.writer.group is None)
    except (CheckpointException, OSError, KeyError, RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[-1]
        what = f"{folder} does not fit this run ({reason})"
        raise UserError(f"{what}: restore the run's own state") from None
    set_state_dict(
        run.model,
        run.optimizers,
        model_state_dict=tensors["model"],
        optim_state_dict=tensors["optimizers"],
    )
    reset_optimizers(run)
    if is_moved:
        logger.warning("%s is from another kind of device: the noise changes", folder.name)
        run.generator.manual_seed((run.config.seed + 1_000_003 * run.counters.step) % 2**62)
    else:
        run.generator.set_state(tensors["generator"])


def newest_state(directory: Path) -> Path:
    """The newest undamaged state. Newer ones are renamed to state/damaged-step-NNNNNNNN, with a
    notice.
    """
    states = sorted((directory / STATE).glob("step-*"))
    newest = undamaged_state(directory)
    if newest is None:
        rest = f"; all of {', '.join(state.name for state in states)} are damaged" if states else ""
        remedy = "start a run in another directory"
        raise UserError(f"{directory} has no state to resume from{rest}: {remedy}")
    for state in states[states.index(newest) + 1 :]:
        aside = state.with_name(f"damaged-{state.name}")
        shutil.rmtree(aside, ignore_errors=True)
        state.rename(aside)
        logger.warning(
            "%s is damaged, set aside as %s: resuming from %s", state, aside.name, newest.name
        )
    return newest
