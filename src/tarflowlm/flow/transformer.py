"""Causal Transformer, which maps vectors to features and knows nothing of flows, and its KV cache.

Pre-norm, rotary positions, scaled-dot-product attention, GELU MLP. Every flow block and the discrete baseline use
this architecture. `KVCache` runs it on positions that follow cached ones, in few operations: one position of a small
model costs less than the dispatch of its operations, so their number sets the time of sampling.

Shape legend: B batch, N (new) positions, D width, H heads, E = D / H head width.

The precision rule is here, too: matrix products may run in half precision under autocast; densities never do.
Couplings, codebook densities, log-determinants and inverses are float32 or wider (docs/math.md, section 8). The
products in codebook densities cancel, so they are float64 where the device has it.
"""

import math
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tarflowlm.config import TransformerConfig as TransformerConfig


def widen(x: Tensor) -> Tensor:
    """x in at least float32: bfloat16 and float16 are converted, float32 and float64 returned as they are."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def wide_dtype(like: Tensor) -> torch.dtype:
    """The widest float format on the device of `like`: float64, but float32 on `mps`."""
    return torch.float32 if like.device.type == "mps" else torch.float64


def full_precision(like: Tensor) -> torch.autocast:
    """A context that turns autocast off on the device of `like`; meta tensors have none and follow the CPU's."""
    return torch.autocast("cpu" if like.is_meta else like.device.type, enabled=False)


def rotary_tables(positions: Tensor, num_heads: int, head_width: int, base: float) -> tuple[Tensor, Tensor]:
    """cos and signed sin [N, H, E] for `rotate_`, of the angles position * base^(-2 i / E) (Su et al. 2021)."""
    exponent = torch.arange(0, head_width, 2, device=positions.device, dtype=torch.float32) / head_width
    angle = positions.float()[:, None] * torch.exp(-math.log(base) * exponent)[None, :]
    cos, sin = angle.cos(), angle.sin()
    # repeated for every head: the product with a batch then reads contiguous memory
    shape = (len(positions), num_heads, head_width)
    tables = (torch.cat(pair, dim=-1)[:, None].expand(shape).contiguous() for pair in ((cos, cos), (-sin, sin)))
    return next(tables), next(tables)


def rotate_(x_BNHE: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate, in place, channel pairs (i, i + E/2) by their position's angle: to (x cos - y sin, x sin + y cos)."""
    swapped = x_BNHE.roll(x_BNHE.shape[-1] // 2, dims=-1)
    return x_BNHE.mul_(cos.to(x_BNHE.dtype)).add_(swapped.mul_(sin.to(x_BNHE.dtype)))


def convolve(x: Tensor, taps: Tensor) -> Tensor:
    """y_n = sum_k taps_k * x_{n-k}, with zeros before the first position: x [B, N, D], taps [K, D], K > 0."""
    y = x * taps[0]
    for k in range(1, min(len(taps), x.shape[1])):
        y = y + F.pad(x[:, :-k] * taps[k], (0, 0, k, 0))
    return y


class Attention(nn.Module):
    """Causal multi-head self-attention. Queries and keys are layer-normalised, which keeps training stable."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.num_heads, self.head_width = config.num_heads, config.width // config.num_heads
        self.qkv = nn.Linear(config.width, 3 * config.width, bias=False)
        self.out = nn.Linear(config.width, config.width, bias=False)
        self.query_scale = nn.Parameter(torch.ones(self.head_width))
        self.key_scale = nn.Parameter(torch.ones(self.head_width))

    def forward(self, x: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
        """[B, N, D] to [B, N, D], with the rotary `tables` of these positions."""
        B, N, D = x.shape
        # three products: normalising q and k, and the gradients of all three, then need no copies
        parts = (F.linear(x, weight) for weight in self.qkv.weight.chunk(3))
        q, k, v = (part.view(B, N, self.num_heads, self.head_width) for part in parts)
        q = rotate_(F.layer_norm(q, (self.head_width,), self.query_scale.to(q.dtype)), *tables)
        k = rotate_(F.layer_norm(k, (self.head_width,), self.key_scale.to(k.dtype)), *tables)
        on_cpu = x.device.type == "cpu"  # where attention is slower in bfloat16
        q, k, v = (widen(part.transpose(1, 2)) if on_cpu else part.transpose(1, 2) for part in (q, k, v))
        with full_precision(x) if on_cpu else nullcontext():
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).reshape(B, N, D))


class Layer(nn.Module):
    """A pre-norm layer: x + attention(norm(x)), then x + mlp(norm(x))."""

    keeps_activations = True
    """False: keep only the input for the backward pass and recompute the rest (activation checkpointing)."""
    dropout = 0.0
    """In training mode, the share of what attention and MLP write to the residual stream that is dropped."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.width, bias=False)
        self.attention = Attention(config)
        self.mlp_norm = nn.LayerNorm(config.width, bias=False)
        self.up = nn.Linear(config.width, config.mlp_ratio * config.width, bias=False)
        self.down = nn.Linear(config.mlp_ratio * config.width, config.width, bias=False)

    def forward(self, x: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
        if self.keeps_activations:
            return self._compute(x, tables)
        return checkpoint(self._compute, x, tables, use_reentrant=False, preserve_rng_state=self.dropout > 0)

    def _compute(self, x: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
        # FSDP2 may gather weights in bfloat16, while x stays wide
        normal = F.layer_norm(x, x.shape[-1:], self.attention_norm.weight.to(x.dtype))
        x = x + self._thinned(self.attention(normal, tables))
        normal = F.layer_norm(x, x.shape[-1:], self.mlp_norm.weight.to(x.dtype))
        return x + self._thinned(self.down(F.gelu(self.up(normal))))

    def _thinned(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout) if self.training and self.dropout else x


class Transformer(nn.Module):
    """`num_layers` causal layers and a final norm, [B, N, D] -> [B, N, D]; output n sees the inputs up to n.

    Start: matrices are N(0, 1 / fan_in), but the two projections that write to the residual stream are zero. A new
    Transformer is therefore the identity up to the final norm, at any depth.
    """

    def __init__(self, config: TransformerConfig, num_layers: int) -> None:
        super().__init__()
        self.config = config
        self.layers = nn.ModuleList(Layer(config) for _ in range(num_layers))
        self.norm = nn.LayerNorm(config.width, bias=False)
        self.input_taps = None
        if config.input_taps:
            # at the start the identity
            self.input_taps = nn.Parameter(torch.eye(config.input_taps, 1).repeat(1, config.width))
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=module.in_features**-0.5)
        for layer in self.layers:
            nn.init.zeros_(layer.attention.out.weight)  # type: ignore[union-attr, arg-type]
            nn.init.zeros_(layer.down.weight)  # type: ignore[union-attr, arg-type]

    def forward(self, x: Float[Tensor, "B N D"]) -> Float[Tensor, "B N D"]:
        config, positions = self.config, torch.arange(x.shape[1], device=x.device)
        tables = rotary_tables(positions, config.num_heads, config.width // config.num_heads, config.rotary_base)
        if self.input_taps is not None:
            x = convolve(x, self.input_taps)
        for layer in self.layers:
            x = layer(x, tables)
        return self.norm(x)


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
    transposed = weight.detach().transpose(-1, -2)
    return transposed.contiguous() if weight.device.type == "cpu" and weight.numel() <= LARGEST_COPY else transposed


class KVCache:
    """A Transformer with its keys and values for the positions so far, in preallocated storage.

    `extend` appends positions, `rewind` drops the newest ones without touching storage, so a decoder can revise a
    segment. The cache keeps the weights as they were at the start, and no graph.
    """

    def __init__(self, transformer: Transformer, batch: int, capacity: int, like: Tensor) -> None:
        """For `batch` rows of `capacity` positions, with the dtype and device of `like`."""
        config = transformer.config
        head_width = config.width // config.num_heads
        self.weights = [LayerWeights(layer) for layer in transformer.layers]  # type: ignore[arg-type]
        self.norm = transformer.norm.weight.detach()
        # taps [D, K] with the oldest position first, and the inputs after K - 1 zeros: a window for every position
        self.taps = None if transformer.input_taps is None else transformer.input_taps.detach().flip(0).T.contiguous()
        self.before = max(config.input_taps - 1, 0)
        self.inputs = like.new_zeros(batch, self.before + capacity, config.width if self.taps is not None else 0)
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
        """Replace the cached positions of every row b by those of row rows[b]."""
        self.inputs = self.inputs[rows]
        for stored in self.stored:
            stored[:, :, :, : self.length] = stored[:, rows, :, : self.length]

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows alone."""
        self.inputs, self.stored = self.inputs[rows], [stored[:, rows] for stored in self.stored]

    def copy(self, one: "KVCache") -> None:
        """Take the positions of a cache of one row for every row, in place."""
        self.length = one.length
        self.inputs[:, : self.before + self.length] = one.inputs[:, : self.before + self.length]
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
            if self.taps is not None:
                self.inputs[:, self.before + self.length : self.before + end] = x
                windows = self.inputs[:, self.length : self.before + end].unfold(
                    1, self.before + 1, 1
                )  # [B, N, D, K]
                x = (windows * self.taps).sum(-1)
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
