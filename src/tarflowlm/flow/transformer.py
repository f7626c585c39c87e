"""Causal Transformer, which maps vectors to features and knows nothing of flows, and its KV cache.

`KVCache` runs it in few operations, because their number sets the speed of small models.
H heads have the width E = D / H; N counts new positions.
"""

import math
from abc import abstractmethod
from collections.abc import Callable
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tarflowlm.flow import full_precision, widen
from tarflowlm.model_config import TransformerConfig

Embedder = Callable[[Tensor], Tensor]
"""From latents [B, n, C], or tokens [B, n P], to inputs of a Transformer [B, n, D]."""
ROTARY_BASE = 10_000.0
"""The longest wavelength of rotary positions, over 2 pi."""


def rotary_tables(positions: Tensor, num_heads: int, head_width: int) -> tuple[Tensor, Tensor]:
    """cos and signed sin [N, H, E] of angles position * base^(-2 i / E) (Su et al. 2021)."""
    even = torch.arange(0, head_width, 2, device=positions.device, dtype=torch.float32)
    exponent = even / head_width
    angle = positions.float()[:, None, None] * torch.exp(-math.log(ROTARY_BASE) * exponent)
    # repeated for every head, so that the product with a batch reads contiguous memory
    cos, sin = (part.expand(-1, num_heads, -1) for part in (angle.cos(), angle.sin()))
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def rotate_(x_BNHE: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate, in place, channel pairs (x, y) = (i, i + E/2) by the angle of their position.

    They become (x cos - y sin, x sin + y cos).
    """
    swapped = x_BNHE.roll(x_BNHE.shape[-1] // 2, dims=-1)
    return x_BNHE.mul_(cos.to(x_BNHE.dtype)).add_(swapped.mul_(sin.to(x_BNHE.dtype)))


def convolve(x: Tensor, taps: Tensor) -> Tensor:
    """y_n = sum_k taps_k * x_{n-k}, with zeros before the first position.

    x [B, N, D], taps [K, D], K > 0.
    """
    y = x * taps[0]
    for k in range(1, min(len(taps), x.shape[1])):
        y = y + F.pad(x[:, :-k] * taps[k], (0, 0, k, 0))
    return y


class Attention(nn.Module):
    """Causal multi-head self-attention with layer-normalised queries and keys."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.head_width = config.head_width
        self.qkv = nn.Linear(config.width, 3 * config.width, bias=False)
        self.out = nn.Linear(config.width, config.width, bias=False)
        self.query_scale = nn.Parameter(torch.ones(self.head_width))
        self.key_scale = nn.Parameter(torch.ones(self.head_width))

    def forward(self, x: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
        B, N, D = x.shape
        # three products, so that normalising and gradients need no copies
        parts = (F.linear(x, weight) for weight in self.qkv.weight.chunk(3))
        q, k, v = (part.view(B, N, self.num_heads, self.head_width) for part in parts)
        q = rotate_(F.layer_norm(q, (self.head_width,), self.query_scale.to(q.dtype)), *tables)
        k = rotate_(F.layer_norm(k, (self.head_width,), self.key_scale.to(k.dtype)), *tables)
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))
        if x.device.type == "cpu":  # where attention is slower in bfloat16
            q, k, v = widen(q), widen(k), widen(v)
        with full_precision(x) if x.device.type == "cpu" else nullcontext():
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).reshape(B, N, D))


class Layer(nn.Module):
    """A pre-norm layer: x + attention(norm(x)), then x + mlp(norm(x))."""

    keeps_activations = True
    """False: the backward pass recomputes all from the input."""
    dropout = 0.0
    """Share of the outputs of attention and MLP that is dropped in training."""

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
        return checkpoint(
            self._compute, x, tables, use_reentrant=False, preserve_rng_state=self.dropout > 0
        )

    def _compute(self, x: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
        # FSDP2 may gather weights in bfloat16, while x stays wide
        normal = F.layer_norm(x, x.shape[-1:], self.attention_norm.weight.to(x.dtype))
        x = x + F.dropout(self.attention(normal, tables), self.dropout, self.training)
        normal = F.layer_norm(x, x.shape[-1:], self.mlp_norm.weight.to(x.dtype))
        return x + F.dropout(self.down(F.gelu(self.up(normal))), self.dropout, self.training)


class Transformer(nn.Module):
    """Causal layers and a final norm, [B, N, D] -> [B, N, D]; output n sees the inputs up to n.

    Start: matrices are N(0, 1 / fan_in), but those that write to the residual stream are zero.
    """

    def __init__(self, config: TransformerConfig, num_layers: int) -> None:
        super().__init__()
        self.config = config
        self.layers = nn.ModuleList(Layer(config) for _ in range(num_layers))
        self.norm = nn.LayerNorm(config.width, bias=False)
        identity = torch.eye(config.input_taps, 1).repeat(1, config.width)
        self.input_taps = nn.Parameter(identity) if config.input_taps else None
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                writes = name.endswith(("attention.out", "down"))
                nn.init.normal_(module.weight, std=0.0 if writes else module.in_features**-0.5)

    def forward(self, x: Float[Tensor, "B N D"]) -> Float[Tensor, "B N D"]:
        positions = torch.arange(x.shape[1], device=x.device)
        tables = rotary_tables(positions, self.config.num_heads, self.config.head_width)
        x = x if self.input_taps is None else convolve(x, self.input_taps)
        for layer in self.layers:
            x = layer(x, tables)
        return self.norm(x)


LARGEST_COPY = 2**20
"""Elements of a matrix that the CPU keeps transposed, to multiply one row up to twice as fast."""


class LayerWeights:
    """The present weights of one layer, in the format of `like`, matrices as [inputs, outputs]."""

    def __init__(self, layer: Layer, like: Tensor) -> None:
        attention = layer.attention
        self.attention_norm = layer.attention_norm.weight.detach()
        self.qkv = _by_inputs(torch.stack(attention.qkv.weight.chunk(3)))  # [3, D, D]
        scales = torch.stack((attention.query_scale, attention.key_scale)).detach()
        self.scale = scales[:, None, None, None]
        self.out = _by_inputs(attention.out.weight)
        self.mlp_norm = layer.mlp_norm.weight.detach()
        self.up = _by_inputs(layer.up.weight)
        self.down = _by_inputs(layer.down.weight)
        for name, weight in vars(self).items():
            setattr(self, name, weight.to(like))


def _by_inputs(weight: Tensor) -> Tensor:
    transposed = weight.detach().transpose(-1, -2)
    copies = weight.device.type == "cpu" and weight.numel() <= LARGEST_COPY
    return transposed.contiguous() if copies else transposed


class KVCache:
    """A Transformer with its present weights, and the keys and values of past positions.

    For `batch` rows of `capacity` positions, with the dtype and device of `like`; without a graph.
    """

    embed: Embedder
    """Set by `Conditioner.allocate_cache`."""

    def __init__(self, transformer: Transformer, batch: int, capacity: int, like: Tensor) -> None:
        config = transformer.config
        taps = transformer.input_taps
        self.weights = [LayerWeights(layer, like) for layer in transformer.layers]  # type: ignore[arg-type]
        self.norm = transformer.norm.weight.detach().to(like)
        # taps [D, K], the oldest position first, and inputs after K - 1 zeros
        self.taps = None if taps is None else taps.detach().flip(0).T.contiguous().to(like)
        self.before = max(config.input_taps - 1, 0)
        width = 0 if taps is None else config.width
        self.inputs = like.new_zeros(batch, self.before + capacity, width)
        self.stored = [
            like.new_zeros(2, batch, config.num_heads, capacity, config.head_width)
            for _ in self.weights
        ]
        self.positions = torch.arange(capacity, device=like.device)
        cos, sin = rotary_tables(self.positions, 1, config.head_width)
        self.cos, self.sin = cos.to(like.dtype), sin.to(like.dtype)
        self.length = 0

    def rewind(self, length: int) -> None:
        assert 0 <= length <= self.length
        self.length = length

    def take(self, source: "KVCache", rows: Tensor | list[int]) -> None:
        """Replace every row b, in place, by row rows[b] of `source`."""
        self.length = source.length
        window = self.before + self.length
        self.inputs[:, :window] = source.inputs[rows, :window]
        for stored, given in zip(self.stored, source.stored, strict=True):
            stored[:, :, :, : self.length] = given[:, rows, :, : self.length]

    def keep(self, rows: Tensor) -> None:
        """Continue with these rows alone."""
        self.inputs = self.inputs[rows]
        self.stored = [stored[:, rows] for stored in self.stored]

    def extend(self, x: Float[Tensor, "B N D"]) -> Float[Tensor, "B N D"]:
        """Features of N positions with inputs x, which follow the cached ones."""
        with torch.inference_mode():
            features = self._layers(x.to(self.norm.dtype)).to(x.dtype)
        self.length += x.shape[1]
        # the copy may enter a graph
        return features if torch.is_inference_mode_enabled() else features.clone()

    def _layers(self, x: Tensor) -> Tensor:
        B, N, D = x.shape
        end = self.length + N
        here = slice(self.length, end)
        assert end <= len(self.positions), "the cache is full"
        mask = None
        if self.length and N > 1:
            mask = self.positions[:end] <= self.positions[here, None]
        if self.taps is not None:
            self.inputs[:, self.before :][:, here] = x
            windows = self.inputs.unfold(1, self.before + 1, 1)  # [B, capacity, D, K]
            x = (windows[:, here] * self.taps).sum(-1)
        h = x.reshape(B * N, D)
        for layer, stored in zip(self.weights, self.stored, strict=True):
            stored = stored[:, :, :, :end]
            _, _, H, _, E = stored.shape
            normal = F.layer_norm(h, (D,), layer.attention_norm)
            qkv = torch.bmm(normal.expand(3, -1, -1), layer.qkv).view(3, B, N, H, E)
            # queries and keys at once: normalised, then rotated as in `rotate_`
            both = F.layer_norm(qkv[:2], (E,)).mul_(layer.scale)
            swapped = both.roll(E // 2, -1)
            torch.addcmul(both * self.cos[here], swapped, self.sin[here], out=qkv[:2])
            stored[:, :, :, here] = qkv[1:].transpose(2, 3)
            keys, values = stored.unbind(0)
            y = F.scaled_dot_product_attention(
                qkv[0].transpose(1, 2),
                keys,
                values,
                attn_mask=mask,
                is_causal=mask is None and N > 1,
            )
            h = torch.addmm(h, y.transpose(1, 2).reshape(B * N, D), layer.out)
            active = F.gelu(F.layer_norm(h, (D,), layer.mlp_norm).mm(layer.up))
            h = torch.addmm(h, active, layer.down)
        return F.layer_norm(h, (D,), self.norm).view(B, N, D)


class InputMap(nn.Module):
    """Latents x [..., C] to Transformer inputs [..., D]: linear(x) + out(gelu(lift(x))).

    The linear path alone would confine the inputs to a C-dimensional subspace (docs/log.md).
    """

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(channels, width)
        self.lift = nn.Linear(channels, width)
        self.out = nn.Linear(width, width, bias=False)
        nn.init.normal_(self.linear.weight, std=channels**-0.5)
        nn.init.normal_(self.lift.weight, std=2.0 * channels**-0.5)
        nn.init.normal_(self.out.weight, std=width**-0.5)
        nn.init.zeros_(self.linear.bias)
        nn.init.normal_(self.lift.bias)

    def forward(self, x: Tensor) -> Tensor:
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

    def features_at(
        self, cache: KVCache, previous: Tensor | None, batch: int
    ) -> Float[Tensor, "B D"]:
        """Features c_n of the next position, from the latents [B, C] or tokens [B, P] before it.

        None at the start of the sequence.
        """
        if previous is None:
            return cache.extend(self.start.expand(batch, 1, -1))[:, 0]
        return self.features_of(cache, previous[:, None], first=False)[:, 0]

    def features_of(
        self, cache: KVCache, past: Tensor, *, first: bool
    ) -> Float[Tensor, "B next D"]:
        """Features of the positions after the cached ones, from `past` before them.

        `first`: begin at the first position of the sequence; then there is one more than in `past`.
        """
        return cache.extend(self._inputs(cache.embed, past, first))
