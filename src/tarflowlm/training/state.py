"""What `train --resume` needs beyond the weights: optimisers, counters, random states. Trusted data.

state/step-NNNNNNNN/ is written by PyTorch's distributed checkpoint under a temporary name, with a manifest.json, and
renamed when complete; the newest whole one is resumed.
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
from tarflowlm.runs.checkpoint import COUNTERS, STATE
from tarflowlm.runs.manifest import is_whole, write_manifest
from tarflowlm.training.distributed import ALONE, Processes
from tarflowlm.training.guards import RunningLoss
from tarflowlm.training.pace import TimeSpent


@dataclass
class Window:
    """Steps since the last line of the log."""

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    tokens: int = 0
    seconds: float = 0.0


@dataclass
class Counters:
    """Where a run stands. All of it is saved, so that a resumed run goes on as if it had never stopped."""

    step: int = 0
    """Optimiser steps of all stages, those that were skipped included."""
    tokens: int = 0
    stage: int = 0
    stage_step: int = 0
    """Steps of the current stage."""
    due: bool = False
    """An evaluation comes before the next step: checkpoints are made before evaluations."""
    best: float = math.inf
    """Validation bound of the stage at its last improvement of `stall_tolerance`, in nats per token."""
    lowest: float = math.inf
    """Lowest validation bound of the stage: that of best/."""
    stalled: int = 0
    """Evaluations since `best`."""
    skipped: int = 0
    """Steps in a row that were skipped."""
    seconds: list[float] = field(default_factory=list)
    """Training time of every stage."""
    stage_steps: list[int] = field(default_factory=list)
    """Steps of every finished stage."""
    stage_tokens: list[int] = field(default_factory=list)
    valid_bpc: list[float] = field(default_factory=list)
    """Validation bound at the end of every finished stage, bits per character."""
    window: Window = field(default_factory=Window)
    running: RunningLoss = field(default_factory=RunningLoss)
    spent: TimeSpent = field(default_factory=TimeSpent)

    @classmethod
    def restored(cls, saved: dict[str, Any]) -> "Counters":
        """From `dataclasses.asdict`."""
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
    """Write state/step-N for N = counters["step"]; the `keep` newest are kept.

    All processes take part and write their shards into one folder, which they must share; the first does the rest.
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
        # on a full disk it would be in the way of everything else
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    if processes.first:
        for old in sorted(root.glob("step-*"))[:-keep]:
            # renamed first, so that a state is never there in part
            shutil.rmtree(old.rename(root / f".{old.name}"))
    processes.wait()


def _complete(temporary: Path, target: Path, counters: dict[str, Any]) -> None:
    """Counters and manifest, and the name under which it counts."""
    write_json(temporary / COUNTERS, counters)
    write_manifest(temporary, [file.name for file in temporary.iterdir()])
    for file in temporary.iterdir():
        sync_file(file)
    sync_folder(temporary)
    temporary.rename(target)
    sync_folder(target.parent)


@contextmanager
def _one_process() -> Iterator[None]:
    """Without the warning about what `no_dist` asks for."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def remove_partial(directory: Path) -> None:
    """Remove what a kill left of states that were being written or deleted."""
    for partial in (directory / STATE).glob(".step-*"):
        shutil.rmtree(partial)


def newest_state(directory: Path, notice: Callable[[str], None]) -> Path:
    """The newest state that is whole. Newer ones are set aside as state/damaged-step-N, which `notice` says."""
    states = sorted((directory / STATE).glob("step-*"))
    whole = next((state for state in reversed(states) if is_whole(state, COUNTERS)), None)
    if whole is None:
        rest = f"; none of {', '.join(state.name for state in states)} is whole" if states else ""
        raise UserError(f"{directory} has no state to resume from{rest}: start it anew with another --out")
    for state in states[states.index(whole) + 1 :]:
        aside = state.with_name(f"damaged-{state.name}")
        if aside.exists():
            shutil.rmtree(aside)
        state.rename(aside)
        notice(f"{state} is damaged, set aside as {aside.name}: going on from {whole.name}")
    return whole


def read_counters(state: Path) -> dict[str, Any]:
    return read_json(state / COUNTERS)


def load_state(
    state: Path,
    model: nn.Module,
    optimizers: list[torch.optim.Optimizer],
    generator: torch.Generator,
    *,
    processes: Processes = ALONE,
) -> None:
    """Fill model, optimisers and generator from a state directory; they must be built for the same stage.

    It may have been written by another number of processes: shards are cut anew.
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
        raise UserError(f"{state} does not fit this run ({reason}): is it of another run?") from None
    set_state_dict(
        model,
        optimizers,
        model_state_dict=tensors["model"],
        optim_state_dict=tensors["optimizers"],
    )
    generator.set_state(tensors["generator"])
