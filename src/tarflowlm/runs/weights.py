"""Weights in safetensors files. Reading one never unpickles.

The header holds a checksum of the tensors beside what the caller puts there, so a file is whole by itself: a kill
between two writes cannot part the weights from their checksum.
"""

import hashlib
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from tarflowlm.errors import UserError
from tarflowlm.files import replacing
from tarflowlm.runs.manifest import recorded_problem

CHECKSUM = "sha256"
"""Entry of the header: the checksum of all tensors and their names."""


def write_weights(path: Path, weights: dict[str, torch.Tensor], info: dict[str, str]) -> None:
    """Write a state dict with `info` and its checksum in the header, atomically."""
    tensors = {name: tensor.detach().contiguous().cpu() for name, tensor in weights.items()}
    with replacing(path) as temporary:
        save_file(tensors, temporary, metadata=info | {CHECKSUM: checksum(tensors)})


def read_weights(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """The tensors and the header of a file; UserError if it is missing, damaged, or differs from its checksum.

    Files of earlier versions have their checksum in manifest.json beside them.
    """
    if not path.is_file():
        raise UserError(f"{path} is missing: {path.parent} holds no trained weights yet")
    try:
        with safe_open(path, framework="pt") as file:
            tensors, info = {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{path} is damaged ({error})") from None
    if CHECKSUM in info:
        if info[CHECKSUM] != checksum(tensors):
            raise UserError(f"{path} is damaged (altered: its sha256 is not the one in its header)")
    elif (problem := recorded_problem(path)) is not None:
        raise UserError(problem)
    return tensors, info


def checksum(tensors: dict[str, torch.Tensor]) -> str:
    """The sha256 of all tensors on the CPU with their names, in the order of the names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode("utf-8"))
        digest.update(tensors[name].reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
    return digest.hexdigest()


def halve(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A state dict with the matrices of linear layers in bfloat16."""
    return {name: w.bfloat16() if w.ndim == 2 and name.endswith(".weight") else w for name, w in weights.items()}


def check_weights(path: Path, module: torch.nn.Module, tensors: dict[str, torch.Tensor], config: str) -> None:
    """UserError, naming the tensor, unless `tensors` fit `module`, which was built from the file `config`."""
    expected = {name: tensor.shape for name, tensor in module.state_dict().items()}
    for name in sorted(expected.keys() | tensors.keys()):
        if name not in tensors or name not in expected:
            lacking = "has no" if name not in tensors else "has an unexpected"
            raise UserError(f"{path} {lacking} tensor {name}: it does not belong to the {config} beside it")
        if tensors[name].shape != expected[name]:
            raise UserError(
                f"{path}: {name} has shape {list(tensors[name].shape)}, {config} expects {list(expected[name])}"
            )
        if not torch.isfinite(tensors[name]).all():
            raise UserError(f"{path}: {name} holds non-finite values; the run diverged")
