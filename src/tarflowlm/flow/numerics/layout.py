"""Arbitrary leading shapes flattened to rows, and the chunks in which a CPU takes them."""

from collections.abc import Callable, Iterator
from functools import cache
from typing import TypeVar, cast

import torch
from torch import Tensor

from tarflowlm import chunks
from tarflowlm.flow.numerics.normal import check_codebook
from tarflowlm.flow.numerics.reference import Params

Map = TypeVar("Map", bound=Callable[..., object])

LEAST_ROWS = 16
"""Rows of a chunk on a CPU, however many components: with fewer, calls cost more than work."""
LOWEST_EXPONENT = {torch.float32: -50.0, torch.float64: -100.0}
"""Floor for exponents whose sum is at least 1, since on a CPU exp is 30 times slower where it
underflows. The floor adds 1e-22 (1e-44) per component.
"""


def flatten(z: Tensor, *params: Tensor) -> tuple[torch.Size, Tensor, list[Tensor]]:
    """The broadcast leading shape, z [...] as [N], and parameters [..., K] as [N, K] or [1, K].

    ValueError if the component counts or dtypes differ, or the dtype is neither of these two.
    """
    if any(p.dtype != z.dtype for p in params) or z.dtype not in LOWEST_EXPONENT:
        found = [t.dtype for t in (z, *params)]
        raise ValueError(f"z and parameters must all be float32, or float64, got {found}")
    counts = {p.shape[-1] for p in params}
    num_components = max(counts)
    if num_components == 0 or len(counts) > 1:
        raise ValueError(f"parameters disagree about the number of components: {sorted(counts)}")
    if z.ndim == 1 and all(p.shape == (len(z), num_components) for p in params):
        # as they come: a step of a sampler calls with so few rows that every view counts
        return z.shape, z, list(params)
    shape = torch.broadcast_shapes(z.shape, *(p.shape[:-1] for p in params))
    rows = shape.numel()
    flat = []
    for p in params:
        if p.numel() == p.shape[-1] and rows != 1:
            flat.append(p.reshape(1, -1))
        else:
            flat.append(p.expand(*shape, num_components).reshape(rows, num_components))
    return shape, z.expand(shape).reshape(rows), flat


def flatten_vectors(
    z: Tensor, log_w: Tensor, mean: Tensor, log_std: Tensor
) -> tuple[torch.Size, Tensor, Tensor]:
    """The broadcast leading shape, z [..., d] as [N, d], and log_w [..., K] as [N, K].

    ValueError unless mean [K, d] and log_std [K] fit.
    """
    check_codebook(z, mean, log_std)
    if log_w.shape[-1] != mean.shape[0]:
        raise ValueError(f"log_w has {log_w.shape[-1]} components, the codebook {mean.shape[0]}")
    if z.ndim == 2 and log_w.shape[:-1] == z.shape[:-1]:
        return z.shape[:1], z, log_w  # as they come
    shape = torch.broadcast_shapes(z.shape[:-1], log_w.shape[:-1])
    z, log_w = (t.expand(*shape, t.shape[-1]).reshape(-1, t.shape[-1]) for t in (z, log_w))
    return shape, z, log_w


def take_rows(params: Params, rows: slice | Tensor | list[int]) -> Params:
    """Rows of [N, K] parameters; a shared [1, K] one is returned as it is."""
    return tuple(p if len(p) == 1 else p[rows] for p in params)


def use_eager_cpu(t: Tensor) -> bool:
    """True on a CPU, where branching on data is free and buffers are reused.

    torch.compile can follow neither, and takes the path of accelerators.
    """
    return t.device.type == "cpu" and not torch.compiler.is_compiling()


@cache
def fused(function: Map) -> Map:
    """`function` by torch.compile, which keeps what is between its operations out of memory."""
    return cast(Map, torch.compile(function))


def cached(elements_per_row: int) -> int:
    """The budget of one buffer that stays in the cache of a CPU, in elements, by all threads."""
    return max(chunks.CACHED * torch.get_num_threads(), LEAST_ROWS * elements_per_row)


def cached_chunks(rows: int, elements_per_row: int) -> Iterator[slice]:
    """Row ranges whose buffers stay in the cache of a CPU."""
    return chunks.row_ranges(rows, elements_per_row, cached(elements_per_row))
