"""The precision rule: matrix products may run in half precision under autocast; densities never do."""

import torch
from torch import Tensor


def widen(x: Tensor) -> Tensor:
    """At least float32: bfloat16 and float16 become float32, float32 and float64 stay."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def full_precision(like: Tensor) -> torch.autocast:
    """A context that turns autocast off on the device of `like`: couplings, densities, log-dets and inverses."""
    # autocast knows no meta tensors
    return torch.autocast("cpu" if like.is_meta else like.device.type, enabled=False)
