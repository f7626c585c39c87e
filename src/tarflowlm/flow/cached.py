"""The Transformer on positions that follow cached ones, in few operations.

One position of a small model costs less than the dispatch of its operations, so their number sets the time of
sampling. Up to rounding the result equals `Transformer`.

Shape legend: B batch, N new positions, D width, H heads, E = D / H head width, S positions that the cache can hold.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from tarflowlm.flow.transformer import Layer, Transformer, rotary_tables

LARGEST_COPY = 2**20
"""Elements of a matrix that a cache on the CPU keeps transposed. One row times a small matrix is up to twice as fast
when that is stored by inputs; a large one waits for memory either way."""


class LayerWeights:
    """The present weights of one layer, matrices as [inputs, outputs]."""

    def __init__(self, layer: Layer) -> None:
        attention = layer.attention
        self.attention_norm = layer.attention_norm.weight.detach()
        self.qkv = _by_inputs(torch.stack(attention.qkv.weight.chunk(3)))  # [3, D, D]
        # the factors of normalised queries and keys, [2, 1, 1, 1, E]
        self.scale = torch.stack((attention.query_scale, attention.key_scale)).detach()[:, None, None, None]
        self.out = _by_inputs(attention.out.weight)
        self.mlp_norm = layer.mlp_norm.weight.detach()
        self.up, self.down = _by_inputs(layer.up.weight), _by_inputs(layer.down.weight)


def _by_inputs(weight: Tensor) -> Tensor:
    """A weight [..., outputs, inputs] as [..., inputs, outputs]."""
    transposed = weight.detach().transpose(-1, -2)
    return transposed.contiguous() if weight.device.type == "cpu" and weight.numel() <= LARGEST_COPY else transposed


class KVCache:
    """A Transformer with its keys and values for the positions so far, in preallocated storage.

    `extend` reads the first `length` positions, writes its own behind them and advances `length`. `rewind` drops the
    newest positions without touching storage, so a decoder can revise a segment. The cache keeps the weights as they
    were at the start, and no graph.
    """

    def __init__(self, transformer: Transformer, batch: int, capacity: int, like: Tensor) -> None:
        """For `batch` rows of `capacity` positions, with the dtype and device of `like`."""
        config = transformer.config
        head_width = config.width // config.num_heads
        self.weights = [LayerWeights(layer) for layer in transformer.layers]  # type: ignore[arg-type]
        self.norm = transformer.norm.weight.detach()
        # keys and values of each layer
        self.stored = [like.new_zeros(2, batch, config.num_heads, capacity, head_width) for _ in self.weights]
        self.positions = torch.arange(capacity, device=like.device)
        tables = rotary_tables(self.positions, 1, head_width, config.rotary_base)
        self.cos, self.sin = (table.to(like.dtype) for table in tables)
        self.capacity, self.length = capacity, 0

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

    def extend(self, x: Float[Tensor, "B N D"]) -> Float[Tensor, "B N D"]:
        """Features of N positions with inputs x, which follow the cached ones. ValueError for more than fit."""
        B, N, D = x.shape
        end = self.length + N
        if end > self.capacity:
            raise ValueError(f"cache of {self.capacity} positions is full: {self.length} used, {N} more requested")
        with torch.inference_mode():
            several = self.length and N > 1
            mask = self.positions[:end] <= self.positions[self.length : end, None] if several else None
            h = x.reshape(B * N, D)
            for layer, stored in zip(self.weights, self.stored, strict=True):
                h = self._attend(h, layer, stored, end, mask)
                active = F.gelu(F.layer_norm(h, (D,), layer.mlp_norm).mm(layer.up))
                h = torch.addmm(h, active, layer.down)
            features = F.layer_norm(h, (D,), self.norm).view(B, N, D)
        self.length = end
        # outside of inference mode a copy, which may go where a graph is built
        return features if torch.is_inference_mode_enabled() else features.clone()

    def _attend(self, h: Tensor, layer: LayerWeights, stored: Tensor, end: int, mask: Tensor | None) -> Tensor:
        """h + attention(norm(h)), [B N, D]; writes the new keys and values up to position `end`."""
        _, B, H, _, E = stored.shape
        here, N = slice(self.length, end), end - self.length
        normal = F.layer_norm(h, h.shape[1:], layer.attention_norm)
        qkv = torch.bmm(normal.expand(3, -1, -1), layer.qkv).view(3, B, N, H, E)
        # queries and keys at once: normalised, then rotated as in `rotate_`
        both = F.layer_norm(qkv[:2], (E,)).mul_(layer.scale)
        torch.addcmul(both * self.cos[here], both.roll(E // 2, -1), self.sin[here], out=qkv[:2])
        stored[:, :, :, here] = qkv[1:].transpose(2, 3)
        keys, values = stored[:, :, :, :end].unbind(0)
        causal = self.length == 0 and N > 1
        y = F.scaled_dot_product_attention(qkv[0].transpose(1, 2), keys, values, attn_mask=mask, is_causal=causal)
        return torch.addmm(h, y.transpose(1, 2).reshape(B * N, H * E), layer.out)
