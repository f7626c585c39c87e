"""A Transformer that reads what is before a position, as flow blocks and the baseline do."""

from abc import abstractmethod

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from tarflowlm.flow import full_precision
from tarflowlm.flow.cache import KVCache
from tarflowlm.flow.transformer import Embedder, Transformer


class InputMap(nn.Module):
    """Latents x [..., C] to Transformer inputs [..., D]: linear(x) + out(gelu(lift(x))).

    The linear path alone, `is_linear`, confines the inputs to a C-dimensional subspace
    (docs/log.md).
    """

    def __init__(self, channels: int, width: int, *, is_linear: bool = False) -> None:
        super().__init__()
        self.is_linear = is_linear
        self.linear = nn.Linear(channels, width)
        if not is_linear:
            self.lift = nn.Linear(channels, width)
            self.out = nn.Linear(width, width, bias=False)
        nn.init.normal_(self.linear.weight, std=channels**-0.5)
        nn.init.zeros_(self.linear.bias)
        if not is_linear:
            nn.init.normal_(self.lift.weight, std=2.0 * channels**-0.5)
            nn.init.normal_(self.out.weight, std=width**-0.5)
            nn.init.normal_(self.lift.bias)

    def forward(self, x: Tensor) -> Tensor:
        if self.is_linear:
            return self.linear(x)
        return self.linear(x) + self.out(F.gelu(self.lift(x)))


class Conditioner(nn.Module):
    """A Transformer that reads a learned start vector, and then the values before each position.

    `past` are latents [B, n, C] or tokens [B, n P].
    """

    start: nn.Parameter
    transformer: Transformer

    @abstractmethod
    def embedder(self) -> Embedder:
        """`past` to inputs of the Transformer, with the present weights."""

    def _inputs(self, embed: Embedder, past: Tensor, first: bool) -> Tensor:
        x = embed(past)
        return torch.cat((self.start.expand(len(x), 1, -1), x), dim=1) if first else x

    def states(self, past: Tensor) -> Float[Tensor, "B next D"]:
        """Features after the start vector and after each of the n positions."""
        return self.transformer(self._inputs(self.embedder(), past, first=True))

    def allocate_cache(self, batch: int, num_positions: int, *, half: bool = False) -> KVCache:
        """An empty KV cache for `num_positions` positions; `half`: in bfloat16."""
        like = self.start.bfloat16() if half else self.start
        cache = KVCache(self.transformer, batch, num_positions, like)
        cache.embed = self.embedder()
        return cache

    def features_at(self, cache: KVCache, previous: Tensor | None) -> Float[Tensor, "B D"]:
        """Features c_n of the next position, from the latents [B, C] or tokens [B, P] before it.

        None at the start of the sequence.
        """
        if previous is None:
            return cache.extend(self.start.expand(len(cache.inputs), 1, -1))[:, 0]
        return self.features_of(cache, previous[:, None])[:, 0]

    def features_of(self, cache: KVCache, past: Tensor) -> Float[Tensor, "B next D"]:
        """Features of the positions after the cached ones, from `past` before them.

        An empty cache begins at the first position, so there is one position more than in `past`.
        """
        with full_precision(past):
            inputs = self._inputs(cache.embed, past, first=cache.length == 0)
        return cache.extend(inputs)
