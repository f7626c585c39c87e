"""What `train --resume` needs beyond the weights: optimisers, counters, random states. Trusted data.

state/step-NNNNNNNN/ is written by PyTorch's distributed checkpoint under a temporary name and renamed when complete;
the newest complete one is resumed.
"""

import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
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
from tarflowlm.training.distributed import ALONE, Processes

STATE, COUNTERS = "state", "counters.json"


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
        for leftover in root.glob(".step-*"):
            shutil.rmtree(leftover)
    if processes.from_first(target.exists()):
        return
    model_state, optimizer_state = get_state_dict(model, optimizers)
    tensors = {"model": model_state, "optimizers": optimizer_state, "generator": generator.get_state()}
    with _one_process():
        save(tensors, checkpoint_id=temporary, no_dist=processes.world == 1)
    if processes.first:
        _complete(temporary, target, counters)
        for old in complete_states(directory)[:-keep]:
            shutil.rmtree(old)
    processes.wait()


def _complete(temporary: Path, target: Path, counters: dict[str, Any]) -> None:
    write_json(temporary / COUNTERS, counters)
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


def complete_states(directory: Path) -> list[Path]:
    """Complete states of a run, oldest first."""
    return sorted((directory / STATE).glob("step-*"))


def newest_state(directory: Path) -> Path:
    states = complete_states(directory)
    if not states:
        raise UserError(f"{directory} has no state to resume from: start it anew with another --out")
    return states[-1]


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
        first_line = str(error).strip().splitlines()[0]
        raise UserError(
            f"{state} cannot be resumed ({first_line}): remove it to fall back to the one before"
        ) from None
    set_state_dict(
        model,
        optimizers,
        model_state_dict=tensors["model"],
        optim_state_dict=tensors["optimizers"],
    )
    generator.set_state(tensors["generator"])
