r"""The mixture-Rosenblatt map of Mix-d, channel by channel, with weights updated by Bayes' rule.

    alpha^(1) = w,   u_i = Phi^-1( sum_k alpha_k^(i) Phi((z_i - mu_ki) / s_k) )
    alpha_k^(i+1) ~ alpha_k^(i) N(z_i; mu_ki, s_k^2),   log_det = log p_mix(z) - log N(u; 0, I)

See docs/math.md, eq. 9. Differs from the paper's algorithm 1: the weights are logarithms.
"""

from functools import partial

import torch
from torch import Tensor

from tarflowlm import chunks
from tarflowlm.flow.numerics import cpu_inverse, layout, reference, sweep
from tarflowlm.flow.numerics.derivatives import differentiable
from tarflowlm.flow.numerics.mixture import mixture_cdf, mixture_cdf_inverse
from tarflowlm.flow.numerics.normal import standard_normal_log_prob

SWEPT = 4
"""On a CPU the sweep is fastest in chunks this much longer than those that stay in the cache."""
RECORDED = 4
"""Chunks of the backward are this much shorter: some 16 tensors are recorded per channel."""


CUTS = (5, 8), (8, 96)
"""An inverse keeps one component in 8 from channel 5 on, one in 96 from channel 8 on: enough for 97
rows of 100 at K = 50,257, d = 16 and codes 12 standard deviations apart.
"""
FEWEST_CUT = 1024


def rosenblatt(
    z: Tensor, log_w: Tensor, mean: Tensor, log_std: Tensor, *, compiled: bool = False
) -> tuple[Tensor, Tensor]:
    r"""Mixture-Rosenblatt map (docs/math.md, eq. 9).

        u ~ N(0, I)  iff  z ~ sum_k w_k N(mu_k, s_k^2 I)

    Shapes: z [..., d]; log_w [..., K], unnormalised; mean [K, d]; log_std [K]; u [..., d], log_det
    [...], nats. Float32 or float64; exact in both tails of every channel. NaN in a row gives NaN
    there. Memory: some tensors of a chunk x K, whatever the number of rows; the backward computes
    the map again. Errors: ValueError for shapes that do not fit; RuntimeError for second
    derivatives.
    """
    shape, flat, weights = layout.flatten_vectors(z, log_w, mean, log_std)
    forward = partial(_forward, compiled=compiled)
    u, log_det = differentiable(forward, _gradients, flat, weights, mean, log_std)
    return u.view(*shape, flat.shape[-1]), log_det.view(shape)


def rosenblatt_inverse(
    u: Tensor, log_w: Tensor, mean: Tensor, log_std: Tensor, *, compiled: bool = False
) -> Tensor:
    r"""Inverse of `rosenblatt`: one scalar mixture is solved per channel (docs/math.md, eq. 9).

    Shapes, formats and errors: as there. Gradients are implicit, channel by channel, and hold d
    tensors [..., K]; without any, memory is as in `rosenblatt`.
    """
    shape, flat, weights = layout.flatten_vectors(u, log_w, mean, log_std)
    if torch.is_grad_enabled() and any(t.requires_grad for t in (u, log_w, mean, log_std)):
        z, _ = reference.rosenblatt_inverse(flat, weights, mean, log_std, mixture_cdf_inverse)
    elif layout.use_eager_cpu(flat):
        z = cpu_inverse.rosenblatt_inverse(flat, weights, mean, log_std)
    else:
        general = partial(_inverse, mean=mean, log_std=log_std, compiled=compiled)
        rows = chunks.rows_at_once(len(mean), chunks.HELD_ACCELERATOR)
        z = torch.cat(chunks.in_parts(general, rows, flat, weights))
    return z.view(*shape, -1)


@torch.no_grad()
def _inverse(u: Tensor, log_w: Tensor, mean: Tensor, log_std: Tensor, *, compiled: bool) -> Tensor:
    scalar = reference.mixture_cdf_inverse
    book = mean, log_std, layout.fused(scalar) if compiled else scalar
    if len(mean) < FEWEST_CUT:
        return reference.rosenblatt_inverse(u, log_w, *book)[0]
    z, is_right = reference.rosenblatt_inverse(u, log_w, *book, CUTS)
    rest = (~is_right).nonzero().squeeze(-1)
    if len(rest):
        z[rest], _ = reference.rosenblatt_inverse(u[rest], log_w[rest], *book)
    return z


def _forward(
    z: Tensor, log_w: Tensor, mean: Tensor, log_std: Tensor, *, compiled: bool
) -> tuple[Tensor, Tensor]:
    if z.is_meta:
        return reference.rosenblatt(z, log_w, mean, log_std)
    if layout.use_eager_cpu(z):
        budget = SWEPT * layout.cached(len(mean))
    else:
        budget = chunks.HELD_ACCELERATOR
    u = torch.empty(z.shape, dtype=z.dtype, device=z.device)
    log_p = torch.empty_like(z[:, 0])
    for rows in chunks.row_ranges(len(z), len(mean), budget):
        now = z[rows], log_w[rows], mean, log_std
        u[rows], log_p[rows] = sweep.rosenblatt(*now, compiled=compiled)
    return u, log_p - standard_normal_log_prob(u)


def _gradients(
    z: Tensor, log_w: Tensor, mean: Tensor, log_std: Tensor, *rest: Tensor
) -> tuple[Tensor, ...]:
    _u, _log_det, grad_u, grad_log_det = rest
    of_z, of_log_w, *of_book = (torch.zeros_like(t) for t in (z, log_w, mean, log_std))
    per_row = RECORDED * len(mean)
    budget = layout.cached(per_row) if layout.use_eager_cpu(z) else chunks.HELD_ACCELERATOR
    for rows in chunks.row_ranges(len(z), per_row, budget):
        leaves = [t.detach().requires_grad_() for t in (z[rows], log_w[rows], mean, log_std)]
        with torch.enable_grad():
            outputs = reference.rosenblatt(leaves[0], leaves[1], leaves[2], leaves[3], mixture_cdf)
        cotangents = grad_u[rows], grad_log_det[rows]
        of_z[rows], of_log_w[rows], *of_part = torch.autograd.grad(outputs, leaves, cotangents)
        for total, part in zip(of_book, of_part, strict=True):
            total.add_(part)
    return of_z, of_log_w, *of_book
