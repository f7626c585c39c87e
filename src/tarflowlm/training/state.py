"""Training states, from which `train --resume` continues: model, optimisers, counters and random
states.

state/step-NNNNNNNN/ is written by PyTorch's distributed checkpoint under a temporary name, with a
manifest.json, and renamed when complete, all in a thread of its own. A run resumes from the newest
undamaged one. Unlike weights, states are trusted data: reading one may unpickle.
"""

import logging
import math
import shutil
import warnings
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from torch import Generator, Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.utils._pytree import tree_map_only

from tarflowlm.errors import UserError
from tarflowlm.files import sync_file, sync_folder, write_json
from tarflowlm.runs.checkpoint import COUNTERS, STATE, undamaged_state
from tarflowlm.runs.weights import write_manifest
from tarflowlm.training.parallel import ALONE, Processes

# said of every save and load of a single process
warnings.filterwarnings("ignore", message="torch.distributed is disabled")

logger = logging.getLogger("tarflowlm")


@dataclass
class LogWindow:
    """The steps since the last line of the log."""

    losses: list[float] = field(default_factory=list)  # nats per token of every step
    norms: list[float] = field(default_factory=list)  # gradient norm of every step
    tokens: int = 0
    seconds: float = 0.0  # training time
    waited: float = 0.0  # the part of it in which the next batch was not there yet


@dataclass
class TimeSpent:
    """Wall-clock time of a run, in seconds."""

    total: float = (
        0.0  # from the start of the run to its last checkpoint; time lost by a kill does not count
    )
    stage_start: float = 0.0  # `total` at the start of the current stage
    evaluation: float = 0.0  # duration of the newest validation
    per_window: float = 0.0  # the same per window
    save: float = 0.0  # duration of the newest checkpoint


@dataclass
class Counters:
    """The progress of a run. All of it is saved, so that a resumed run continues as if it had never
    stopped.
    """

    step: int = 0  # optimiser steps of all stages, including skipped ones
    tokens: int = 0  # of all steps, over all processes
    stage: int = 0  # the current one, from 0
    stage_step: int = 0  # steps of the current stage
    due: bool = (
        False  # an evaluation comes before the next step; checkpoints are saved before evaluations
    )
    lowest: float = math.inf  # validation bound of the stage, the bound of best/, in nats per token
    skipped: int = 0  # steps in a row that were skipped
    seconds: list[float] = field(
        default_factory=list
    )  # training time of stages, no evaluations and checkpoints
    stage_steps: list[int] = field(default_factory=list)  # of every finished stage
    stage_tokens: list[int] = field(
        default_factory=list
    )  # of every stage, the current one included
    valid_bpc: list[float] = field(
        default_factory=list
    )  # bound at the end of finished stages, bits per character
    window: LogWindow = field(default_factory=LogWindow)
    spent: TimeSpent = field(default_factory=TimeSpent)

    @classmethod
    def restored(cls, saved: dict[str, Any]) -> "Counters":
        """Counters from the dictionary that `dataclasses.asdict` made of them, perhaps in an
        earlier version.
        """
        values = {f.name: saved[f.name] for f in fields(cls) if f.name in saved}
        for name, kind in (("window", LogWindow), ("spent", TimeSpent)):
            values[name] = kind(**saved.get(name, {}))
        return cls(**values)


def save_state(
    directory: Path,
    tensors: dict[str, Any],
    saved: dict[str, Any],
    *,
    keep: int,
    processes: Processes,
    group: Any,
) -> None:
    """Write the state of step `saved["step"]`, with `saved` as counters.json, and delete all but
    the `keep` newest.

    Collective over `group`: all processes write their shards into one shared folder; the first does
    the rest.
    """
    root, name = directory / STATE, f"step-{saved['step']:08d}"
    temporary = root / f".{name}"
    try:
        save(tensors, checkpoint_id=temporary, process_group=group, no_dist=processes.world == 1)
        if processes.first:
            write_json(temporary / COUNTERS, saved)
            write_manifest(temporary, [file.name for file in temporary.iterdir()])
            for file in temporary.iterdir():
                sync_file(file)
            sync_folder(temporary)
            temporary.rename(root / name)
            sync_folder(root)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)  # on a full disk its space is needed
        raise
    if processes.first:
        for old in sorted(root.glob("step-*"))[
            :-keep
        ]:  # renamed first, so that no partial state is ever visible
            shutil.rmtree(old.rename(root / f".{old.name}"))


def local_parts(tensors: dict[str, Tensor]) -> list[Tensor]:
    """The data of tensors, or of this process's shards of them, without a graph."""
    return [(t.to_local() if isinstance(t, DTensor) else t).detach() for t in tensors.values()]


def state_tensors(
    model: nn.Module,
    optimizers: list[Optimizer],
    generator: Generator,
    copies: dict[str, dict[str, Tensor]],
) -> dict[str, Any]:
    """All tensors of a state: of model, optimisers and generator, and further `copies` of weights
    by name.
    """
    model_state, optimizer_state = get_state_dict(model, optimizers)
    return {
        "model": model_state,
        "optimizers": optimizer_state,
        "generator": generator.get_state(),
        **copies,
    }


def snapshot(tensors: dict[str, Any], processes: Processes) -> dict[str, Any]:
    """A copy of `state_tensors` on the CPU, where shards are those of a mesh of CPUs."""
    mesh = init_device_mesh("cpu", (processes.world,)) if processes.world > 1 else None

    def copied(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, DTensor):
            return tensor.detach().to("cpu", copy=True)
        local, shape, stride = (
            tensor.to_local().detach().to("cpu", copy=True),
            tensor.shape,
            tensor.stride(),
        )
        return DTensor.from_local(local, mesh, tensor.placements, shape=shape, stride=stride)

    return tree_map_only(Tensor, copied, tensors)


def load_state(
    state: Path,
    model: nn.Module,
    optimizers: list[Optimizer],
    generator: Generator,
    copies: dict[str, dict[str, Tensor]],
    *,
    seed: int,
    processes: Processes = ALONE,
) -> None:
    """Load a state into model, optimisers, generator and copies, built for the same stage; another
    number of processes may have written it. A generator of another kind of device gets `seed`
    instead. Collective.
    """
    tensors = state_tensors(model, optimizers, generator, copies)
    try:
        saved = FileSystemReader(state).read_metadata().state_dict_metadata["generator"]
        if is_moved := saved.size != tensors["generator"].shape:  # type: ignore[union-attr]
            del tensors["generator"]
        load(tensors, checkpoint_id=state, no_dist=processes.world == 1)
    except (CheckpointException, OSError, KeyError, RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[-1]
        raise UserError(
            f"{state} does not fit this run ({reason}): does it belong to another run?"
        ) from None
    set_state_dict(
        model, optimizers, model_state_dict=tensors["model"], optim_state_dict=tensors["optimizers"]
    )
    if is_moved:
        logger.warning(
            "%s is from another kind of device: the noise from here on is another", state.name
        )
    generator.manual_seed(seed) if is_moved else generator.set_state(tensors["generator"])


def newest_state(directory: Path) -> Path:
    """The newest undamaged state. Newer ones are renamed to state/damaged-step-NNNNNNNN, with a
    notice.
    """
    states = sorted((directory / STATE).glob("step-*"))
    newest = undamaged_state(directory)
    if newest is None:
        rest = f"; all of {', '.join(state.name for state in states)} are damaged" if states else ""
        raise UserError(
            f"{directory} has no state to resume from{rest}: start a new run with another --out"
        )
    for state in states[states.index(newest) + 1 :]:
        aside = state.with_name(f"damaged-{state.name}")
        shutil.rmtree(aside, ignore_errors=True)
        state.rename(aside)
        logger.warning(
            "%s is damaged, set aside as %s: resuming from %s", state, aside.name, newest.name
        )
    return newest
