"""A Transformer that reads what is before a position, as flow blocks and the baseline do."""

from abc import abstractmethod

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tarflowlm.flow import full_precision
from tarflowlm.flow.cache import Cache, KVCache
from tarflowlm.flow.compiled_cache import CompiledCache
from tarflowlm.flow.packing import serves
from tarflowlm.flow.transformer import Embedder, Transformer


class Conditioner(nn.Module):
    """A Transformer that reads a learned start vector, and then the values before each position.

    `past` are latents [B, n, C] or tokens [B, n P].
    """

    start: nn.Parameter
    transformer: Transformer

    @abstractmethod
    def embedder(self, cache: Cache | None = None) -> Embedder:
        """`past` to inputs of the Transformer, with the present weights, and for the steps of a
        `cache` by its products.
        """

    def _inputs(self, embed: Embedder, past: Tensor, first: bool) -> Tensor:
        x = embed(past)
        return torch.cat((self.start.expand(len(x), 1, -1), x), dim=1) if first else x

    def features_of_all(self, past: Tensor) -> Float[Tensor, "B next D"]:
        """Features after the start vector and after each of the n positions."""
        return self.transformer(self._inputs(self.embedder(), past, first=True))

    def allocate_cache(self, batch: int, num_positions: int, *, half: bool = False) -> Cache:
        """An empty KV cache for `num_positions` positions; `half`: in bfloat16."""
        like = self.start.bfloat16() if half else self.start
        cache: Cache
        if self.transformer.is_standard and serves(like, batch * num_positions):
            cache = CompiledCache(self.transformer, batch, num_positions)
        else:
            cache = KVCache(self.transformer, batch, num_positions, like)
        cache.embed = self.embedder(cache)
        return cache

    def features_at(self, cache: Cache, previous: Tensor | None) -> Float[Tensor, "B D"]:
        """Features c_n of the next position, from the latents [B, C] or tokens [B, P] before it.

        None at the start of the sequence.
        """
        if previous is None:
            return cache.extend(self.start.expand(cache.batch, 1, -1))[:, 0]
        return self.features_of(cache, previous[:, None])[:, 0]

    def features_of(self, cache: Cache, past: Tensor) -> Float[Tensor, "B next D"]:
        """Features of the positions after the cached ones, from `past` before them.

        An empty cache begins at the first position, so there is one position more than in `past`.
        """
        with full_precision(past):
            inputs = self._inputs(cache.embed, past, first=cache.length == 0)
        return cache.extend(inputs)
