"""Causal attention with rotary positions and layer-normalised queries and keys.

H heads have the width E = D / H.
"""

import math
from collections.abc import Callable
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import BackwardCFunction as Context

from tarflowlm import chunks
from tarflowlm.flow import full_precision, is_eager_cpu, widen
from tarflowlm.flow.numerics.mixture import first_derivatives_only
from tarflowlm.model_config import TransformerConfig


def rotary_tables(positions: Tensor, num_heads: int, head_width: int) -> tuple[Tensor, Tensor]:
    """cos and signed sin [N, H, E] of angles position * 10_000^(-2 i / E) (Su et al. 2021)."""
    even = torch.arange(0, head_width, 2, device=positions.device, dtype=torch.float32)
    exponent = even / head_width
    angle = positions.float()[:, None, None] * torch.exp(-math.log(10_000.0) * exponent)
    # repeated for every head, so that the product with a batch reads contiguous memory
    cos, sin = (part.expand(-1, num_heads, -1) for part in (angle.cos(), angle.sin()))
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def rotate_(x_BNHE: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate, in place, channel pairs (x, y) = (i, i + E/2) by the angle of their position.

    They become (x cos - y sin, x sin + y cos).
    """
    swapped = x_BNHE.roll(x_BNHE.shape[-1] // 2, dims=-1)
    return x_BNHE.mul_(cos.to(x_BNHE.dtype)).add_(swapped.mul_(sin.to(x_BNHE.dtype)))


class KeptAttention(Function):
    """Causal attention of q, k, v [B, N, E] with scores q k^T, which keeps its weights.

    PyTorch's kernel computes them again in the backward pass, and on a CPU takes half as long again
    for both passes. It is better where weights are many, or no gradient is wanted.
    """

    ROWS = 64
    """Queries at once: with more, more products are above the diagonal; fewer are slow."""

    @staticmethod
    def forward(ctx: Context, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        y, weights = torch.empty_like(v), list[Tensor]()
        future = q.new_full((KeptAttention.ROWS,) * 2, -math.inf).triu(1)
        for rows in chunks.row_ranges(q.shape[1], 1, KeptAttention.ROWS):
            size, past = rows.stop - rows.start, slice(rows.stop)
            weight = torch.bmm(q[:, rows], k[:, past].mT)
            weight[:, :, rows] += future[:size, :size]
            torch.softmax(weight, -1, out=weight)
            y[:, rows] = torch.bmm(weight, v[:, past])
            weights.append(weight)
        ctx.save_for_backward(q, k, v, *weights)
        return y

    @staticmethod
    def backward(ctx: Context, of_y: Tensor) -> tuple[Tensor, ...]:
        first_derivatives_only()
        saved: tuple[Tensor, ...] = ctx.saved_tensors
        q, k, v, *weights = saved
        of_q, of_k, of_v = (torch.empty_like(x) for x in (q, k, v))
        every = zip(chunks.row_ranges(q.shape[1], 1, KeptAttention.ROWS), weights, strict=True)
        # the last rows see all positions: the others add to their gradients
        for rows, weight in reversed(list(every)):
            past = slice(rows.stop)
            of_score = torch.bmm(of_y[:, rows], v[:, past].mT)
            torch._softmax_backward_data(of_score, weight, -1, q.dtype, grad_input=of_score)
            of_q[:, rows] = torch.bmm(of_score, k[:, past])
            pairs = (of_k, of_score.mT, q[:, rows]), (of_v, weight.mT, of_y[:, rows])
            for total, left, right in pairs:
                if rows.stop == q.shape[1]:
                    torch.bmm(left, right, out=total)
                else:
                    total[:, past] += torch.bmm(left, right)
        return of_q, of_k, of_v


kept_attention: Callable[[Tensor, Tensor, Tensor], Tensor] = KeptAttention.apply


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
        if (
            torch.is_grad_enabled()
            and is_eager_cpu(x)
            and B * self.num_heads * N * N <= chunks.KEPT
        ):
            return self._forward_in_training(x, tables)
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

    def _forward_in_training(self, x: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
        """`forward` on a CPU, with attention by `KeptAttention`.

        The channels of queries and keys are reordered, which their scores do not show: pairs become
        neighbours, and so complex numbers, which rotate in one pass instead of four.
        """
        B, N, D = x.shape
        H, E = self.num_heads, self.head_width
        cos, sin = tables
        turn = torch.complex(cos[:, 0, : E // 2], sin[:, 0, E // 2 :])[:, None]
        *weights, value = self.qkv.weight.chunk(3)
        scales = (self.query_scale, E**-0.5), (self.key_scale, 1.0)
        rotated = list[Tensor]()
        for weight, (scale, factor) in zip(weights, scales, strict=True):
            weight = weight.unflatten(0, (H, 2, E // 2)).transpose(1, 2).flatten(0, 2)
            part = widen(F.linear(x, weight)).view(B, N, H, E)
            scale = scale.view(2, -1).T.flatten().to(part.dtype) * factor
            normal = F.layer_norm(part, (E,), scale)
            pairs = torch.view_as_complex(normal.unflatten(-1, (E // 2, 2)))
            rotated.append(torch.view_as_real(pairs * turn.to(pairs.dtype)).flatten(-2))
        parts = (*rotated, widen(F.linear(x, value)).view(B, N, H, E))
        with full_precision(x):
            y = kept_attention(*(part.transpose(1, 2).reshape(-1, N, E) for part in parts))
        return self.out(y.view(B, H, N, E).transpose(1, 2).reshape(B, N, D))
