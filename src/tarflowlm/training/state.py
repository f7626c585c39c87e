"""Training states, from which `train --resume` continues: model, optimisers, counters and random states.

state/step-NNNNNNNN/ is written by PyTorch's distributed checkpoint under a temporary name, with a manifest.json, and
renamed when complete. A run resumes from the newest undamaged one. Unlike weights, states are trusted data: reading
one may unpickle.
"""

import math
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from tarflowlm.errors import UserError
from tarflowlm.files import read_json, sync_file, sync_folder, write_json
from tarflowlm.runs.checkpoint import COUNTERS, STATE, undamaged_state
from tarflowlm.runs.manifest import write_manifest
from tarflowlm.training.distributed import ALONE, Processes
from tarflowlm.training.guards import RunningLoss
from tarflowlm.training.pace import TimeSpent


@dataclass
class Window:
    """The steps since the last line of the log."""

    losses: list[float] = field(default_factory=list)
    """Nats per token of every step."""
    norms: list[float] = field(default_factory=list)
    """Gradient norm of every step."""
    tokens: int = 0
    seconds: float = 0.0
    """Training time."""


@dataclass
class Counters:
    """The progress of a run. All of it is saved, so that a resumed run continues as if it had never stopped."""

    step: int = 0
    """Optimiser steps of all stages, including skipped ones."""
    tokens: int = 0
    """Tokens of all steps, over all processes."""
    stage: int = 0
    """Current stage, from 0."""
    stage_step: int = 0
    """Steps of the current stage."""
    due: bool = False
    """Whether an evaluation comes before the next step; checkpoints are saved before evaluations."""
    best: float = math.inf
    """Validation bound of the stage at its last improvement of `stall_tolerance`, in nats per token."""
    lowest: float = math.inf
    """Lowest validation bound of the stage, that of best/, in nats per token."""
    stalled: int = 0
    """Evaluations since `best`."""
    skipped: int = 0
    """Steps in a row that were skipped."""
    seconds: list[float] = field(default_factory=list)
    """Training time of every stage, without evaluations and checkpoints."""
    stage_steps: list[int] = field(default_factory=list)
    """Steps of every finished stage."""
    stage_tokens: list[int] = field(default_factory=list)
    """Tokens of every stage, the current one included."""
    valid_bpc: list[float] = field(default_factory=list)
    """Validation bound at the end of every finished stage, bits per character."""
    window: Window = field(default_factory=Window)
    running: RunningLoss = field(default_factory=RunningLoss)
    spent: TimeSpent = field(default_factory=TimeSpent)

    @classmethod
    def restored(cls, saved: dict[str, Any]) -> "Counters":
        """Counters from the dictionary that `dataclasses.asdict` made of them."""
        nested = {"window": Window(**saved["window"]), "running": RunningLoss(**saved["running"])}
        spent = TimeSpent(**saved.get("spent", {}))
        return cls(**(saved | nested | {"spent": spent}))


def save_state(
    directory: Path,
    model: nn.Module,
    optimizers: list[torch.optim.Optimizer],
    generator: torch.Generator,
    counters: dict[str, Any],
    *,
    keep: int = 2,
    processes: Processes = ALONE,
) -> None:
    """Write the state of step `counters["step"]` and delete all but the `keep` newest states.

    Collective: all processes write their shards into one folder, which they must share; the first does the rest.
    """
    root = directory / STATE
    target = root / f"step-{counters['step']:08d}"
    temporary = root / f".{target.name}"
    if processes.first:
        root.mkdir(exist_ok=True)
    processes.wait()
    model_state, optimizer_state = get_state_dict(model, optimizers)
    tensors = {"model": model_state, "optimizers": optimizer_state, "generator": generator.get_state()}
    try:
        with _one_process():
            save(tensors, checkpoint_id=temporary, no_dist=processes.world == 1)
        if processes.first:
            _complete(temporary, target, counters)
    except BaseException:
        # on a full disk its space is needed
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    if processes.first:
        for old in sorted(root.glob("step-*"))[:-keep]:
            # renamed first, so that no partial state is ever visible
            shutil.rmtree(old.rename(root / f".{old.name}"))
    processes.wait()


def _complete(temporary: Path, target: Path, counters: dict[str, Any]) -> None:
    """Add counters and manifest to a written state, sync it, and give it its final name."""
    write_json(temporary / COUNTERS, counters)
    write_manifest(temporary, [file.name for file in temporary.iterdir()])
    for file in temporary.iterdir():
        sync_file(file)
    sync_folder(temporary)
    temporary.rename(target)
    sync_folder(target.parent)


@contextmanager
def _one_process() -> Iterator[None]:
    """Silences the warning that `no_dist` causes."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def remove_partial(directory: Path) -> None:
    """Remove the remains of states that were being written or deleted when a run was killed."""
    for partial in (directory / STATE).glob(".step-*"):
        shutil.rmtree(partial)


def newest_state(directory: Path, notice: Callable[[str], None]) -> Path:
    """The newest undamaged state. Newer ones are renamed to state/damaged-step-NNNNNNNN, with a call of `notice`.

    UserError if there is none.
    """
    states = sorted((directory / STATE).glob("step-*"))
    whole = undamaged_state(directory)
    if whole is None:
        rest = f"; all of {', '.join(state.name for state in states)} are damaged" if states else ""
        raise UserError(f"{directory} has no state to resume from{rest}: start a new run with another --out")
    for state in states[states.index(whole) + 1 :]:
        aside = state.with_name(f"damaged-{state.name}")
        if aside.exists():
            shutil.rmtree(aside)
        state.rename(aside)
        notice(f"{state} is damaged, set aside as {aside.name}: resuming from {whole.name}")
    return whole


def read_counters(state: Path) -> dict[str, Any]:
    """The counters saved with a state. UserError if the file is missing or not JSON."""
    return read_json(state / COUNTERS)


def load_state(
    state: Path,
    model: nn.Module,
    optimizers: list[torch.optim.Optimizer],
    generator: torch.Generator,
    *,
    processes: Processes = ALONE,
) -> None:
    """Load a state into model, optimisers and generator, which must have been built for the same stage. Collective.

    The state may have been written by another number of processes; it is resharded. UserError if it does not fit.
    """
    model_state, optimizer_state = get_state_dict(model, optimizers)
    tensors: dict[str, Any] = {
        "model": model_state,
        "optimizers": optimizer_state,
        "generator": generator.get_state(),
    }
    try:
        with _one_process():
            load(tensors, checkpoint_id=state, no_dist=processes.world == 1)
    except (CheckpointException, OSError, KeyError, RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[-1]
        raise UserError(f"{state} does not fit this run ({reason}): does it belong to another run?") from None
    set_state_dict(
        model,
        optimizers,
        model_state_dict=tensors["model"],
        optim_state_dict=tensors["optimizers"],
    )
    generator.set_state(tensors["generator"])
