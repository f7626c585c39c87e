"""Weights in safetensors files, and checksums. Reading weights never unpickles."""

import hashlib
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from tarflowlm.errors import UserError
from tarflowlm.files import read_json, replacing, sha256_of, write_json
from tarflowlm.runs import MANIFEST

CHECKSUM = "sha256"
"""Entry of the header: the checksum of all tensors and their names."""


def write_weights(path: Path, weights: dict[str, torch.Tensor], info: dict[str, str]) -> None:
    """Write a state dict with `info` and its checksum in the header, atomically."""
    tensors = {name: tensor.detach().contiguous().cpu() for name, tensor in weights.items()}
    with replacing(path) as temporary:
        save_file(tensors, temporary, metadata=info | {CHECKSUM: checksum(tensors)})


def read_weights(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """The tensors of a file and its header. UserError where its checksum, if any, is another."""
    if not path.is_file():
        raise UserError(f"{path} is missing: {path.parent} holds no trained weights yet")
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            info = file.metadata() or {}
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{path} is damaged ({error})") from None
    for name in ("blocks", "step", "tokens"):
        if not info.get(name, "0").isdigit():
            raise UserError(f"{path} is damaged ({name} {info[name]!r} in its header)")
    if CHECKSUM in info and info[CHECKSUM] != checksum(tensors):
        raise UserError(f"{path} is damaged (altered: its header has another sha256)")
    return tensors, info


def checksum(tensors: dict[str, torch.Tensor]) -> str:
    """The sha256 of all tensors on the CPU with their names, in the order of the names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode("utf-8"))
        digest.update(tensors[name].reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def write_manifest(folder: Path, names: Iterable[str]) -> None:
    write_json(folder / MANIFEST, {name: sha256_of(folder / name) for name in sorted(names)})


def is_whole(folder: Path, needed: str) -> bool:
    """Whether `folder` has a manifest that lists `needed`, and all listed files are undamaged."""
    try:
        listed = read_json(folder / MANIFEST)
        is_undamaged = all(sha256_of(folder / name) == sha for name, sha in listed.items())
        return needed in listed and is_undamaged
    except (UserError, OSError, AttributeError):
        return False
