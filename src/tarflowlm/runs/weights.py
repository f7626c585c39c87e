"""Weights in safetensors files, and checksums of files."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from tarflowlm.errors import UserError, counted
from tarflowlm.files import read_json, replacing, sha256_of, write_json
from tarflowlm.model_config import LanguageModelConfig
from tarflowlm.registry import own_module
from tarflowlm.runs import CONFIG, MANIFEST

CHECKSUM = "sha256"
"""Entry of the header of weights: the checksum of all tensors and their names."""
SETTINGS = "settings_sha256"
"""Entry of the header of weights: `settings_sha256` of the run they were saved with."""
FLOATS = ("F64", "F32", "F16", "BF16")
"""The kinds of numbers that weights may have, as safetensors calls them."""

Shapes = dict[str, list[int]]
"""The shapes of the tensors of a file by their names."""


def write_weights(path: Path, weights: dict[str, Tensor], info: dict[str, str]) -> None:
    """Write a state dict with `info` and its checksum in the header, atomically."""
    tensors = {name: tensor.detach().contiguous().cpu() for name, tensor in weights.items()}
    with replacing(path) as temporary:
        save_file(tensors, temporary, metadata=info | {CHECKSUM: checksum(tensors)})


def read_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a file and its header. UserError if its checksum, if any, does not fit."""
    shapes, info = read_header(path)
    with _damage(path), safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in shapes}
    if CHECKSUM in info and info[CHECKSUM] != checksum(tensors):
        raise UserError(f"{path} is damaged (altered: its header has another sha256)")
    return tensors, info


def read_header(path: Path) -> tuple[Shapes, dict[str, str]]:
    """The shapes of a file's tensors and its header, without its numbers.

    UserError for numbers that are no floats of 16 bits or more.
    """
    if not path.is_file():
        raise UserError(f"{path} is missing: {path.parent} holds no trained weights")
    with _damage(path), safe_open(path, framework="pt") as file:
        tensors = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        kinds = {name: tensor.get_dtype() for name, tensor in tensors.items()}
        shapes = {name: tensor.get_shape() for name, tensor in tensors.items()}
        info = file.metadata() or {}
    for name in ("blocks", "step", "tokens"):
        if not info.get(name, "0").isdigit():
            raise UserError(f"{path} is damaged ({name} {info[name]!r} in its header)")
    for name, kind in kinds.items():
        if kind not in FLOATS:
            what = f"{path} has {name} in {kind}"
            raise UserError(f"{what}: give weights in one of {', '.join(FLOATS)}")
    return shapes, info


@contextmanager
def _damage(path: Path) -> Iterator[None]:
    try:
        yield
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{path} is damaged ({error})") from None


def check_size(shapes: Shapes, config: LanguageModelConfig, path: Path) -> None:
    """UserError for a model of more layers or numbers than its file has; it is never built.

    Shapes that differ within that size are found when the weights are loaded.
    """
    if own_module(type(config)) is not None:
        return  # its sizes have a meaning of their own
    size = sum(map(prod, shapes.values()))
    if config.num_layers > len(shapes) or config.least_size > size:
        wanted = f"{counted(config.num_layers, 'layer')} of width {config.trunk.width:,}"
        raise mismatch(path, f"{len(shapes)} tensors with {size:,} numbers are no {wanted}")


def mismatch(path: Path, problem: str) -> UserError:
    """The error for weights of another model than their configuration's."""
    what = f"{path} does not fit {CONFIG}: {problem:.200}"
    return UserError(f"{what}: restore both files from one run")


def check_finite(tensors: Mapping[str, Tensor], where: str) -> None:
    """UserError unless all weights of a model are finite."""
    for name, tensor in tensors.items():
        # the sum takes a tenth of the time
        if not torch.isfinite(tensor.sum()) and not torch.isfinite(tensor).all():
            raise UserError(f"{where}: {name} is not finite; the run diverged")


def checksum(tensors: dict[str, Tensor]) -> str:
    """The sha256 of all tensors on the CPU with their names, in the order of the names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode("utf-8"))
        digest.update(tensors[name].reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def settings_sha256(document: Mapping[str, Any]) -> str:
    """The sha256 of what decides the results of weights in the JSON values of a configuration."""
    settings = [document.get(name) for name in ("model", "temperature", "top_p")]
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode("utf-8")).hexdigest()


def write_manifest(folder: Path, names: Iterable[str]) -> None:
    write_json(folder / MANIFEST, {name: sha256_of(folder / name) for name in sorted(names)})


def is_whole(folder: Path) -> bool:
    """Whether `folder` has a manifest, and all files that it lists are undamaged."""
    try:
        listed = read_json(folder / MANIFEST)
        return bool(listed) and all(sha256_of(folder / x) == sha for x, sha in listed.items())
    except (UserError, OSError, AttributeError):
        return False
