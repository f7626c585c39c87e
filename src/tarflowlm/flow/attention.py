"""Causal attention over a whole sequence, and rotary positions.

H heads have the width E = D / H.
"""

import math
from collections.abc import Callable
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import BackwardCFunction as Context

from tarflowlm import chunks
from tarflowlm.flow import full_precision, is_eager_cpu, widen
from tarflowlm.flow.numerics.mixture import first_derivatives_only


def rotations(positions: Tensor, head_width: int) -> Tensor:
    """e^(i angle) for the angles position * 10_000^(-2 j / E) (Su et al. 2021), [N, 1, 1, E/2].

    The axes of length 1 are those of heads, and of queries and keys.
    """
    even = torch.arange(0, head_width, 2, device=positions.device, dtype=torch.float32)
    exponent = even / head_width
    angle = positions.float()[:, None, None, None] * torch.exp(-math.log(10_000.0) * exponent)
    return torch.complex(angle.cos(), angle.sin())


def rotate(x: Tensor, turns: Tensor) -> Tensor:
    """Turn the neighbouring channels (2 j, 2 j + 1) of x [..., E] by `turns` [..., E/2].

    In float32 or wider.
    """
    x = widen(x)
    pairs = x.view(*x.shape[:-1], x.shape[-1] // 2, 2)
    if torch.compiler.is_compiling():  # which does not fuse complex numbers
        (a, b), cos, sin = pairs.unbind(-1), turns.real.to(x.dtype), turns.imag.to(x.dtype)
        return torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2)
    numbers = torch.view_as_complex(pairs)
    return torch.view_as_real(numbers * turns.to(numbers.dtype)).flatten(-2)


class KeptAttention(Function):
    """Causal attention of q, k, v [B, N, E] with scores q k^T, which keeps its weights.

    Products are in the format of v, the softmax in that of q. PyTorch's kernel computes the weights
    again in the backward pass, and on a CPU takes half as long again for both passes. It is better
    where weights are many, or no gradient is wanted.
    """

    ROWS = 64
    """Queries at once: with more, more products are above the diagonal; fewer are slow."""

    @staticmethod
    def forward(ctx: Context, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        wide, y, weights = q.dtype, torch.empty_like(v), list[Tensor]()
        future = q.new_full((KeptAttention.ROWS,) * 2, -math.inf).triu(1)
        q, k = q.to(v.dtype), k.to(v.dtype)
        for rows in chunks.row_ranges(q.shape[1], 1, KeptAttention.ROWS):
            size, past = rows.stop - rows.start, slice(rows.stop)
            weight = torch.bmm(q[:, rows], k[:, past].mT).to(wide)
            weight[:, :, rows] += future[:size, :size]
            weight = torch.softmax(weight, -1, out=weight).to(v.dtype)
            y[:, rows] = torch.bmm(weight, v[:, past])
            weights.append(weight)
        ctx.save_for_backward(q, k, v, *weights)
        ctx.wide = wide  # type: ignore[attr-defined]
        return y

    @staticmethod
    def backward(ctx: Context, of_y: Tensor) -> tuple[Tensor, ...]:
        first_derivatives_only()
        saved: tuple[Tensor, ...] = ctx.saved_tensors
        q, k, v, *weights = saved
        wide: torch.dtype = ctx.wide  # type: ignore[attr-defined]
        of_q, of_k, of_v = (torch.empty_like(x) for x in (q, k, v))
        every = zip(chunks.row_ranges(q.shape[1], 1, KeptAttention.ROWS), weights, strict=True)
        # the last rows see all positions: the others add to their gradients
        for rows, weight in reversed(list(every)):
            past = slice(rows.stop)
            of_weight = torch.bmm(of_y[:, rows], v[:, past].mT).to(wide)
            of_score = torch._softmax_backward_data(of_weight, weight.to(wide), -1, wide)
            of_score = of_score.to(v.dtype)
            of_q[:, rows] = torch.bmm(of_score, k[:, past])
            pairs = (of_k, of_score.mT, q[:, rows]), (of_v, weight.mT, of_y[:, rows])
            for total, left, right in pairs:
                if rows.stop == q.shape[1]:
                    torch.bmm(left, right, out=total)
                else:
                    total[:, past] += torch.bmm(left, right)
        return of_q.to(wide), of_k.to(wide), of_v


kept_attention: Callable[[Tensor, Tensor, Tensor], Tensor] = KeptAttention.apply


def attend_causally(
    q: Float[Tensor, "R H E"],
    k: Float[Tensor, "R heads E"],
    v: Float[Tensor, "R heads E"],
    *,
    length: int,
) -> Float[Tensor, "R D"]:
    """Attention of each position to those up to it, with scores q k^T, in sequences of `length`.

    Keys and values may have fewer heads, of which each serves several of the queries.
    """
    on_cpu = q.device.type == "cpu"
    if (shared := q.shape[1] // k.shape[1]) > 1:
        k, v = k.repeat_interleave(shared, 1), v.repeat_interleave(shared, 1)
    is_small = len(q) // length * q.shape[1] * length**2 <= chunks.KEPT
    is_kept = torch.is_grad_enabled() and is_eager_cpu(q) and is_small
    if on_cpu and not is_kept:  # where PyTorch's kernel is slower in bfloat16
        v = widen(v)
    # [B, H, N, E]
    q, k, v = (part.unflatten(0, (-1, length)).transpose(1, 2) for part in (q, k, v))
    with full_precision(q) if on_cpu else nullcontext():
        if is_kept:
            y = kept_attention(*(part.flatten(0, 1) for part in (q, k, v)))
        else:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=1.0)
    return y.view(q.shape).transpose(1, 2).flatten(0, 1).flatten(1)
