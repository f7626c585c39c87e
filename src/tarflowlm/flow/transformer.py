"""Causal Transformer, which maps vectors to features and knows nothing of flows.

`layer` is the only place that says what a layer computes: a pass over a whole sequence, in training
or not, and one over new positions after cached ones (`flow.cache`) differ in how they attend.

H heads have the width E = D / H.
"""

from abc import abstractmethod
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tarflowlm.flow import widen
from tarflowlm.flow.attention import attend_causally, rotate, rotations

Embedder = Callable[[Tensor], Tensor]
"""From latents [B, n, C], or tokens [B, n P], to inputs of a Transformer [B, n, D]."""
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Attention of queries, keys and values [R, H, E] of R = B N rows, with scores q k^T: [R, D]. Keys
and values may have fewer heads.
"""
Compute = Callable[[Tensor, Tensor, Attend], Tensor]
"""A pass of a layer, see `Layer.compute`."""


class Shape(Protocol):
    """The shape of a Transformer, but for the number of its layers (`TransformerConfig`)."""

    @property
    def width(self) -> int:
        """Features D."""

    @property
    def num_heads(self) -> int:
        """Heads H."""

    @property
    def head_width(self) -> int:
        """Width E of a head."""

    @property
    def hidden(self) -> int:
        """Hidden width M of the MLP."""

    @property
    def is_gated(self) -> bool:
        """Whether the MLP has a gate."""

    @property
    def input_taps(self) -> int:
        """Positions that a convolution mixes into an input."""

    @property
    def layer_class(self) -> Any:
        """The class of layers of a user's own, a `Layer`; None: `PreNormLayer`."""


class LayerWeights(NamedTuple):
    """The weights that `layer` reads; matrices are [inputs, outputs]. H heads each have queries,
    keys and values.

    The channels of queries and keys are reordered: the pair (i, i + E/2) becomes (2 i, 2 i + 1), a
    complex number, whose rotation is one product. Scores do not depend on the order.
    """

    attention_norm: Tensor
    """[D]"""
    queries_and_keys: Tensor
    """[D, 2 D]"""
    scale: Tensor
    """Of the channels of queries, with the factor of attention, and of keys: [2, 1, E]."""
    values: Tensor
    """[D, D]"""
    out: Tensor
    """[D, D]"""
    mlp_norm: Tensor
    """[D]"""
    gate: Tensor | None
    """[D, M], of an MLP that has a gate."""
    up: Tensor
    """[D, M]"""
    down: Tensor
    """[M, D]"""


def layer(
    x: Float[Tensor, "R D"], w: LayerWeights, turns: Tensor, attend: Attend, dropout: float = 0.0
) -> Float[Tensor, "R D"]:
    """A pre-norm layer: x + attention(norm(x)), then x + mlp(norm(x)).

    R = B N rows are the positions of all sequences, and `turns` their `rotations`, complex numbers
    [R or 1, 1, 1, E/2].
    Queries and keys are layer-normalised and rotated in float32 or wider.
    """
    D, E = x.shape[-1], w.scale.shape[-1]
    # FSDP2 may gather weights in bfloat16, while x stays wide
    normal = F.layer_norm(x, (D,), w.attention_norm.to(x.dtype))
    both = widen(torch.mm(normal, w.queries_and_keys)).view(len(x), 2, D // E, E)
    q, k = rotate(F.layer_norm(both, (E,)) * w.scale, turns).unbind(1)
    v = torch.mm(normal, w.values).view(len(x), D // E, E)
    x = x + F.dropout(torch.mm(attend(q, k, v), w.out), dropout)
    normal = F.layer_norm(x, (D,), w.mlp_norm.to(x.dtype))
    inner = torch.mm(normal, w.up)
    inner = F.gelu(inner) if w.gate is None else F.silu(torch.mm(normal, w.gate)) * inner
    return x + F.dropout(torch.mm(inner, w.down), dropout)


class Layer(nn.Module):
    """A layer of a Transformer, which a user may replace by one of his own (docs/flow.md).

    To implement one, make the parameters in `__init__` from the `Shape`, write `compute`, and give
    the class a name by `@tarflowlm.layer("mine")`. `model.trunk.layer` chooses it, and `--import`
    tells a command where it is.
    Linear maps whose names end with "out" or "down" write to the residual stream: they start at
    zero.
    """

    keeps_activations = True
    """False: the backward pass recomputes all from the input."""
    dropout = 0.0
    """Share of the outputs of attention and MLP that `compute` drops in training."""
    key_heads: int
    """Heads of keys and values, which the KV cache has room for. Of H heads of queries, the first
    H / key_heads share the first of them, and so on.
    """

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.key_heads = shape.num_heads

    @abstractmethod
    def compute(self, x: Tensor, turns: Tensor, attend: Attend) -> Tensor:
        """The rows x [R, D] of all positions after this layer.

        `turns` are those of `layer`: queries [R, H, E] become `rotate(queries, turns[:, 0])`.
        """

    def step(self, like: Tensor) -> Compute:
        """`compute` for writing, with matrices in the format of `like`.

        It may read the weights as they are now, or as they are at each call: nobody trains while
        he writes.
        """
        if like.dtype == next(self.parameters()).dtype:
            return self.compute
        return deepcopy(self).eval().requires_grad_(False).to(like.dtype).compute

    def forward(self, x: Tensor, turns: Tensor, length: int) -> Tensor:
        """x [B N, D] for `length` N."""
        attend = partial(attend_causally, length=length)
        if self.keeps_activations:
            return self.compute(x, turns, attend)
        return checkpoint(
            self.compute,
            x,
            turns,
            attend,
            use_reentrant=False,
            preserve_rng_state=self.dropout > 0,
        )


class Attention(nn.Module):
    """The weights of causal multi-head attention with layer-normalised queries and keys."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.qkv = nn.Linear(shape.width, 3 * shape.width, bias=False)
        self.out = nn.Linear(shape.width, shape.width, bias=False)
        self.query_scale = nn.Parameter(torch.ones(shape.head_width))
        self.key_scale = nn.Parameter(torch.ones(shape.head_width))


class PreNormLayer(Layer):
    """The parameters of a `layer`."""

    def __init__(self, shape: Shape) -> None:
        super().__init__(shape)
        self.attention_norm = nn.LayerNorm(shape.width, bias=False)
        self.attention = Attention(shape)
        self.mlp_norm = nn.LayerNorm(shape.width, bias=False)
        gate = nn.Linear(shape.width, shape.hidden, bias=False) if shape.is_gated else None
        self.gate = gate
        self.up = nn.Linear(shape.width, shape.hidden, bias=False)
        self.down = nn.Linear(shape.hidden, shape.width, bias=False)

    def weights(self) -> LayerWeights:
        attention = self.attention
        E = len(attention.key_scale)
        *queries_and_keys, values = attention.qkv.weight.chunk(3)
        rows = torch.cat(queries_and_keys).unflatten(0, (-1, 2, E // 2))  # [2 H, 2, E/2, D]
        scales = torch.stack((attention.query_scale * E**-0.5, attention.key_scale))
        return LayerWeights(
            attention_norm=self.attention_norm.weight,
            queries_and_keys=rows.transpose(1, 2).flatten(0, 2).T,
            scale=scales.view(2, 2, E // 2).mT.reshape(2, 1, E),
            values=values.T,
            out=attention.out.weight.T,
            mlp_norm=self.mlp_norm.weight,
            gate=None if self.gate is None else self.gate.weight.T,
            up=self.up.weight.T,
            down=self.down.weight.T,
        )

    def compute(self, x: Tensor, turns: Tensor, attend: Attend) -> Tensor:
        return layer(x, self.weights(), turns, attend, self.dropout if self.training else 0.0)

    def step(self, like: Tensor) -> Compute:
        def cast(x: Tensor) -> Tensor:
            # vectors, and the scales [2, 1, E], stay wide
            return x.detach().to(like if x.ndim == 2 else widen(like))

        present = (None if x is None else cast(x) for x in self.weights())
        w = LayerWeights(*present)  # type: ignore[arg-type]
        return lambda x, turns, attend: layer(x, w, turns, attend)


def convolve(x: Tensor, taps: Tensor) -> Tensor:
    """y_n = sum_k taps_k * x_{n-k}, with zeros before the first position.

    x [B, N, D], taps [K, D], K > 0.
    """
    y = x * taps[0]
    for k in range(1, min(len(taps), x.shape[1])):
        y = y + F.pad(x[:, :-k] * taps[k], (0, 0, k, 0))
    return y


class Transformer(nn.Module):
    """Causal layers and a final norm, [B, N, D] -> [B, N, D]; output n sees the inputs up to n.

    Start: matrices are N(0, 1 / fan_in), but those that write to the residual stream are zero.
    """

    def __init__(self, config: Shape, num_layers: int) -> None:
        super().__init__()
        self.config = config
        kind: type[Layer] = config.layer_class or PreNormLayer
        self.layers = nn.ModuleList(kind(config) for _ in range(num_layers))
        self.norm = nn.LayerNorm(config.width, bias=False)
        identity = torch.eye(config.input_taps, 1).repeat(1, config.width)
        self.input_taps = nn.Parameter(identity) if config.input_taps else None
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                writes = name.endswith(("out", "down"))
                nn.init.normal_(module.weight, std=0.0 if writes else module.in_features**-0.5)

    @property
    def is_standard(self) -> bool:
        """Whether all layers are `PreNormLayer`s, which compiled steps take."""
        return all(type(one) is PreNormLayer for one in self.layers)

    def forward(self, x: Float[Tensor, "B N D"]) -> Float[Tensor, "B N D"]:
        B, N, _ = x.shape
        turns = rotations(torch.arange(N, device=x.device), self.config.head_width)
        turns = turns.repeat(B, 1, 1, 1)
        x = x if self.input_taps is None else convolve(x, self.input_taps)
        rows = x.flatten(0, 1)
        for one in self.layers:
            rows = one(rows, turns, N)
        return self.norm(rows).unflatten(0, (B, N))
