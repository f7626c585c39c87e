"""Causal Transformer, which maps vectors to features and knows nothing of flows, and its KV cache.

`KVCache` runs it in few operations, because their number sets the speed of small models.
H heads have the width E = D / H; N counts new positions.
"""

import math
from abc import abstractmethod
from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tarflowlm import flow
from tarflowlm.flow import full_precision, widen
from tarflowlm.flow.attention import Attention, rotary_tables
from tarflowlm.model_config import TransformerConfig

Embedder = Callable[[Tensor], Tensor]
"""From latents [B, n, C], or tokens [B, n P], to inputs of a Transformer [B, n, D]."""


def convolve(x: Tensor, taps: Tensor) -> Tensor:
    """y_n = sum_k taps_k * x_{n-k}, with zeros before the first position.

    x [B, N, D], taps [K, D], K > 0.
    """
    y = x * taps[0]
    for k in range(1, min(len(taps), x.shape[1])):
        y = y + F.pad(x[:, :-k] * taps[k], (0, 0, k, 0))
    return y


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
FEW_ROWS = 16
"""Up to here, GELU by `erf` is faster on the CPU: PyTorch's own kernel takes 6 us to start."""


class LayerWeights:
    """The present weights of one layer, in the format of `like`, matrices as [inputs, outputs].

    The channels of queries and keys are reordered: the pair (i, i + E/2) becomes (2 i, 2 i + 1), a
    complex number, whose rotation is one product. Scores do not depend on the order.
    """

    def __init__(self, layer: Layer, like: Tensor) -> None:
        attention, E = layer.attention, layer.attention.head_width
        order = torch.arange(E, device=like.device).view(2, -1).T.flatten()
        rows = torch.arange(len(attention.qkv.weight), device=like.device).view(3, -1, E)
        rows[:2] = rows[:2, :, order]
        qkv = attention.qkv.weight[rows.flatten()]
        matrices = qkv, attention.out.weight, layer.up.weight, layer.down.weight
        longest = LARGEST_COPY if like.device.type == "cpu" else 0
        self.qkv, self.out, self.up, self.down = (
            x.contiguous() if x.numel() <= longest else x
            for x in (weight.detach().T.to(like) for weight in matrices)
        )
        self.parts = self.qkv.unflatten(1, (3, -1)).transpose(0, 1)  # [3, D, D]
        self.attention_norm = layer.attention_norm.weight.detach().to(like)
        self.mlp_norm = layer.mlp_norm.weight.detach().to(like)
        # of queries, with the factor of attention, and of keys
        scales = torch.stack((attention.query_scale * E**-0.5, attention.key_scale)).detach()
        self.scale = scales[:, None, None, None, order].to(widen(like))


class NewHeads:
    """Queries, keys and values of N new positions: the memory of all layers, and its views.

    Making the views in every layer would take a tenth of a step.
    """

    def __init__(self, stored: Tensor, batch: int, num: int, is_even: bool) -> None:
        _, _, _, H, _, E = stored.shape
        self.shape = batch, num, is_even
        self.product = stored.new_empty(3, batch * num, H * E)
        self.row = self.product.view(1, -1) if batch * num == 1 else None
        # in half precision a copy, because complex numbers are wider
        self.wide = widen(self.product)
        self.is_half = self.wide is not self.product
        qkv = self.wide.view(3, batch, num, H, E)
        self.both, self.to_store = qkv[:2], qkv[1:].transpose(2, 3)
        self.by_place = qkv[1:].permute(1, 2, 0, 3, 4)
        self.pairs = torch.view_as_complex(self.both.view(2, batch, num, H, E // 2, 2))
        # the kernels of the CPU for attention and GELU compute fast, but start slowly
        on_cpu = flow.is_eager_cpu(stored)
        self.is_step = on_cpu and num == 1 and is_even
        self.are_few = on_cpu and batch * num <= FEW_ROWS
        self.queries = qkv[0].transpose(1, 2)
        if self.is_step:
            self.queries = qkv[0].view(batch * H, 1, E)


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
        # taps [K, D], the oldest position first, and inputs after K - 1 zeros
        self.taps = None if taps is None else taps.detach().flip(0).to(like)
        self.before = max(config.input_taps - 1, 0)
        width = 0 if taps is None else config.width
        self.inputs = like.new_zeros(batch, self.before + capacity, width)
        self.stored = like.new_empty(
            len(self.weights), 2, batch, config.num_heads, capacity, config.head_width
        )
        positions = torch.arange(capacity, device=like.device)
        cos, sin = (
            table.to(widen(like)) for table in rotary_tables(positions, 1, config.head_width)
        )
        half = config.head_width // 2
        self.turns = torch.complex(cos[..., :half], sin[..., half:])  # e^(i angle), [.., 1, E/2]
        self.zero = like.new_zeros(())
        self.heads = NewHeads(self.stored, 0, 0, True)
        self.length = 0
        """Positions that are cached, in the longest row."""
        self.lengths: Tensor | None = None
        """The length of each row, [B], where rows differ."""
        self.written = 0
        """Positions that are finite in all rows: masked ones must be, too."""

    def rewind(self, length: int, lengths: Tensor | None = None) -> None:
        """Go back to this length, or to `lengths` [B], of which it is the largest."""
        assert 0 <= length <= self.length
        self.length, self.lengths = length, lengths

    def take(self, source: "KVCache", rows: Tensor) -> None:
        """Replace every row b, in place, by row rows[b] of `source`."""
        assert source.lengths is None
        self.length, self.lengths = source.length, None
        self.written = max(self.written, self.length)
        window = self.before + self.length
        self.inputs[:, :window] = source.inputs[rows, :window]
        for stored, given in zip(self.stored, source.stored, strict=True):
            stored[:, :, :, : self.length] = given[:, rows, :, : self.length]

    def keep(self, rows: Tensor) -> None:
        """Continue with these rows alone, in the same memory: a copy beside it might not fit."""
        num, rows = len(rows), rows.to(self.stored.device)
        self.inputs = self.inputs[rows]
        for layer in self.stored:
            layer[:, :num] = layer[:, rows]
        self.stored = self.stored[:, :, :num]
        if self.lengths is not None:
            self.lengths = self.lengths[rows]

    def extend(self, x: Float[Tensor, "B N D"]) -> Float[Tensor, "B N D"]:
        """Features of N positions with inputs x, which follow the cached ones."""
        if torch.is_autocast_enabled(x.device.type):
            with full_precision(x):
                return self.extend(x)
        with torch.inference_mode():
            if self.taps is None:
                # the layers change their input, so that it needs memory of its own
                h = x.to(self.norm.dtype, copy=True, memory_format=torch.contiguous_format)
            else:
                # as in `convolve`
                if self.lengths is None:
                    end = self.length + self.before + x.shape[1]
                    window = self.inputs[:, self.length : end]
                    window[:, self.before :] = x
                else:
                    rows = torch.arange(len(x), device=x.device)[:, None]
                    places = torch.arange(self.before + x.shape[1], device=x.device)
                    places = self.lengths[:, None] + places
                    self.inputs[rows, places[:, self.before :]] = x.to(self.inputs.dtype)
                    window = self.inputs[rows, places]
                windows = window.unfold(1, self.before + 1, 1).transpose(2, 3)  # [B, N, K, D]
                h = (windows * self.taps).sum(-2)
            h = self._layers(h)
        self.length += x.shape[1]
        self.lengths = None if self.lengths is None else self.lengths + x.shape[1]
        # outside of inference mode, because the features may enter a graph
        return torch.layer_norm(h, (x.shape[-1],), self.norm).view(x.shape).to(x.dtype)

    def _layers(self, x: Tensor) -> Tensor:
        """All but the final norm: [B, N, D] -> [B N, D], in the memory of x."""
        B, N, D = x.shape
        E = self.stored.shape[-1]
        is_even = self.lengths is None
        start, end = self.length, self.length + N
        assert end <= len(self.turns), "the cache is full"
        if self.heads.shape != (B, N, is_even):
            self.heads = NewHeads(self.stored, B, N, is_even)
        heads, turns = self.heads, self.turns[start:end]
        mask = where = None
        if self.lengths is not None:
            # rows of different lengths
            self.stored[..., self.written : end, :].zero_()
            at = self.lengths[:, None] + torch.arange(N, device=x.device)
            where = slice(None), torch.arange(B, device=x.device)[:, None], slice(None), at
            turns = self.turns[at]
            later = torch.arange(end, device=x.device) > at[:, None, :, None]
            mask = x.new_zeros(later.shape).masked_fill_(later, -torch.inf)
        elif start and N > 1:
            mask = x.new_full((N, end), -torch.inf).triu_(start + 1)
        self.written = max(self.written, end)
        h = x.view(B * N, D)
        places, past = self.stored[..., start:end, :], self.stored[..., :end, :]
        keys, values = (past.flatten(2, 3) if heads.is_step else past).unbind(1)
        if heads.is_step:
            keys = keys.transpose(-1, -2)
        layers = zip(self.weights, places.unbind(), keys.unbind(), values.unbind(), strict=True)
        for number, (layer, place, k, v) in enumerate(layers):
            normal = torch.layer_norm(h, (D,), layer.attention_norm)
            if heads.row is None:
                torch.bmm(normal.expand(3, -1, -1), layer.parts, out=heads.product)
            else:
                torch.mm(normal, layer.qkv, out=heads.row)
            if heads.is_half:
                heads.wide.copy_(heads.product)
            # queries and keys at once: normalised, then rotated as in `rotate_`
            torch.mul(torch.layer_norm(heads.both, (E,)), layer.scale, out=heads.both)
            heads.pairs.mul_(turns)
            if where is None:
                place.copy_(heads.to_store)
            else:
                self.stored[number][where] = heads.by_place.to(h.dtype)
            q = heads.queries.to(h.dtype) if heads.is_half else heads.queries
            if heads.is_step:
                y = torch.bmm(torch.bmm(q, k).softmax(-1), v)
            else:
                causal = mask is None and N > 1
                y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, scale=1.0)
                y = y.transpose(1, 2)
            h.addmm_(y.reshape(B * N, D), layer.out)
            normal = torch.layer_norm(h, (D,), layer.mlp_norm)
            if heads.are_few:
                # gelu(x) = (a + a erf(a)) / sqrt(2) with a = x / sqrt(2)
                a = torch.addmm(self.zero, normal, layer.up, beta=0, alpha=math.sqrt(0.5))
                h.addmm_(a.addcmul_(a, a.erf()), layer.down, alpha=math.sqrt(0.5))
            else:
                h.addmm_(F.gelu(normal.mm(layer.up)), layer.down)
        return h


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
