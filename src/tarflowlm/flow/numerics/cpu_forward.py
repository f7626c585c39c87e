r"""Mixture CDF and log-density on a CPU, with gradients, chunk by chunk in linear space.

The smaller tail's mass is a sum of positive terms, each right to an ulp or two, so it keeps its
*relative* precision down to the smallest normal number. Rows that get near that number (`SMALLEST`)
are repeated in float64, and where that ends too, in log space by `reference`.

Standardised values are scaled by sqrt(1/2) before they reach erfc and `density_into`, and constant
factors come last:

    Q(a) = erfc(a sqrt(1/2)) / 2,        N(a; 0, 1) = exp(-(a sqrt(1/2))^2) / sqrt(2 pi)
"""

import torch
from torch import Tensor

from tarflowlm.flow.numerics import reference
from tarflowlm.flow.numerics.layout import cached, cached_chunks, take_rows
from tarflowlm.flow.numerics.normal import (
    INV_SQRT_2PI,
    SQRT_HALF,
    clamp_,
    log_standard_normal,
    upper_quantile,
)
from tarflowlm.flow.numerics.reference import Gradients, Params

SMALLEST = {torch.float32: 1e-12, torch.float64: 1e-285}
"""Tail masses and densities below this leave the linear path. In float32 that is 7 sigma: beyond,
an ulp of u^2 / 2 shows in the log-determinant, and float64 removes it.
"""
_SAFE_TOTAL = (1e-20, 1e30)
"""Sums of exp(log_w) for which shifting log_w by its maximum would change nothing."""
_MANY_COMPONENTS = 20
"""From here the untransposed layout is the faster one (measured between 8 and 27)."""


class Workspace:
    """Buffers that all chunks of one call share, and the layout of a chunk.

    Few components: [K, n], so that broadcasts of z and sums over K are long vector loops, which
    pays for transposing the parameters. Many components: [n, K], as they come.
    """

    def __init__(self, num_buffers: int, num_components: int, dtype: torch.dtype) -> None:
        self.axis = 0 if num_components < _MANY_COMPONENTS else 1
        self._num_components = num_components
        size = cached(num_components)
        self._buffers = [torch.empty(size, dtype=dtype) for _ in range(num_buffers)]
        self.one = torch.ones((), dtype=dtype)
        self.zero = torch.zeros((), dtype=dtype)

    def __call__(self, index: int, rows: int) -> Tensor:
        """Buffer `index` as a contiguous chunk of `rows`, with whatever was left there."""
        flat = self._buffers[index][: self._num_components * rows]
        shape = (-1, rows) if self.axis == 0 else (rows, self._num_components)
        return flat.view(shape)

    def orient(self, p: Tensor) -> Tensor:
        """[n, K] as a chunk (a view), and back."""
        return p.t() if self.axis == 0 else p

    def spread(self, x: Tensor) -> Tensor:
        """[n] so that it broadcasts against a chunk."""
        return x if self.axis == 0 else x.unsqueeze(-1)


def load(params: Params, space: Workspace) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Weights, their sum [n], means (a view) and 1 / scales of a chunk's parameters [n or 1, K].

    In the workspace's layout, buffers 0 and 1. Weights are not normalised.
    """
    log_w, mean, log_std = (space.orient(p) for p in params)
    weight = torch.exp(log_w, out=space(0, len(params[0])))
    total = weight.sum(space.axis)
    low, high = torch.aminmax(total)
    if not (bool(low > _SAFE_TOTAL[0]) and bool(high < _SAFE_TOTAL[1])):
        # not copy_: transposing two components, a copy is four times slower than an addition
        torch.add(log_w, space.zero, out=weight)
        weight.sub_(weight.amax(space.axis, keepdim=True)).exp_()
        total = weight.sum(space.axis)
    return weight, total, mean, torch.exp(log_std, out=space(1, len(params[2]))).reciprocal_()


def guess_side(a: Tensor, weight: Tensor, buffer: Tensor, space: Workspace) -> Tensor:
    """+1 where the upper tail is (nearly) the smaller one, -1 where the lower is; [n].

    sign(sum_k w_k clamp(a_k, -1, 1)). As |clamp(a, -1, 1) - (1 - 2 Q(a))| < 0.55, the tail that is
    picked never holds more than 0.78 of the mass: 1 - T then loses no precision, and no second erfc
    is due. Overwrites `buffer`.
    """
    balance = torch.clamp(a, -1.0, 1.0, out=buffer).mul_(weight).sum(space.axis)
    return torch.copysign(space.one, balance)


def density_into(a: Tensor, out: Tensor, space: Workspace) -> Tensor:
    """The density of scaled a, without 1 / sqrt(2 pi), in `out`."""
    return torch.addcmul(space.zero, a, a, value=-1.0, out=out).exp_()


def far_rows(size: Tensor) -> Tensor | None:
    """Indices with not size >= `SMALLEST` (NaN included), or None when there are none."""
    limit = SMALLEST[size.dtype]
    if size.numel() == 0 or bool(size.amin() >= limit):
        return None
    return torch.nonzero(~(size >= limit)).squeeze(-1)


def widened(params: Params, rows: Tensor) -> Params:
    """These rows of parameters, in float64."""
    return tuple(p.double() for p in take_rows(params, rows))


# --- maps and gradients


def mixture_cdf(z: Tensor, *params: Tensor) -> tuple[Tensor, Tensor]:
    """u and log_det, [N], as `reference.mixture_cdf` of log_w, mean, log_std."""
    num_components = params[1].shape[-1]
    tail, density, side = (torch.empty_like(z) for _ in range(3))
    space = Workspace(4, num_components, z.dtype)
    axis, spread = space.axis, space.spread
    for rows in cached_chunks(len(z), num_components):
        weight, total, mean, inv_std = load(take_rows(params, rows), space)
        a, other = space(2, len(z[rows])), space(3, len(z[rows]))
        torch.sub(spread(z[rows]), mean, out=a).mul_(inv_std)
        side[rows] = guess_side(a, weight, other, space)
        clamp_(a.mul_(spread(side[rows] * SQRT_HALF)))
        density_into(a, other, space).mul_(weight).mul_(inv_std)
        torch.sum(other, axis, out=density[rows]).div_(total)
        torch.sum(a.erfc_().mul_(weight), axis, out=tail[rows]).div_(total)
    size = torch.minimum(tail.mul_(0.5), density.mul_(INV_SQRT_2PI))
    u = upper_quantile(tail).mul_(side)
    log_det = density.log_().sub_(log_standard_normal(u))
    far = far_rows(size)
    if far is not None:
        path = reference.mixture_cdf if z.dtype == torch.float64 else mixture_cdf
        u[far], log_det[far] = (t.to(z.dtype) for t in path(z[far].double(), *widened(params, far)))
    return u, log_det


def mixture_log_density(z: Tensor, *params: Tensor) -> Tensor:
    """log p, [N], as `reference.mixture_log_density` of log_w, mean, log_std."""
    num_components = params[1].shape[-1]
    density = torch.empty_like(z)
    space = Workspace(3, num_components, z.dtype)
    for rows in cached_chunks(len(z), num_components):
        weight, total, mean, inv_std = load(take_rows(params, rows), space)
        a = torch.sub(space.spread(z[rows]), mean, out=space(2, len(z[rows])))
        clamp_(a.mul_(inv_std).mul_(SQRT_HALF))
        density_into(a, a, space).mul_(weight).mul_(inv_std)
        torch.sum(a, space.axis, out=density[rows]).div_(total)
    far = far_rows(density.mul_(INV_SQRT_2PI))
    log_p = density.log_()
    if far is not None:
        narrow = z.dtype != torch.float64
        path = mixture_log_density if narrow else reference.mixture_log_density
        log_p[far] = path(z[far].double(), *widened(params, far)).to(z.dtype)
    return log_p


def mixture_backward(
    z: Tensor, params: Params, grad_log_p: Tensor, noise: tuple[Tensor, ...] = ()
) -> Gradients:
    """Gradients as `reference.mixture_backward`, shaped like z and the parameters."""
    by_row = z, grad_log_p, *noise
    num_components = params[1].shape[-1]
    out = (torch.empty_like(z), *(torch.zeros(p.shape, dtype=p.dtype) for p in params))
    space = Workspace(7, num_components, z.dtype)
    for rows in cached_chunks(len(z), num_components):
        chunk = tuple(t[rows] for t in by_row)
        chunk_params = take_rows(params, rows)
        grads, size = _gradients(chunk, chunk_params, space)
        far = far_rows(size)
        if far is not None:
            # with parameters of their own, so that gradients come row by row
            own = tuple(p.expand(len(size), -1) for p in chunk_params)
            far_z, far_grad, *far_noise = (t[far].double() for t in chunk)
            path = reference.mixture_backward if z.dtype == torch.float64 else mixture_backward
            wide = path(far_z, widened(own, far), far_grad, tuple(far_noise))
            for g, w in zip(grads, wide, strict=True):
                g[far] = w.to(g.dtype)
        out[0][rows] = grads[0]
        for total, grad in zip(out[1:], grads[1:], strict=True):
            if len(total) == len(z):
                torch.add(space.orient(grad), space.zero, out=space.orient(total[rows]))
            else:  # shared by all rows
                total[0].add_(grad.sum(0))
    return out


def _gradients(rows: Params, params: Params, space: Workspace) -> tuple[Gradients, Tensor]:
    """Gradients of one chunk, [n, K] views of the workspace, and its smallest masses [n]."""
    z, grad_log_p, *noise = rows
    n, axis, spread = len(z), space.axis, space.spread
    weight, total, mean, inv_std = load(params, space)
    weight.div_(spread(total))
    diff = torch.sub(spread(z), mean, out=space(2, n))
    a = torch.mul(diff, inv_std, out=space(3, n))
    of_mean, share = space(4, n), space(5, n)
    side = guess_side(a, weight, share, space) if noise else space.one
    torch.mul(a, inv_std, out=of_mean)
    clamp_(a.mul_(spread(side * SQRT_HALF)))
    density = density_into(a, share, space).mul_(weight).mul_(inv_std).sum(axis)
    share.div_(spread(density))
    of_mean.mul_(spread(grad_log_p))
    size = density * INV_SQRT_2PI
    if noise:
        u, log_det, grad_u = noise
        of_mean.sub_(spread(grad_u * torch.exp(log_det)))
        mass = a.erfc_().mul_(0.5)
        tail = torch.mul(mass, weight, out=space(6, n)).sum(axis)
        size = torch.minimum(tail, size)
        per_mass = grad_u * side * torch.exp(-log_standard_normal(u))
        less = mass.sub_(spread(tail)).mul_(spread(per_mass)).add_(spread(grad_log_p))
    of_mean.mul_(share)
    share.mul_(spread(grad_log_p))
    of_log_std = diff.mul_(of_mean).sub_(share)
    of_log_w = share.sub_(weight.mul_(less if noise else spread(grad_log_p)))
    of_params = (space.orient(g) for g in (of_log_w, of_mean, of_log_std))
    return (-of_mean.sum(axis), *of_params), size
