"""Weights in safetensors files: what is in one, and whether it fits a module. Reading one never unpickles."""

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from tarflowlm.errors import UserError
from tarflowlm.runs.manifest import replacing_listed

LISTED = {"manifest": "sha256"}
"""Header entry of weights that were written with a manifest, so that a missing manifest is noticed."""


def write_weights(path: Path, weights: dict[str, torch.Tensor], info: dict[str, str]) -> None:
    """Write a state dict with `info` in its header, and list the file in the manifest of its folder."""
    tensors = {name: tensor.detach().contiguous().cpu() for name, tensor in weights.items()}
    with replacing_listed(path) as temporary:
        save_file(tensors, temporary, metadata=info | LISTED)


def halved(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A state dict with the matrices of linear layers in bfloat16."""
    return {name: w.bfloat16() if w.ndim == 2 and name.endswith(".weight") else w for name, w in weights.items()}


def read_weights(path: Path, *, header_alone: bool = False) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """The tensors and the header of a file; UserError if it is missing or damaged."""
    if not path.is_file():
        raise UserError(f"{path} is missing: {path.parent} holds no trained weights yet")
    try:
        with safe_open(path, framework="pt") as file:
            names = [] if header_alone else file.keys()
            return {name: file.get_tensor(name) for name in names}, file.metadata() or {}
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{path} is damaged ({error}): restore it or train again") from None


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
