r"""The mixture-Rosenblatt map of Mix-d: channel after channel, mixture weights updated by Bayes'
rule.

    alpha^(1) = w,   u_i = Phi^-1( sum_k alpha_k^(i) Phi((z_i - mu_ki) / s_k) )
    alpha_k^(i+1) ~ alpha_k^(i) N(z_i; mu_ki, s_k^2),   log_det = log p_mix(z) - log N(u; 0, I)

See docs/math.md, eq. 9. The backward is computed chunk by chunk. Differs from the paper's algorithm
1: log weights.

N rows, K components, d channels: flat problems are z, u [N, d], log_w [N, K], mean [K, d], log_std
[K].
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from tarflowlm.flow.numerics import cpu_inverse, layout, reference
from tarflowlm.flow.numerics.mixture import first_derivatives, mixture_cdf, mixture_cdf_inverse
from tarflowlm.flow.numerics.normal import log_standard_normal_vectors

_BACKWARD_SHARE, _BACKWARD_SHARE_ACCELERATOR = 16, 4
"""The backward records about 16 [n, K] tensors per channel, so its chunks are that much smaller;
only 4 times on an accelerator, where every chunk is some hundred launches.
"""
_SWEPT_CHUNKS = 4
"""On a CPU, chunks of the forward map are this much longer than others (measured)."""


def rosenblatt(z: Tensor, log_w: Tensor, mean: Tensor, log_std: Tensor) -> tuple[Tensor, Tensor]:
    r"""Token-wise mixture-Rosenblatt map (docs/math.md, eq. 9): u ~ N(0, I) iff z ~ sum_k w_k
    N(mu_k, s_k^2 I).

    Shapes: z [..., d]; log_w [..., K], unnormalised; mean [K, d]; log_std [K] (one shared
    codebook); u [..., d], log_det [...], nats. Float32 or float64; exact in both tails of every
    channel. Memory: some tensors of a chunk x K (see `layout`), whatever the number of rows; the
    backward recomputes chunk by chunk. NaN in a row gives NaN there. First derivatives only: a
    second backward raises RuntimeError. Errors: ValueError for shapes that do not fit.
    """
    shape, flat, weights = layout.flatten_vectors(z, log_w, mean, log_std)
    u, log_det = _Rosenblatt.apply(flat, weights, mean, log_std)
    return u.view(*shape, flat.shape[-1]), log_det.view(shape)


def rosenblatt_inverse(u: Tensor, log_w: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    r"""Inverse of `rosenblatt`: the same recursion, with one scalar mixture solved per channel
    (docs/math.md, eq. 9).

    Shapes: u [..., d]; log_w [..., K], unnormalised; mean [K, d]; log_std [K]; z [..., d]. Float32
    or float64. Gradients are implicit, channel by channel, and hold d tensors [..., K]; without
    any, memory is as in `rosenblatt`. Errors: ValueError for shapes that do not fit.
    """
    shape, flat, weights = layout.flatten_vectors(u, log_w, mean, log_std)
    if torch.is_grad_enabled() and any(t.requires_grad for t in (u, log_w, mean, log_std)):
        z = reference.rosenblatt_inverse(flat, weights, mean, log_std, mixture_cdf_inverse)
    elif layout.use_eager_cpu(flat):
        z = cpu_inverse.rosenblatt_inverse(flat, weights, mean, log_std)
    else:
        z = torch.empty_like(flat)
        for rows in _chunks(flat, len(mean)):
            z[rows] = reference.rosenblatt_inverse(flat[rows], weights[rows], mean, log_std)
    return z.view(*shape, -1)


def _gradients(
    z: Tensor, log_w: Tensor, mean: Tensor, log_std: Tensor, grad_u: Tensor, grad_log_det: Tensor
) -> tuple[Tensor, ...]:
    out = tuple(torch.zeros_like(t) for t in (z, log_w, mean, log_std))
    for rows in _chunks(z, len(mean), backward=True):
        with torch.enable_grad():
            leaves = [t.detach().requires_grad_() for t in (z[rows], log_w[rows], mean, log_std)]
            # the map from differentiable pieces
            outputs = reference.rosenblatt(leaves[0], leaves[1], leaves[2], leaves[3], mixture_cdf)
        grads = torch.autograd.grad(outputs, leaves, (grad_u[rows], grad_log_det[rows]))
        out[0][rows], out[1][rows] = grads[:2]
        out[2].add_(grads[2])
        out[3].add_(grads[3])
    return out


class _Rosenblatt(Function):
    """Saves its inputs only; the backward computes the map again, chunk by chunk."""

    @staticmethod
    def forward(z: Tensor, log_w: Tensor, mean: Tensor, log_std: Tensor) -> tuple[Tensor, Tensor]:
        if z.is_meta:
            return reference.rosenblatt(z, log_w, mean, log_std)
        u, log_p = torch.empty(z.shape, dtype=z.dtype, device=z.device), torch.empty_like(z[:, 0])
        on_cpu, count = layout.use_eager_cpu(z), len(mean)
        size = (
            _SWEPT_CHUNKS * layout.chunk_rows(count)
            if on_cpu
            else layout.held_rows(count, z.device)
        )
        for rows in layout.row_chunks(len(z), count, size=size):
            u[rows], log_p[rows] = reference.rosenblatt_forward(z[rows], log_w[rows], mean, log_std)
        return u, log_p - log_standard_normal_vectors(u)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad_u: Tensor, grad_log_det: Tensor) -> tuple[Tensor | None, ...]:
        return first_derivatives(_gradients, *ctx.saved_tensors, grad_u, grad_log_det)


def _chunks(like: Tensor, num_components: int, *, backward: bool = False) -> Iterator[slice]:
    if layout.use_eager_cpu(like):
        return layout.row_chunks(len(like), num_components * (_BACKWARD_SHARE if backward else 1))
    size = layout.held_rows(
        num_components * (_BACKWARD_SHARE_ACCELERATOR if backward else 1), torch.device("cuda")
    )
    return layout.row_chunks(len(like), num_components, size=size)
