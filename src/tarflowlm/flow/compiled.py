"""Compiled steps of sampling: the cached Transformer on one position, compiled once per shape.

A compiled function wants fixed shapes. So it reads all S positions of the cache, masked, and takes the place of the
new position as a tensor. One storage tensor per layer: the same steps on slices of one stacked tensor are several
times slower than without a compiler.
"""

import functools
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from tarflowlm.device import missing_for_compilation
from tarflowlm.flow.cached import KVCache, LayerWeights, Places, places_at, transform
from tarflowlm.flow.transformer import Transformer

StaticStep = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, list[LayerWeights], list[Tensor], Tensor], Tensor]


def static_step(
    x: Tensor,
    starts: Tensor,
    positions: Tensor,
    cos: Tensor,
    sin: Tensor,
    weights: list[LayerWeights],
    stored: list[Tensor],
    norm: Tensor,
) -> Tensor:
    """Features [B, N, D] of inputs x at the positions from `starts` [B] on; reads all S `positions` of the cache."""
    return transform(x, places_at(starts, x.shape[1], positions, cos, sin), weights, stored, norm)


COMPILED_LENGTH = 64
"""Caches that compile hold a multiple of so many positions: texts of similar lengths share what is compiled."""


@functools.cache
def compiled_step(device_type: str) -> StaticStep:
    """`static_step` through torch.compile, which gives up on further shapes after some eight of them.

    On CUDA GPUs it asks for CUDA graphs, which is untested.
    """
    option = "triton.cudagraphs" if device_type == "cuda" else "cpp_wrapper"
    return torch.compile(static_step, dynamic=False, options={option: True})


class CompiledKVCache(KVCache):
    """A cache whose passes of one position are compiled. The first of a shape takes a quarter of a minute."""

    def __init__(self, transformer: Transformer, batch: int, capacity: int, like: Tensor) -> None:
        """As `KVCache`, for at least `capacity` positions."""
        super().__init__(transformer, batch, -(-capacity // COMPILED_LENGTH) * COMPILED_LENGTH, like)

    def _run(self, x: Tensor, places: Places) -> Tensor:
        if x.shape[1] > 1 or not isinstance(places.write, slice):
            return super()._run(x, places)
        starts = torch.full((len(x),), places.write.start, device=x.device)
        step = compiled_step(x.device.type)
        found = step(x.contiguous(), starts, self.positions, self.cos, self.sin, self.weights, self.stored, self.norm)
        # a CUDA graph writes the next result to the same memory
        return found.clone() if x.device.type == "cuda" else found


def allocate(transformer: Transformer, batch: int, capacity: int, like: Tensor) -> KVCache:
    """An empty cache, as `KVCache`; inside `compiled_steps` one that compiles its steps."""
    kind = CompiledKVCache if transformer.compiles_steps else KVCache
    return kind(transformer, batch, capacity, like)


@contextmanager
def compiled_steps(model: nn.Module, wanted: bool = True) -> Iterator[None]:
    """A context in which caches of this model's Transformers compile their steps, if a compiler is at hand.

    Warns if none is, and goes on without.
    """
    transformers = [module for module in model.modules() if isinstance(module, Transformer)] if wanted else []
    if transformers and (missing := missing_for_compilation(transformers[0].norm.weight.device)):
        warnings.warn(f"compiling needs {missing}, which is not installed: sampling without it", stacklevel=3)
        transformers = []
    for transformer in transformers:
        transformer.compiles_steps = True
    try:
        yield
    finally:
        for transformer in transformers:
            transformer.compiles_steps = False
