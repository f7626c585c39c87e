"""The Mix-d map and its inverse, chunk by chunk, in linear space where that is exact.

N rows, n of them in a chunk, K components, d channels. z, u [N, d]; log_w [N, K]; mean [K, d]; log_std [K].
"""

import math

import torch
from torch import Tensor

from tarflowlm.flow.numerics.cpu import handful, linear
from tarflowlm.flow.numerics.cpu.inverse import mixture_cdf_inverse
from tarflowlm.flow.numerics.cpu.linear import SMALLEST, TAIL_SCALE, UNIT, Workspace, rows_below
from tarflowlm.flow.numerics.cpu.mixture import mixture_cdf, quantile
from tarflowlm.flow.numerics.layout import LOWEST_EXPONENT, row_chunks
from tarflowlm.flow.numerics.normal import HALF_LOG_2PI, log_standard_normal_vectors, upper_tail
from tarflowlm.flow.numerics.reference import bayes_update, bayes_update_

_WIDE = 64
"""Components from which the untransposed layout is the faster one. It is more than for scalar mixtures
(`linear.Workspace`), because the weights are transposed once for all channels (measured: equal at 64)."""

_NEARLY_CERTAIN, _FEW_ROWS = -1e-5, 64
"""Log posterior of a component from which certainty is looked into: when half the rows have reached it, or, where
rows are few and calls are all that costs, every one of them."""


def rosenblatt(z: Tensor, log_w: Tensor, mean: Tensor, log_std: Tensor) -> tuple[Tensor, Tensor]:
    """u [N, d] and log_det [N], as `reference.rosenblatt`."""
    u = torch.empty(z.shape, dtype=z.dtype, device=z.device)
    log_p = torch.empty_like(z[:, 0])
    num_components = mean.shape[0]
    space = Workspace(4, num_components, z.dtype)
    if num_components < _WIDE:
        space.axis = 0
    for rows in row_chunks(z.shape[0], num_components):
        log_p[rows] = _chunk(z[rows], log_w[rows], mean, log_std, space, u[rows])
    return u, log_p - log_standard_normal_vectors(u)


def _chunk(z: Tensor, log_w: Tensor, mean: Tensor, log_std: Tensor, space: Workspace, u: Tensor) -> Tensor:
    """Fills u [n, d] of one chunk and returns log p_mix [n]; buffers: 0 log alpha, 1 alpha, 2 a, 3 scratch.

    log alpha is shifted by its maximum at every channel, so nothing underflows, and not normalised: what the last
    weights sum to is log p_mix. The quantiles of all channels are taken at once, after the recursion.
    """
    n, axis, spread = z.shape[0], space.axis, space.spread
    lowest, eps = LOWEST_EXPONENT[z.dtype], torch.finfo(z.dtype).eps
    # beside a smaller tail the mass that the floor adds to the other components would show
    smallest = max(SMALLEST[z.dtype], math.exp(lowest) * mean.shape[0] / eps)
    log_alpha, alpha = torch.add(space.orient(log_w), space.zero, out=space(0, n)), space(1, n)
    a, scratch = space(2, n), space(3, n)
    inv_std = space.orient(torch.exp(-log_std)[None])
    log_normaliser = space.orient(log_std[None] + HALF_LOG_2PI)

    def exponentiate() -> tuple[Tensor, Tensor]:
        top = log_alpha.amax(axis, keepdim=True)
        log_alpha.sub_(top)
        return torch.clamp(log_alpha, min=lowest, out=alpha).exp_().sum(axis), top.squeeze(axis)

    tail, side = (torch.empty(z.shape[1], n, dtype=z.dtype) for _ in range(2))
    far_values: list[tuple[int, Tensor, Tensor]] = []
    total, _ = exponentiate()
    log_p = -torch.log(total)
    for i in range(z.shape[1]):
        torch.sub(spread(z[:, i]), space.orient(mean[None, :, i]), out=a).mul_(inv_std)
        side[i] = linear.guess_side(a, alpha, scratch, space)
        torch.mul(a, spread(side[i] * UNIT), out=scratch)
        mass = linear.tail_(linear.clamp_(scratch)).mul_(alpha)
        torch.sum(mass, axis, out=tail[i]).mul_(TAIL_SCALE).div_(total)
        far = rows_below(tail[i], smallest)
        if far is not None:
            wide = (space.orient(log_alpha)[far], mean[None, :, i], log_std[None])
            found = mixture_cdf(z[far, i].double(), *(p.double() for p in wide))[0]
            far_values.append((i, far, found.to(z.dtype)))
        bayes_update_(log_alpha, a, log_normaliser)
        total, top = exponentiate()
        log_p.add_(top)
    u.copy_(quantile(tail.flatten(), side.flatten()).view_as(tail).T)
    for i, far, values in far_values:
        u[far, i] = values
    return log_p.add_(torch.log(total))


def rosenblatt_inverse(u: Tensor, log_w: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """z [N, d], as `reference.rosenblatt_inverse`."""
    if not handful.is_handful(u.shape[0], mean.shape[0]):
        return _inverse(u, log_w, mean, log_std)
    z, left = handful.rosenblatt_inverse(u, log_w, mean, log_std)
    if left:
        z[left] = _inverse(u[left], log_w[left], mean, log_std)
    return z


def _inverse(u: Tensor, log_w: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """z [N, d] in chunks; rows whose component is certain early skip the search."""
    z = torch.empty_like(u)
    for rows in row_chunks(u.shape[0], mean.shape[0]):
        z[rows] = _inverse_chunk(u[rows], log_w[rows], mean[None], log_std[None])
    return z


def _inverse_chunk(u: Tensor, log_alpha: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """z [n, d] for mean [1, K, d], log_std [1, K]."""
    z, open_rows, inv_std = torch.empty_like(u), torch.arange(len(u)), torch.exp(-log_std)
    for i in range(u.shape[-1]):
        center = mean[..., i]
        z_i = mixture_cdf_inverse(u[:, i], log_alpha, center, log_std)
        z[open_rows, i] = z_i
        if i + 1 == u.shape[-1]:
            break
        a = (z_i[:, None] - center) * inv_std
        log_alpha = torch.log_softmax(bayes_update(log_alpha, a, log_std), -1)
        enough = len(u) if len(u) <= _FEW_ROWS else len(u) // 2
        if (log_alpha.amax(-1) > _NEARLY_CERTAIN).sum() < enough:
            continue
        rest, certain = _from_one_component(u[:, i + 1 :], log_alpha, mean[..., i + 1 :], log_std)
        done = certain.nonzero().squeeze(-1)
        z[open_rows[done], i + 1 :] = rest[done]
        if len(done) == len(u):
            break
        kept = (~certain).nonzero().squeeze(-1)
        open_rows, u, log_alpha = open_rows[kept], u[kept], log_alpha[kept]
    return z


def _from_one_component(u: Tensor, log_alpha: Tensor, mean: Tensor, log_std: Tensor) -> tuple[Tensor, Tensor]:
    """The channels [n, r] if the most probable component k were the only one, and which rows [n] may take them.

    z = mu_k + s_k u then. With e_i the posterior mass of all other components before channel i, given these z, the
    mixture's CDF differs from Phi(u_i) by at most e_i. Where that is below half an ulp of the smaller tail of u_i,
    in every channel, the search could not find anything better.
    """
    best = log_alpha.argmax(-1, keepdim=True)
    std = torch.exp(log_std).expand_as(log_alpha).gather(-1, best)
    index = best.unsqueeze(-1).expand(-1, 1, u.shape[-1])
    z = mean.expand(len(u), -1, -1).gather(1, index).squeeze(1) + std * u
    a = (z[:, None] - mean) * torch.exp(-log_std).unsqueeze(-1)
    evidence = torch.addcmul(-log_std.unsqueeze(-1), a, a, value=-0.5).cumsum(-1)
    log_odds = log_alpha.unsqueeze(-1).repeat(1, 1, u.shape[-1])
    log_odds[..., 1:] += evidence[..., :-1]
    log_odds -= log_odds.gather(1, index)
    others = log_odds.scatter_(1, index, -torch.inf).exp_().sum(1)
    float_ = torch.finfo(u.dtype)
    limit = float_.eps / 4 * upper_tail(u.abs())
    # where e_i may have underflowed, nothing is known about it
    return z, ((others <= limit) & (limit > float_.tiny / float_.eps)).all(-1)
