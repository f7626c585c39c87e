"""Log density of scalar mixtures: all that the last flow block needs of a mixture-CDF coupling."""

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from tarflowlm.flow.numerics import linear
from tarflowlm.flow.numerics.families import Family, Kind, family
from tarflowlm.flow.numerics.layout import (
    LOWEST_EXPONENT,
    chunk_rows,
    flatten,
    merge_batch,
    row_chunks,
    take_rows,
    use_eager_cpu,
)
from tarflowlm.flow.numerics.pullback import pull


class _Shares:
    """One chunk: responsibilities r_k, weights w_k, a_k and 1 / s_k, in the layout of `space`."""

    def __init__(self, z: Tensor, params: tuple[Tensor, ...], f: Family, space: linear.Workspace) -> None:
        log_w, mean, log_std = (space.orient(p) for p in params)
        n, axis = z.shape[0], space.axis
        log_w = torch.add(log_w, space.zero, out=space(4, params[0].shape[0]))
        top = log_w.amax(axis, keepdim=True)
        log_w.sub_(top)
        weight = torch.clamp(log_w, min=LOWEST_EXPONENT[z.dtype], out=space(0, params[0].shape[0])).exp_()
        total = weight.sum(axis)
        self.inv_std = torch.exp(log_std, out=space(1, params[2].shape[0])).reciprocal_()
        self.a = torch.sub(space.spread(z), mean, out=space(2, n)).mul_(self.inv_std)
        share = space(3, n)
        if f.name == "normal":
            torch.addcmul(space.zero, self.a, self.a, value=-0.5, out=share)
        else:
            share.copy_(f.log_pdf(self.a))
        share.add_(log_w).sub_(log_std)
        share_top = share.amax(axis, keepdim=True)
        share.sub_(share_top).clamp_(min=LOWEST_EXPONENT[z.dtype]).exp_()
        self.share_total = share.sum(axis)
        self.weight, self.total, self.share = weight, total, share
        self.log_density = torch.log(self.share_total / total) + share_top.squeeze(axis)
        if f.name == "normal":
            self.log_density += f.log_pdf(space.zero)


def evaluate(z: Tensor, log_w: Tensor, mean: Tensor, log_std: Tensor, f: Family) -> Tensor:
    """log p, [N], for z [N] and parameters [N or 1, K]; no autograd."""
    if not use_eager_cpu(z):
        log_w = torch.log_softmax(log_w, -1)
        return torch.logsumexp(log_w + f.log_pdf((z[:, None] - mean) * torch.exp(-log_std)) - log_std, -1)
    out = torch.empty_like(z)
    space = linear.Workspace(5, mean.shape[-1], chunk_rows(mean.shape[-1]), z.dtype)
    for rows in row_chunks(z.shape[0], mean.shape[-1]):
        params = tuple(take_rows(p, rows) for p in (log_w, mean, log_std))
        out[rows] = _Shares(z[rows], params, f, space).log_density
    return out


def _pull_chunks(z: Tensor, params: tuple[Tensor, ...], grad: Tensor, f: Family) -> tuple[Tensor, ...]:
    """Gradients: mean r psi / s, log_std r (a psi - 1), log_w r - w, z minus the mean's sum."""
    out = (torch.empty_like(z), *(torch.zeros_like(p) for p in params))
    num_components = params[1].shape[-1]
    space = linear.Workspace(6, num_components, chunk_rows(num_components), z.dtype)
    for rows in row_chunks(z.shape[0], num_components):
        s = _Shares(z[rows], tuple(take_rows(p, rows) for p in params), f, space)
        g, n = grad[rows], z[rows].shape[0]
        share = s.share.mul_(space.spread(g / s.share_total))
        of_scale = torch.mul(s.a if f.name == "normal" else f.score(s.a), share, out=space(5, n))
        of_mean = of_scale * s.inv_std
        of_scale.mul_(s.a).sub_(share)
        of_weight = share.sub_(s.weight * space.spread(g / s.total))
        out[0][rows] = -of_mean.sum(space.axis)
        for total, p, part in zip(out[1:], params, (of_weight, of_mean, of_scale), strict=True):
            if p.shape[0] == z.shape[0]:
                torch.add(part, space.zero, out=space.orient(total[rows]))
            else:
                total[0].add_(space.orient(part).sum(0))
    return out


def _pull_functional(z: Tensor, params: tuple[Tensor, ...], grad: Tensor, f: Family) -> tuple[Tensor, ...]:
    log_w, mean, log_std = params
    inv_std = torch.exp(-log_std)
    a = (z[:, None] - mean) * inv_std
    share = grad[:, None] * torch.softmax(torch.log_softmax(log_w, -1) + f.log_pdf(a) - log_std, -1)
    of_scale = share * f.score(a)
    of_mean = of_scale * inv_std
    grads = (share - grad[:, None] * torch.softmax(log_w, -1), of_mean, of_scale * a - share)
    shaped = (g if p.shape[0] == g.shape[0] else g.sum(0, keepdim=True) for g, p in zip(grads, params, strict=True))
    return -of_mean.sum(-1), *shaped


def _pull(z: Tensor, grad: Tensor, *params: Tensor, f: Family) -> tuple[Tensor, ...]:
    return (_pull_chunks if use_eager_cpu(z) else _pull_functional)(z, params, grad, f)


class _MixtureLogDensity(Function):
    @staticmethod
    def forward(z: Tensor, log_w: Tensor, mean: Tensor, log_std: Tensor, kind: Kind) -> Tensor:
        return evaluate(z, log_w, mean, log_std, family(kind))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.kind = inputs[4]
        ctx.save_for_backward(*inputs[:4])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        z, *params = ctx.saved_tensors
        return *pull(partial(_pull, f=family(ctx.kind)), 2, z, grad, *params), None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Tensor, int]:
        flat = merge_batch(info.batch_size, in_dims[:4], args[:4])
        return _MixtureLogDensity.apply(*flat, args[4]).view(info.batch_size, -1), 0


def mixture_log_density(z: Tensor, log_w: Tensor, mean: Tensor, log_std: Tensor, *, kind: Kind = "normal") -> Tensor:
    r"""log p(z) = log sum_k w_k c((z - m_k) / s_k) / s_k of scalar mixtures, elementwise, w = softmax(log_w).

    Shapes: z [...]; log_w (unnormalised), mean, log_std [..., K], broadcast against z; returns [...], nats. Float32
    or float64, any range; equals log_det + log b(u) of `mixture_cdf` without the cost of u. First derivatives only.
    Errors: ValueError for mixed dtypes, differing K or an unknown family.
    """
    shape, flat_z, params = flatten(z, log_w, mean, log_std)
    family(kind)
    return _MixtureLogDensity.apply(flat_z, *params, kind).view(shape)
