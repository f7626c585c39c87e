"""Weights as compiled functions read them, and when these are used."""

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor, nn

from tarflowlm import compiled

if TYPE_CHECKING:
    from tarflowlm.compiled.step import Floats

Packed = TypeVar("Packed")


def suits(like: Tensor) -> bool:
    """Whether compiled functions can take numbers as `like`."""
    is_plain = like.device.type == "cpu" and like.dtype == torch.float32
    return is_plain and not torch.compiler.is_compiling()


def serves(like: Tensor, num_tokens: int) -> bool:
    """Whether a text of so many tokens is written by compiled steps, with weights as `like`."""
    return suits(like) and compiled.is_due(num_tokens)


def is_loaded(like: Tensor) -> bool:
    """Whether compiled functions are loaded, and can take numbers as `like`."""
    return compiled.is_loaded() and suits(like)


def packed(module: nn.Module, pack: Callable[[], Packed]) -> Packed:
    """The weights of a module as `pack` returns them, which it does once for the same weights."""
    state = [*module.parameters(), *module.buffers()]
    if any(tensor.is_inference() for tensor in state):  # which do not count their changes
        return pack()
    key = [(tensor.data_ptr(), tensor._version) for tensor in state]
    kept: tuple[object, Packed] | None = vars(module).get("_packed")
    if kept is None or kept[0] != key:
        kept = key, pack()
        vars(module)["_packed"] = kept
    return kept[1]


def array(x: Tensor) -> "Floats":
    """The numbers of x in the order of its axes, copied only where they lie otherwise."""
    return x.detach().contiguous().numpy()
