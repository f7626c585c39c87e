"""Normalizing flows over latents, and the precision rule that all of them keep.

Matrix products may run in half precision under autocast; densities never do. Couplings, codebook
densities, log-determinants and inverses are float32 or wider (docs/math.md, section 8). The
products in codebook densities cancel, so they are float64 where the device has it.

Shape legend of this folder: B batch, T tokens, P tokens per patch, N = T / P positions, d channels
per token, C = P d, D width, K components, G groups of C / G channels.
"""

import threading
from contextlib import AbstractContextManager, nullcontext
from importlib import import_module
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tarflowlm.errors import no_attribute

if TYPE_CHECKING:
    from tarflowlm.flow.channelwise import AffineCoupling as AffineCoupling
    from tarflowlm.flow.channelwise import ChannelCoupling as ChannelCoupling
    from tarflowlm.flow.channelwise import Mix1Coupling as Mix1Coupling
    from tarflowlm.flow.couplings import Coupling as Coupling
    from tarflowlm.flow.heads import AutoregressiveHead as AutoregressiveHead
    from tarflowlm.flow.heads import HeadShape as HeadShape
    from tarflowlm.flow.order import Order as Order
    from tarflowlm.flow.stack import FlowBlock as FlowBlock
    from tarflowlm.flow.stack import Prior as Prior
    from tarflowlm.flow.transformer import Layer as Layer
    from tarflowlm.flow.vectors import VectorFlow as VectorFlow

PUBLIC = {
    "AffineCoupling": "channelwise",
    "ChannelCoupling": "channelwise",
    "Mix1Coupling": "channelwise",
    "Coupling": "couplings",
    "AutoregressiveHead": "heads",
    "HeadShape": "heads",
    "Order": "order",
    "FlowBlock": "stack",
    "Prior": "stack",
    "Layer": "transformer",
    "VectorFlow": "vectors",
}
"""The names of docs/flow.md by their files, which import this one."""


def __getattr__(name: str) -> object:
    if name not in PUBLIC:
        raise no_attribute(f"module {__name__!r}", name, PUBLIC)
    value: object = getattr(import_module(f"{__name__}.{PUBLIC[name]}"), name)
    globals()[name] = value  # so that later uses skip this function
    return value


def widen(x: Tensor) -> Tensor:
    """x in at least float32: bfloat16 and float16 are converted, others returned unchanged."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def wide_dtype(like: Tensor) -> torch.dtype:
    """The widest float format on the device of `like`: float64, but float32 on `mps`."""
    return torch.float32 if like.device.type == "mps" else torch.float64


def is_eager_cpu(like: Tensor) -> bool:
    """Whether `like` is on a CPU, where branching on data is free and buffers are reused.

    False while torch.compile traces, which can follow neither and takes the accelerators' path.
    """
    return like.device.type == "cpu" and not torch.compiler.is_compiling()


def full_precision(like: Tensor) -> AbstractContextManager[object]:
    """A context without autocast on the device of `like`, and on CUDA without TF32."""
    if like.is_cuda:
        return _WithoutTF32()
    kind = "cpu" if like.is_meta else like.device.type
    # entering none is faster
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()


class _WithoutTF32(AbstractContextManager[None]):
    """A context without TF32 and autocast on CUDA.

    TF32 is a setting of the process: of several threads the first one turns it off, if it is on,
    and the last one turns it on again.
    """

    lock = threading.Lock()
    inside = 0
    before = ""

    def __enter__(self) -> None:
        matmul, kind = torch.backends.cuda.matmul, type(self)
        with self.lock:
            if kind.inside == 0:
                kind.before = matmul.fp32_precision
                if kind.before == "tf32":
                    matmul.fp32_precision = "ieee"
            kind.inside += 1
        self.autocast = torch.autocast("cuda", enabled=False)
        self.autocast.__enter__()

    def __exit__(self, *error: object) -> None:
        kind = type(self)
        self.autocast.__exit__(*error)
        with self.lock:
            kind.inside -= 1
            if kind.inside == 0 and kind.before == "tf32":
                torch.backends.cuda.matmul.fp32_precision = kind.before
