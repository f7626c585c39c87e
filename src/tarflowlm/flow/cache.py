"""The KV cache: a Transformer that goes on after the positions that it has read."""

from abc import ABC, abstractmethod
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from tarflowlm.flow import full_precision, widen
from tarflowlm.flow.attention import rotations
from tarflowlm.flow.codebook import Codebook, NoisyCodebook
from tarflowlm.flow.inputs import InputMap
from tarflowlm.flow.token_heads import map_linearly
from tarflowlm.flow.transformer import Embedder, Layer, Transformer


class Cache(ABC):
    """A Transformer with its present weights, and what it keeps of past positions of B sequences.

    All sequences have the same length.
    """

    embed: Embedder
    """Set by `Conditioner.allocate_cache`."""
    batch: int
    """The number B of sequences."""
    length = 0
    """Positions that are cached."""
    is_compiled = False
    """Whether steps are compiled, see `flow.compiled_cache`."""

    def rewind(self, length: int) -> None:
        """Go back to this length."""
        assert 0 <= length <= self.length
        self.length = length

    def linear(self, of: nn.Linear, x: Tensor) -> Tensor:
        """The map `of` rows x [R, D], as steps compute products."""
        return map_linearly(of, x)

    def embedder(
        self,
        source: InputMap,
        codebook: Codebook | NoisyCodebook | None,
        embedding: nn.Embedding | None,
    ) -> Embedder | None:
        """The embedder of a block that has these parts; None: the block has one of its own."""
        return None

    @abstractmethod
    def take(self, source: "Cache", rows: Tensor) -> None:
        """Replace every row b, in place, by row rows[b] of `source`."""

    @abstractmethod
    def keep(self, rows: Tensor) -> None:
        """Continue with these rows alone."""

    @abstractmethod
    def extend(self, x: Float[Tensor, "B N D"]) -> Float[Tensor, "B N D"]:
        """Features of N positions with inputs x, which follow the cached ones."""


BUCKET = 64
"""The fewest positions that a step on an accelerator attends to."""


class KVCache(Cache):
    """The keys and values of past positions, with the dtype and device of `like`.

    For `batch` rows of `capacity` positions; without a graph.

    On an accelerator a step attends to 64, 128, 256, ... stored positions, those after its own
    masked, and its place is a number on the device. So the steps of a text differ by their numbers
    alone, but for the few at which it outgrows a size: the kernels of a step could be recorded once
    and launched together. A CPU attends to as many positions as there are.
    """

    def __init__(self, transformer: Transformer, batch: int, capacity: int, like: Tensor) -> None:
        config = transformer.config
        taps = transformer.input_taps
        self.batch = batch
        layers = cast(list[Layer], list(transformer.layers))
        self.layers = [one.step(like) for one in layers]
        self.norm = transformer.norm.weight.detach().to(like)
        # taps [K, D], the oldest position first, and inputs after K - 1 zeros
        self.taps = None if taps is None else taps.detach().flip(0).to(like)
        self.before = max(config.input_taps - 1, 0)
        width = 0 if taps is None else config.width
        self.inputs = like.new_zeros(batch, self.before + capacity, width)
        self.has_sizes = like.device.type != "cpu"
        """Whether steps attend to a power of two of positions."""
        # zeros, because a masked position still enters products
        heads, E = layers[0].key_heads, config.head_width
        self.stored = like.new_zeros(len(layers), 2, batch, heads, capacity, E)
        self.positions = torch.arange(capacity, device=like.device)
        turns = rotations(self.positions, E)
        self.turns = turns.to(widen(like).dtype.to_complex())

    def rewind(self, length: int) -> None:
        if self.has_sizes:  # what steps multiply by zero has to be finite
            self.stored[..., length : self.length, :] = 0.0
        super().rewind(length)

    def take(self, source: Cache, rows: Tensor) -> None:
        assert isinstance(source, KVCache)
        self.length = source.length
        window = self.before + self.length
        self.inputs[:, :window] = source.inputs[rows, :window]
        for stored, given in zip(self.stored, source.stored, strict=True):
            stored[:, :, :, : self.length] = given[:, rows, :, : self.length]

    def keep(self, rows: Tensor) -> None:
        # in the same memory: a copy beside it might not fit
        self.batch, rows = len(rows), rows.to(self.stored.device)
        self.inputs = self.inputs[rows]
        for stored in self.stored:
            stored[:, : self.batch] = stored[:, rows]
        self.stored = self.stored[:, :, : self.batch]

    def extend(self, x: Float[Tensor, "B N D"]) -> Float[Tensor, "B N D"]:
        if torch.is_autocast_enabled(x.device.type):
            with full_precision(x):
                return self.extend(x)
        start, end = self.length, self.length + x.shape[1]
        assert end <= len(self.positions), "the cache is full"
        seen = end
        if self.has_sizes and x.shape[1] == 1:
            seen = min(max(BUCKET, 2 ** (end - 1).bit_length()), len(self.positions))
        with torch.inference_mode():
            h = self.pass_on(x, self.positions[start:end], seen, is_first=start == 0)
        self.length = end
        # outside of inference mode, because the features may enter a graph
        return torch.layer_norm(h, (x.shape[-1],), self.norm).view(x.shape).to(x.dtype)

    def pass_on(self, x: Tensor, places: Tensor, seen: int, *, is_first: bool) -> Tensor:
        """All but the final norm, [B, N, D] -> [B N, D], for the positions `places` [N].

        They attend to stored positions up to themselves, of which none is behind the first `seen`.
        """
        B, N, _ = x.shape
        if self.taps is None:
            h = x.to(self.norm.dtype)
        else:
            # as in `convolve`
            self.inputs.index_copy_(1, places + self.before, x.to(self.inputs.dtype))
            windows = self.inputs.unfold(1, self.before + 1, 1)[:, places]  # [B, N, D, K]
            h = (windows.transpose(2, 3) * self.taps).sum(-2)
        turns = self.turns[places] if N == 1 else self.turns[places].repeat(B, 1, 1, 1)
        mask = None
        if (not is_first and N > 1) or (self.has_sizes and N == 1):
            is_later = self.positions[:seen] > places[:, None]
            mask = h.new_zeros(N, seen).masked_fill_(is_later, -torch.inf)
        rows = h.flatten(0, 1)
        for compute, stored in zip(self.layers, self.stored.unbind(), strict=True):
            rows = compute(rows, turns, Past(stored, places, seen, mask).attend)
        return rows


class Past(NamedTuple):
    """The keys and values of one layer, [2, B, heads, n, E], with room for new positions."""

    stored: Tensor
    places: Tensor
    """The new positions."""
    seen: int
    """They attend to positions below this."""
    mask: Tensor | None
    """Minus infinity where a new position must not look, [N, seen]; None: after itself."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention of the rows q, k, v [B N, H, E] to all positions up to them: [B N, D]."""
        new = self.stored.shape[1], len(self.places)
        q, k, v = (part.to(self.stored.dtype).unflatten(0, new) for part in (q, k, v))
        keys, values = self.stored.unbind()
        keys.index_copy_(2, self.places, k.transpose(1, 2))
        values.index_copy_(2, self.places, v.transpose(1, 2))
        keys, values = keys[:, :, : self.seen], values[:, :, : self.seen]
        is_causal = self.mask is None and q.shape[1] > 1
        y = F.scaled_dot_product_attention(
            q.transpose(1, 2),
            keys,
            values,
            self.mask,
            is_causal=is_causal,
            scale=1.0,
            enable_gqa=q.shape[2] > keys.shape[1],
        )
        return y.transpose(1, 2).flatten(2).flatten(0, 1)
