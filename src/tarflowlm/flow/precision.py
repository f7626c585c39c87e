"""The precision rule: matrix products may run in half precision under autocast; densities never do.

Couplings, codebook densities, log-determinants and inverses are float32 or wider (docs/math.md, section 8). The
products behind a codebook's densities cancel, and are float64 wherever the device has it.
"""

import torch
from torch import Tensor


def widen(x: Tensor) -> Tensor:
    """At least float32: bfloat16 and float16 become float32, float32 and float64 stay."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def wide_dtype(like: Tensor) -> torch.dtype:
    """The widest format on the device of `like`: float64, or float32 on `mps`, which has no other."""
    return torch.float32 if like.device.type == "mps" else torch.float64


def autocast_device(like: Tensor) -> str:
    """The device type whose autocast applies to `like`; autocast knows no meta tensors, which follow the CPU's."""
    return "cpu" if like.is_meta else like.device.type


def full_precision(like: Tensor) -> torch.autocast:
    """A context that turns autocast off on the device of `like`."""
    return torch.autocast(autocast_device(like), enabled=False)
