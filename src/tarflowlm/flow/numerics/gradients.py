r"""Closed-form pullback of (u, log p) to z and the mixture parameters.

With r_k = w_k N_k(z) / p (responsibilities), t_k the k-th component's mass beyond z on the smaller side sigma = +-1,
T = sum_k w_k t_k, cotangents g_u of u and g_p of log p, and H = g_u du/dz:

    mean_k     r_k (g_p psi_k / s_k - H)
    log_std_k  (z - m_k) * (the line above) - g_p r_k
    log_w_k    g_p (r_k - w_k) + sigma g_u w_k (T - t_k) / b(u)
    z          - sum_k mean_k                         (u and p do not change when z and all m_k move together)

T and t_k belong to one tail, so nothing cancels in the far tails.
"""

from functools import partial
from typing import cast

import torch
from torch import Tensor

from tarflowlm.flow.numerics import linear
from tarflowlm.flow.numerics.families import Family
from tarflowlm.flow.numerics.layout import chunk_rows, row_chunks, take_rows, use_eager_cpu
from tarflowlm.flow.numerics.pullback import pull

Grads = tuple[Tensor, Tensor, Tensor, Tensor]


def pullback(
    z: Tensor,
    params: tuple[Tensor, ...],
    u: Tensor,
    log_det: Tensor,
    grad_u: Tensor,
    grad_log_p: Tensor,
    f: Family,
    base: Family,
) -> Grads:
    """Gradients of (z, log_w, mean, log_std), shaped like them; rows [N], parameters [N or 1, K]."""
    compute = partial(_pull, f=f, base=base)
    return cast(Grads, pull(compute, 5, z, u, log_det, grad_u, grad_log_p, *params))


def _pull(*tensors: Tensor, f: Family, base: Family) -> Grads:
    rows, params = tensors[:5], tensors[5:]
    if not use_eager_cpu(rows[0]):
        grads = _log_space_rows(rows, params, f, base)
        of_log_w, of_mean, of_log_std = (_reduce_like(g, p) for g, p in zip(grads[1:], params, strict=True))
        return grads[0], of_log_w, of_mean, of_log_std
    log_w, mean, log_std = (torch.zeros(p.shape, dtype=p.dtype) for p in params)
    out = (torch.empty_like(rows[0]), log_w, mean, log_std)
    _accumulate(rows, params, out, f, base)
    return out


def _reduce_like(grad: Tensor, p: Tensor) -> Tensor:
    return grad if p.shape[0] == grad.shape[0] else grad.sum(0, keepdim=True)


def _accumulate(rows: tuple[Tensor, ...], params: tuple[Tensor, ...], out: Grads, f: Family, base: Family) -> None:
    """Writes the gradients of all rows into `out`: linear space first, the far rows again in wider formats."""
    z = rows[0]
    limit = linear.SMALLEST[z.dtype]
    space = linear.Workspace(7, params[1].shape[-1], chunk_rows(params[1].shape[-1]), z.dtype)
    for part in row_chunks(z.shape[0], params[1].shape[-1]):
        part_rows = tuple(t[part] for t in rows)
        part_params = tuple(take_rows(p, part) for p in params)
        grads, size = _linear_rows(part_rows, part_params, f, base, space)
        if not bool(size.amin() >= limit):
            far = torch.nonzero(~(size >= limit)).squeeze(-1)
            wider = _far_rows(
                tuple(t[far] for t in part_rows), tuple(take_rows(p, far) for p in part_params), f, base
            )
            grads[0][far] = wider[0]
            for g, w in zip(grads[1:], wider[1:], strict=True):
                g[far] = w
        out[0][part] = grads[0]
        for total, p, g in zip(out[1:], params, grads[1:], strict=True):
            if p.shape[0] == z.shape[0]:
                torch.add(space.orient(g), space.zero, out=space.orient(total[part]))
            else:
                total[0].add_(g.sum(0))


def _far_rows(rows: tuple[Tensor, ...], params: tuple[Tensor, ...], f: Family, base: Family) -> Grads:
    dtype = rows[0].dtype
    if dtype == torch.float64:
        return _log_space_rows(rows, params, f, base)
    rows = tuple(t.double() for t in rows)
    params = tuple(p.double() for p in params)
    space = linear.Workspace(7, params[1].shape[-1], rows[0].shape[0], torch.float64)
    grads, size = _linear_rows(rows, params, f, base, space)
    far = torch.nonzero(~(size >= linear.SMALLEST[torch.float64])).squeeze(-1)
    if far.numel():
        wider = _log_space_rows(tuple(t[far] for t in rows), tuple(take_rows(p, far) for p in params), f, base)
        for g, w in zip(grads, wider, strict=True):
            g[far] = w
    return tuple(g.to(dtype) for g in grads)  # type: ignore[return-value]


def _linear_rows(
    rows: tuple[Tensor, ...], params: tuple[Tensor, ...], f: Family, base: Family, space: linear.Workspace
) -> tuple[Grads, Tensor]:
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
    torch.mul(a if f.name == "normal" else f.score(a), c.inv_std, out=of_mean)
    linear.clamp_in_place(a.mul_(spread(side * linear.unit(f))), f)
    linear.density_into(a, f, share, space).mul_(weight).mul_(c.inv_std)
    density = share.sum(axis)
    share.div_(spread(density))
    of_mean.mul_(spread(grad_log_p)).sub_(spread(grad_u * torch.exp(log_det))).mul_(share)
    share.mul_(spread(grad_log_p))
    of_scale = diff.mul_(of_mean).sub_(share)
    mass = linear.tail_in_place(a, f).mul_(linear.tail_scale(f))
    tail = torch.mul(mass, weight, out=space(6, n)).sum(axis)
    pull = grad_u * side * torch.exp(-base.log_pdf(u))
    mass.sub_(spread(tail)).mul_(spread(pull)).add_(spread(grad_log_p)).mul_(weight)
    of_weight = share.sub_(mass)
    size = torch.minimum(tail, density * linear.density_scale(f))
    grads = -of_mean.sum(axis), space.orient(of_weight), space.orient(of_mean), space.orient(of_scale)
    return grads, size


def _log_space_rows(rows: tuple[Tensor, ...], params: tuple[Tensor, ...], f: Family, base: Family) -> Grads:
    """Gradients with parameters as [N, K]; any range, no branch on data."""
    z, u, log_det, grad_u, grad_log_p = (t[:, None] for t in rows)
    log_w, mean, log_std = params
    log_w = torch.log_softmax(log_w, -1)
    diff, inv_std = z - mean, torch.exp(-log_std)
    a = diff * inv_std
    share = torch.softmax(log_w + f.log_pdf(a) - log_std, -1)
    upper = torch.logsumexp(log_w + f.log_tail(a), -1, keepdim=True)
    lower = torch.logsumexp(log_w + f.log_tail(-a), -1, keepdim=True)
    side = torch.where(lower < upper, -1.0, 1.0).to(z.dtype)
    log_base = base.log_pdf(u)
    tail_ratio = torch.exp(torch.minimum(lower, upper) - log_base)
    mass_ratio = torch.exp(log_w + f.log_tail(side * a) - log_base)
    of_mean = share * (grad_log_p * f.score(a) * inv_std - grad_u * torch.exp(log_det))
    of_scale = diff * of_mean - grad_log_p * share
    weight = torch.exp(log_w)
    of_weight = grad_log_p * (share - weight) + side * grad_u * (weight * tail_ratio - mass_ratio)
    return -of_mean.sum(-1), of_weight, of_mean, of_scale
