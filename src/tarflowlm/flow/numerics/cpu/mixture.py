"""Mixture CDF and log-density of scalar mixtures, and their gradients, chunk by chunk.

N rows, n of them in a chunk, K components. z, u [N]; log_w, mean, log_std [N or 1, K]. Rows that linear space cannot
hold (see `linear.SMALLEST`) are repeated in float64, and beyond its range by `reference`.
"""

import math

import torch
from torch import Tensor

from tarflowlm.flow.numerics import reference
from tarflowlm.flow.numerics.cpu import linear
from tarflowlm.flow.numerics.cpu.linear import DENSITY_SCALE, SMALLEST, TAIL_SCALE, UNIT, Workspace, rows_below
from tarflowlm.flow.numerics.layout import LOWEST_EXPONENT, row_chunks, take_rows
from tarflowlm.flow.numerics.normal import HALF_LOG_2PI, log_standard_normal, upper_quantile
from tarflowlm.flow.numerics.reference import Gradients

_ERFINV_LIMIT = 0.02

Params = tuple[Tensor, ...]
"""log_w, mean, log_std."""


def mixture_cdf(z: Tensor, log_w: Tensor, mean: Tensor, log_std: Tensor) -> tuple[Tensor, Tensor]:
    """u and log_det, [N], as `reference.mixture_cdf`."""
    params = (log_w, mean, log_std)
    tail, density, side = (torch.empty_like(z) for _ in range(3))
    space = Workspace(4, mean.shape[-1], z.dtype)
    for rows in row_chunks(z.shape[0], mean.shape[-1]):
        chunk = _take(params, rows)
        _smaller_tail_and_density(z[rows], chunk, space, tail[rows], density[rows], side[rows])
    tail.mul_(TAIL_SCALE)
    density.mul_(DENSITY_SCALE)
    size = torch.minimum(tail, density)
    u = quantile(tail, side)
    log_det = density.log_().sub_(log_standard_normal(u))
    far = rows_below(size, SMALLEST[z.dtype])
    if far is not None:
        u[far], log_det[far] = _mixture_cdf_far(z[far], *_take(params, far))
    return u, log_det


def _smaller_tail_and_density(
    z: Tensor, params: Params, space: Workspace, tail: Tensor, density: Tensor, side: Tensor
) -> None:
    """Mass beyond z on the smaller side, density at z, and that side (+1 upper, -1 lower), into the last three, [n].

    Mass and density still lack TAIL_SCALE and DENSITY_SCALE. Uses buffers 0 to 3.
    """
    log_w, mean, log_std = params
    c = linear.load(log_w, mean, log_std, space)
    rows = z.shape[0]
    a, other = space(2, rows), space(3, rows)
    torch.sub(space.spread(z), c.mean, out=a).mul_(c.inv_std)
    side.copy_(linear.guess_side(a, c.weight, other, space))
    linear.clamp_(a.mul_(space.spread(side * UNIT)))
    linear.density_into(a, other, space).mul_(c.weight).mul_(c.inv_std)
    torch.sum(other, space.axis, out=density).div_(c.total)
    torch.sum(linear.tail_(a).mul_(c.weight), space.axis, out=tail).div_(c.total)


def quantile(tail: Tensor, side: Tensor) -> Tensor:
    """u with mass `tail` beyond it on `side`, [N].

    erfinv is 20 times cheaper than ndtri on a CPU, but 1 - 2 T only keeps what T is worth for T > 0.02; the few
    rows beyond get Halley's method on Q(x) = T.
    """
    u = torch.erfinv(1.0 - 2.0 * tail).mul_(math.sqrt(2.0))
    small = torch.nonzero(tail < _ERFINV_LIMIT).squeeze(-1)
    if small.numel():
        u[small] = upper_quantile(tail[small])
    return u.mul_(side)


def _mixture_cdf_far(z: Tensor, log_w: Tensor, mean: Tensor, log_std: Tensor) -> tuple[Tensor, Tensor]:
    if z.dtype == torch.float64:
        chunks = row_chunks(z.shape[0], mean.shape[-1])
        parts = [reference.mixture_cdf(z[r], *_take((log_w, mean, log_std), r)) for r in chunks]
        return torch.cat([u for u, _ in parts]), torch.cat([log_det for _, log_det in parts])
    u, log_det = mixture_cdf(z.double(), log_w.double(), mean.double(), log_std.double())
    return u.to(z.dtype), log_det.to(z.dtype)


def mixture_cdf_backward(
    z: Tensor, params: Params, u: Tensor, log_det: Tensor, grad_u: Tensor, grad_log_p: Tensor
) -> tuple[Tensor, ...]:
    """Gradients of z, log_w, mean, log_std, shaped like them; formulas in `reference.mixture_cdf_backward`."""
    rows = (z, u, log_det, grad_u, grad_log_p)
    out = (torch.empty_like(z), *(torch.zeros(p.shape, dtype=p.dtype) for p in params))
    limit, num_components = SMALLEST[z.dtype], params[1].shape[-1]
    space = Workspace(7, num_components, z.dtype)
    for part in row_chunks(z.shape[0], num_components):
        part_rows, part_params = tuple(t[part] for t in rows), _take(params, part)
        grads, size = _cdf_gradients(part_rows, part_params, space)
        far = rows_below(size, limit)
        if far is not None:
            _replace_rows(grads, far, _cdf_gradients_far(tuple(t[far] for t in part_rows), _take(part_params, far)))
        out[0][part] = grads[0]
        for total, g in zip(out[1:], grads[1:], strict=True):
            _add_rows(total, part, space.orient(g), z.shape[0], space)
    return out


def _cdf_gradients_far(rows: Params, params: Params) -> Gradients:
    dtype = rows[0].dtype
    if dtype == torch.float64:
        return _reference_gradients(rows, params)
    rows, params = tuple(t.double() for t in rows), tuple(p.double() for p in params)
    space = Workspace(7, params[1].shape[-1], torch.float64, rows=rows[0].shape[0])
    grads, size = _cdf_gradients(rows, params, space)
    far = rows_below(size, SMALLEST[torch.float64])
    if far is not None:
        _replace_rows(grads, far, _reference_gradients(tuple(t[far] for t in rows), _take(params, far)))
    return tuple(g.to(dtype) for g in grads)  # type: ignore[return-value]


def _reference_gradients(rows: Params, params: Params) -> Gradients:
    z, u, log_det, grad_u, grad_log_p = rows
    return reference.mixture_cdf_backward(z, params, u, log_det, grad_u, grad_log_p)


def _cdf_gradients(rows: Params, params: Params, space: Workspace) -> tuple[Gradients, Tensor]:
    """Gradients (parameters as [n, K] views of the workspace), and the smaller of tail mass and density, [n]."""
    z, u, log_det, grad_u, grad_log_p = rows
    n, axis, spread = z.shape[0], space.axis, space.spread
    log_w, mean, log_std = params
    c = linear.load(log_w, mean, log_std, space)
    weight = c.weight.div_(spread(c.total))
    diff = torch.sub(spread(z), c.mean, out=space(2, n))
    a = torch.mul(diff, c.inv_std, out=space(3, n))
    of_mean, share = space(4, n), space(5, n)
    side = linear.guess_side(a, weight, share, space)
    torch.mul(a, c.inv_std, out=of_mean)
    linear.clamp_(a.mul_(spread(side * UNIT)))
    linear.density_into(a, share, space).mul_(weight).mul_(c.inv_std)
    density = share.sum(axis)
    share.div_(spread(density))
    of_mean.mul_(spread(grad_log_p)).sub_(spread(grad_u * torch.exp(log_det))).mul_(share)
    share.mul_(spread(grad_log_p))
    of_log_std = diff.mul_(of_mean).sub_(share)
    mass = linear.tail_(a).mul_(TAIL_SCALE)
    tail = torch.mul(mass, weight, out=space(6, n)).sum(axis)
    per_mass = grad_u * side * torch.exp(-log_standard_normal(u))
    mass.sub_(spread(tail)).mul_(spread(per_mass)).add_(spread(grad_log_p)).mul_(weight)
    of_log_w = share.sub_(mass)
    size = torch.minimum(tail, density * DENSITY_SCALE)
    grads = -of_mean.sum(axis), space.orient(of_log_w), space.orient(of_mean), space.orient(of_log_std)
    return grads, size


class _Shares:
    """What the density of one chunk is made of: w_k, a_k, 1 / s_k and responsibilities r_k, in the layout of `space`.

    Weights and shares are shifted by their maxima, so the density has no far rows.
    """

    def __init__(self, z: Tensor, params: Params, space: Workspace) -> None:
        log_w, mean, log_std = (space.orient(p) for p in params)
        n, axis, lowest = z.shape[0], space.axis, LOWEST_EXPONENT[z.dtype]
        log_w = torch.add(log_w, space.zero, out=space(4, params[0].shape[0]))
        log_w.sub_(log_w.amax(axis, keepdim=True))
        self.weight = torch.clamp(log_w, min=lowest, out=space(0, params[0].shape[0])).exp_()
        self.total = self.weight.sum(axis)
        self.inv_std = torch.exp(log_std, out=space(1, params[2].shape[0])).reciprocal_()
        self.a = torch.sub(space.spread(z), mean, out=space(2, n)).mul_(self.inv_std)
        self.share = torch.addcmul(space.zero, self.a, self.a, value=-0.5, out=space(3, n))
        self.share.add_(log_w).sub_(log_std)
        top = self.share.amax(axis, keepdim=True)
        self.share.sub_(top).clamp_(min=lowest).exp_()
        self.share_total = self.share.sum(axis)
        self.log_density = torch.log(self.share_total / self.total) + top.squeeze(axis) - HALF_LOG_2PI


def mixture_log_density(z: Tensor, log_w: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """log p, [N], as `reference.mixture_log_density`."""
    out = torch.empty_like(z)
    space = Workspace(5, mean.shape[-1], z.dtype)
    for rows in row_chunks(z.shape[0], mean.shape[-1]):
        out[rows] = _Shares(z[rows], _take((log_w, mean, log_std), rows), space).log_density
    return out


def mixture_log_density_backward(z: Tensor, params: Params, grad: Tensor) -> tuple[Tensor, ...]:
    """Gradients of z, log_w, mean, log_std, shaped like them; formulas in `reference.mixture_cdf_backward`."""
    out = (torch.empty_like(z), *(torch.zeros_like(p) for p in params))
    num_components = params[1].shape[-1]
    space = Workspace(6, num_components, z.dtype)
    for rows in row_chunks(z.shape[0], num_components):
        s = _Shares(z[rows], _take(params, rows), space)
        g, n = grad[rows], z[rows].shape[0]
        share = s.share.mul_(space.spread(g / s.share_total))
        of_log_std = torch.mul(s.a, share, out=space(5, n))
        of_mean = of_log_std * s.inv_std
        of_log_std.mul_(s.a).sub_(share)
        of_log_w = share.sub_(s.weight * space.spread(g / s.total))
        out[0][rows] = -of_mean.sum(space.axis)
        for total, part in zip(out[1:], (of_log_w, of_mean, of_log_std), strict=True):
            _add_rows(total, rows, part, z.shape[0], space)
    return out


def _take(params: Params, rows: slice | Tensor) -> Params:
    return tuple(take_rows(p, rows) for p in params)


def _replace_rows(grads: Gradients, rows: Tensor, wider: Gradients) -> None:
    for g, w in zip(grads, wider, strict=True):
        g[rows] = w


def _add_rows(total: Tensor, rows: slice, grad: Tensor, num_rows: int, space: Workspace) -> None:
    """A chunk's gradient of a parameter into its `rows`, or summed into the one row [1, K] that all rows share."""
    if total.shape[0] == num_rows:
        torch.add(grad, space.zero, out=space.orient(total[rows]))
    else:
        total[0].add_(space.orient(grad).sum(0))
