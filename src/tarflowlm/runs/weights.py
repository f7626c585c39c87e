"""Weights in safetensors files, and checksums. Reading weights never unpickles.

The header of weights holds a checksum of the tensors. The folder of a training state has a
manifest.json with size and sha256 of its files, written last. Earlier versions (the shipped models
are theirs) have one beside the weights of a run, with one record per file, or two while the file
was being replaced.
"""

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from tarflowlm.errors import UserError
from tarflowlm.files import read_json, replacing, write_json

CHECKSUM = "sha256"
"""Entry of the header: the checksum of all tensors and their names."""


def write_weights(path: Path, weights: dict[str, torch.Tensor], info: dict[str, str]) -> None:
    """Write a state dict with `info` and its checksum in the header, atomically."""
    tensors = {name: tensor.detach().contiguous().cpu() for name, tensor in weights.items()}
    with replacing(path) as temporary:
        save_file(tensors, temporary, metadata=info | {CHECKSUM: checksum(tensors)})


def read_weights(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """The tensors and the header of a file, compared with its checksum, which earlier versions have
    in a manifest.
    """
    if not path.is_file():
        raise UserError(f"{path} is missing: {path.parent} holds no trained weights yet")
    try:
        with safe_open(path, framework="pt") as file:
            tensors, info = (
                {name: file.get_tensor(name) for name in file.keys()},  # noqa: SIM118
                file.metadata() or {},
            )
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{path} is damaged ({error})") from None
    if CHECKSUM in info:
        place, is_right = "its header", info[CHECKSUM] == checksum(tensors)
    else:
        try:
            place, is_right = (
                MANIFEST,
                _record(path) in read_json(path.parent / MANIFEST)["files"][path.name],
            )
        except (UserError, LookupError, TypeError):  # no manifest
            return tensors, info
    if not is_right:
        raise UserError(f"{path} is damaged (altered: its sha256 is not the one in {place})")
    return tensors, info


def checksum(tensors: dict[str, torch.Tensor]) -> str:
    """The sha256 of all tensors on the CPU with their names, in the order of the names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode("utf-8"))
        digest.update(tensors[name].reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
    return digest.hexdigest()


def check_weights(
    path: Path, module: torch.nn.Module, tensors: dict[str, torch.Tensor], config: str
) -> None:
    """UserError, naming the tensor, unless `tensors` fit `module`, which was built from the file
    `config`.
    """
    expected = {name: tensor.shape for name, tensor in module.state_dict().items()}
    for name in sorted(expected.keys() | tensors.keys()):
        if name not in tensors or name not in expected:
            lacking = "has no" if name not in tensors else "has an unexpected"
            raise UserError(
                f"{path} {lacking} tensor {name}: it does not belong to the {config} beside it"
            )
        if (shape := tensors[name].shape) != expected[name]:
            raise UserError(
                f"{path}: {name} has shape {list(shape)}, {config} expects {list(expected[name])}"
            )
        if not torch.isfinite(tensors[name]).all():
            raise UserError(f"{path}: {name} holds non-finite values; the run diverged")


MANIFEST = "manifest.json"


def write_manifest(folder: Path, names: Iterable[str]) -> None:
    """Write a manifest of the files `names` of `folder` as they are now."""
    files = {name: [_record(folder / name)] for name in sorted(names)}
    write_json(folder / MANIFEST, {"format": "tarflowlm-manifest", "version": 1, "files": files})


def is_whole(folder: Path, needed: str) -> bool:
    """Whether `folder` has a manifest that lists `needed`, and all listed files are undamaged."""
    try:
        listed = read_json(folder / MANIFEST)["files"]
        return needed in listed and all(
            _record(folder / name) in records for name, records in listed.items()
        )
    except (UserError, OSError, LookupError, TypeError, AttributeError):
        return False


def _record(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {
            "size": path.stat().st_size,
            "sha256": hashlib.file_digest(file, "sha256").hexdigest(),
        }
