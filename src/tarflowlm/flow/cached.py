"""The Transformer on positions that follow cached ones, in as few operations as it takes.

One position of a small model costs less than the dispatch of its operations, so their number sets the time of
sampling. `Transformer` is what this equals, up to rounding.

Shape legend: B batch, N new positions, D width, H heads, E = D / H head width, S positions that the cache can hold.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from tarflowlm.flow.transformer import Layer, Transformer, rotary_tables

LARGEST_COPY = 2**20
"""Elements of a matrix that a cache on the CPU keeps transposed. One row times a small matrix is up to twice as fast
when that is stored by inputs; a large one waits for memory either way."""


class LayerWeights(NamedTuple):
    """The weights of one layer, matrices as [inputs, outputs]."""

    attention_norm: Tensor
    qkv: Tensor
    """[3, D, D]."""
    scale: Tensor
    """[2, 1, 1, 1, E]: what normalised queries and keys are multiplied by."""
    out: Tensor
    mlp_norm: Tensor
    up: Tensor
    down: Tensor

    @staticmethod
    def of(layer: Layer) -> "LayerWeights":
        """Those of a layer, as they are now."""
        attention = layer.attention
        return LayerWeights(
            attention_norm=layer.attention_norm.weight.detach(),
            qkv=by_inputs(torch.stack(attention.qkv.weight.chunk(3))),
            scale=torch.stack((attention.query_scale, attention.key_scale)).detach()[:, None, None, None],
            out=by_inputs(attention.out.weight),
            mlp_norm=layer.mlp_norm.weight.detach(),
            up=by_inputs(layer.up.weight),
            down=by_inputs(layer.down.weight),
        )


def by_inputs(weight: Tensor) -> Tensor:
    """A weight [..., outputs, inputs] as [..., inputs, outputs]."""
    transposed = weight.detach().transpose(-1, -2)
    copies = weight.device.type == "cpu" and weight.numel() <= LARGEST_COPY
    return transposed.contiguous() if copies else transposed


class Places(NamedTuple):
    """Where N new positions go: what all layers share."""

    cos: Tensor
    sin: Tensor
    """Rotary tables, [N, 1, E] or [B, N, 1, E]."""
    write: slice | tuple[Tensor, Tensor]
    """The positions; for rows with starts of their own the indices [B, 1] of rows and [B, N] of positions."""
    end: int
    """Keys from 0 to `end` - 1 are read."""
    mask: Tensor | None
    """What each query may read, where that is not all; [N, end] or [B, 1, N, end]."""
    causal: bool
    """Instead of a mask: query i reads keys up to i."""


class KVCache:
    """A Transformer with its keys and values for the positions so far, in preallocated storage.

    `extend` reads the first `length` positions, writes its own behind them and advances `length`. `rewind` drops the
    newest positions without touching storage, so a decoder can revise a segment. It keeps the weights as they were at
    the start, and no graph.
    """

    def __init__(self, transformer: Transformer, batch: int, capacity: int, like: Tensor) -> None:
        """For `batch` rows of `capacity` positions, with the dtype and device of `like`."""
        config = transformer.config
        head_width = config.width // config.num_heads
        self.weights = [LayerWeights.of(layer) for layer in transformer.layers]  # type: ignore[arg-type]
        self.norm = transformer.norm.weight.detach()
        shape = (2, batch, config.num_heads, capacity, head_width)
        self.stored = [like.new_zeros(shape) for _ in self.weights]
        """Keys and values of each layer."""
        self.positions = torch.arange(capacity, device=like.device)
        tables = rotary_tables(self.positions, 1, head_width, config.rotary_base)
        self.cos, self.sin = (table.to(like.dtype) for table in tables)
        self.length = 0

    @property
    def capacity(self) -> int:
        """Positions S that the storage can hold."""
        return len(self.positions)

    def rewind(self, length: int) -> None:
        """Keep only the first `length` positions. ValueError for more than there are."""
        if not 0 <= length <= self.length:
            raise ValueError(f"cannot rewind a cache of {self.length} positions to {length}")
        self.length = length

    def select(self, rows: Tensor) -> None:
        """Replace the cached positions of every row b by those of row rows[b], in place."""
        for stored in self.stored:
            stored[:, :, :, : self.length] = stored[:, rows, :, : self.length]

    def copy(self, one: "KVCache") -> None:
        """Take the positions of a cache of one row for every row, in place."""
        self.length = one.length
        for stored, source in zip(self.stored, one.stored, strict=True):
            stored[:, :, :, : self.length] = source[:, :, :, : self.length]

    def extend(self, x: Float[Tensor, "B N D"], starts: Int[Tensor, " B"] | None = None) -> Float[Tensor, "B N D"]:
        """Features of N positions with inputs x, which follow the cached ones.

        With `starts`, the inputs of row b stand at positions starts[b] to starts[b] + N - 1 and follow those before;
        `length` then plays no part. ValueError where the cache has no room for them.
        """
        with torch.inference_mode():
            features = self._run(x, self._behind(x.shape[1]) if starts is None else self._at(starts, x.shape[1]))
        if starts is None:
            self.length += x.shape[1]
        # outside of inference mode a copy, which may go where a graph is built
        return features if torch.is_inference_mode_enabled() else features.clone()

    def _run(self, x: Tensor, places: Places) -> Tensor:
        return transform(x, places, self.weights, self.stored, self.norm)

    def _behind(self, N: int) -> Places:
        """N positions behind the cached ones."""
        past, end = self.length, self.length + N
        if end > self.capacity:
            raise ValueError(f"cache of {self.capacity} positions is full: {past} used, {N} more requested")
        mask = None
        if past and N > 1:
            mask = self.positions[:end] <= self.positions[past:end, None]
        here = slice(past, end)
        return Places(self.cos[here], self.sin[here], here, end, mask, causal=past == 0 and N > 1)

    def _at(self, starts: Tensor, N: int) -> Places:
        """N positions from `starts` [B] on, in each row."""
        end = int(starts.max()) + N
        if end > self.capacity:
            raise ValueError(f"cache of {self.capacity} positions is full: {N} requested up to position {end}")
        return places_at(starts, N, self.positions[:end], self.cos, self.sin)


def places_at(starts: Tensor, N: int, keys: Tensor, cos: Tensor, sin: Tensor) -> Places:
    """N positions from `starts` [B] on, in each row, which read those of the positions `keys` up to themselves."""
    at = starts[:, None] + torch.arange(N, device=starts.device)
    mask = (keys <= at[:, :, None])[:, None]
    rows = torch.arange(len(starts), device=starts.device)[:, None]
    return Places(cos[at], sin[at], (rows, at), len(keys), mask, causal=False)


def transform(x: Tensor, places: Places, weights: list[LayerWeights], stored: list[Tensor], norm: Tensor) -> Tensor:
    """Features [B, N, D] of inputs x at these places; writes keys and values to `stored`."""
    B, N, D = x.shape
    h = x.reshape(B * N, D)
    for layer, kv in zip(weights, stored, strict=True):
        h = attend(h, places, layer, kv, N)
        active = F.gelu(F.layer_norm(h, (D,), layer.mlp_norm).mm(layer.up))
        h = torch.addmm(h, active, layer.down)
    return F.layer_norm(h, (D,), norm).view(B, N, D)


def attend(h: Tensor, places: Places, layer: LayerWeights, stored: Tensor, N: int) -> Tensor:
    """h + attention(norm(h)), [B N, D]; writes the new keys and values."""
    _, B, H, _, E = stored.shape
    normal = F.layer_norm(h, h.shape[1:], layer.attention_norm)
    qkv = torch.bmm(normal.expand(3, -1, -1), layer.qkv).view(3, B, N, H, E)
    # queries and keys at once: normalised, then rotated as in `rotate_`
    both = F.layer_norm(qkv[:2], (E,)).mul_(layer.scale)
    torch.addcmul(both * places.cos, both.roll(E // 2, -1), places.sin, out=qkv[:2])
    queries, new = qkv[0].transpose(1, 2), qkv[1:]
    if isinstance(places.write, slice):
        stored[:, :, :, places.write] = new.transpose(2, 3)
    else:
        rows, positions = places.write
        stored[:, rows, :, positions] = new.permute(1, 2, 0, 3, 4)
    keys, values = stored[:, :, :, : places.end].unbind(0)
    y = F.scaled_dot_product_attention(queries, keys, values, attn_mask=places.mask, is_causal=places.causal)
    return torch.addmm(h, y.transpose(1, 2).reshape(B * N, H * E), layer.out)
