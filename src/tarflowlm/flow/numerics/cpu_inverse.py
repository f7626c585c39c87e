r"""Inverse of the mixture CDF on a CPU: a fixed number of steps inside an exact bracket.

Bisection shrinks the bracket of docs/math.md, eq. 20, to the scale of the narrowest component. Then
Newton steps finish. All is mirrored to u >= 0 as in `reference`. A handful of mixtures, as in
sampling one position at a time, go another way first: `cpu_few_rows`.
"""

import math

import torch
from torch import Tensor

from tarflowlm.flow.numerics import cpu_few_rows, reference
from tarflowlm.flow.numerics.cpu_forward import Workspace, density_into, far_rows, load, widened
from tarflowlm.flow.numerics.layout import cached_chunks, take_rows
from tarflowlm.flow.numerics.normal import (
    INV_SQRT_2PI,
    SQRT_HALF,
    clamp_,
    upper_quantile,
    upper_tail,
)
from tarflowlm.flow.numerics.reference import (
    BISECTIONS,
    NEWTON_STEPS,
    Params,
    bayes_update,
    or_middle,
    rounding,
)

_SAFE_CELL = 8
"""Newton's steps may start in a bracket of 2^-8 of the narrowest scale."""
_NEARLY_CERTAIN = -1e-5
"""Log posterior of a component from which certainty is looked into."""
_FEW_ROWS = 64
"""Certainty is looked into when half the rows have reached it; up to so few, when all have."""


# --- scalar mixtures


def mixture_cdf_inverse(u: Tensor, *params: Tensor) -> Tensor:
    """z [N], as `reference.mixture_cdf_inverse` of log_w, mean, log_std."""
    # measured: up to some 200 rows of 27 components the other way is faster
    if len(u) * (params[1].shape[-1] + 8) > 6000:
        return by_bisection(u, *params)
    z, left = cpu_few_rows.mixture_cdf_inverse(u, *params)
    if left:
        z[left] = by_bisection(u[left], *take_rows(params, left))
    return z


def by_bisection(u: Tensor, *params: Tensor) -> Tensor:
    """`mixture_cdf_inverse` for any number of rows."""
    num_components = params[1].shape[-1]
    z = torch.empty_like(u)
    space = Workspace(5, num_components, u.dtype)
    for rows in cached_chunks(len(u), num_components):
        z[rows] = _solve(u[rows], take_rows(params, rows), space)
    far = far_rows(upper_tail(u.abs()))
    if far is not None:
        path = reference.mixture_cdf_inverse if u.dtype == torch.float64 else by_bisection
        z[far] = path(u[far].double(), *widened(params, far)).to(u.dtype)
    return z


def _solve(u: Tensor, params: Params, space: Workspace) -> Tensor:
    """z [n] of one chunk."""
    n, axis, spread = u.shape[0], space.axis, space.spread
    weight, total, mean, inv_std = load(params, space)
    a, other = space(2, n), space(3, n)
    side = torch.copysign(space.one, u)
    y = u.abs()
    tail = upper_tail(y)
    center = torch.mul(mean, spread(side), out=space(4, n))
    torch.div(spread(y), inv_std, out=a).add_(center)
    low, high = a.amin(axis), a.amax(axis)
    # brackets over the narrowest scale, halved until Newton's steps are safe; NaN takes all steps
    widest = float(((high - low) * inv_std.amax(axis)).amax())
    bisections = BISECTIONS[u.dtype]
    if widest < 2.0 ** (bisections - _SAFE_CELL):
        bisections = max(0, math.ceil(math.log2(max(widest, 1e-9))) + _SAFE_CELL)
    inv_std.mul_(SQRT_HALF)
    wanted = 2.0 * tail * total
    above = torch.empty_like(u)

    for _ in range(bisections):
        x = torch.lerp(low, high, 0.5)
        clamp_(torch.sub(spread(x), center, out=a).mul_(inv_std))
        mass = a.erfc_().mul_(weight).sum(axis)
        torch.gt(mass, wanted, out=above)
        low, high = torch.lerp(low, x, above), torch.lerp(x, high, above)
    slack = rounding(low, high)
    x = torch.lerp(low, high, 0.5)
    for _ in range(NEWTON_STEPS[u.dtype]):
        clamp_(torch.sub(spread(x), center, out=a).mul_(inv_std))
        density = density_into(a, other, space).mul_(weight).mul_(inv_std).sum(axis)
        mass = a.erfc_().mul_(weight).sum(axis)
        here = upper_quantile(mass.div_(total).mul_(0.5))
        # not by mass: a step never leaves the bracket because the two are rounded differently
        torch.lt(here, y, out=above)
        low, high = torch.lerp(low, x, above), torch.lerp(x, high, above)
        slope = (here * here).mul_(-0.5).exp_().mul_(INV_SQRT_2PI).mul_(total).div_(density)
        step = slope.mul_(SQRT_HALF / INV_SQRT_2PI).mul_(y - here)
        x = or_middle(step.add_(x), low, high, slack)
    # the bracket knows nothing of a weight that is NaN
    return x.mul_(side).add_(total.mul_(0.0))


# --- Mix-d


def rosenblatt_inverse(u: Tensor, log_w: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """z [N, d], as `reference.rosenblatt_inverse`."""
    if len(u) > cpu_few_rows.MOST_ROWS or len(mean) > cpu_few_rows.MOST_COMPONENTS:
        return by_channels(u, log_w, mean, log_std)
    z, left = cpu_few_rows.rosenblatt_inverse(u, log_w, mean, log_std)
    if left:
        z[left] = by_channels(u[left], log_w[left], mean, log_std)
    return z


def by_channels(u: Tensor, log_w: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """`rosenblatt_inverse` for any number of rows."""
    z = torch.empty_like(u)
    for rows in cached_chunks(len(u), len(mean)):
        z[rows] = _chunk_by_channels(u[rows], log_w[rows], mean, log_std)
    return z


def _chunk_by_channels(u: Tensor, log_alpha: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """z [n, d]; rows of a certain component skip the search."""
    z = torch.empty_like(u)
    open_rows = torch.arange(len(u))
    inv_std = torch.exp(-log_std)
    for i in range(u.shape[-1]):
        center = mean[None, :, i]
        z_i = mixture_cdf_inverse(u[:, i], log_alpha, center, log_std[None])
        z[open_rows, i] = z_i
        if i + 1 == u.shape[-1]:
            break
        a = (z_i[:, None] - center) * inv_std
        log_alpha = torch.log_softmax(bayes_update(log_alpha, a, log_std), -1)
        enough = len(u) if len(u) <= _FEW_ROWS else len(u) // 2
        if (log_alpha.amax(-1) > _NEARLY_CERTAIN).sum() < enough:
            continue
        rest, certain = _from_one_component(u[:, i + 1 :], log_alpha, mean[:, i + 1 :], log_std)
        done = certain.nonzero().squeeze(-1)
        z[open_rows[done], i + 1 :] = rest[done]
        if len(done) == len(u):
            break
        kept = (~certain).nonzero().squeeze(-1)
        open_rows, u, log_alpha = open_rows[kept], u[kept], log_alpha[kept]
    return z


def _from_one_component(
    u: Tensor, log_alpha: Tensor, mean: Tensor, log_std: Tensor
) -> tuple[Tensor, Tensor]:
    """z [n, r] = mu_k + s_k u of the most probable component k, and the rows [n] that may take it.

    With e_i the posterior mass of all other components before channel i, given these z, the
    mixture's CDF differs from Phi(u_i) by at most e_i. Where that is below half an ulp of the
    smaller tail of u_i, in every channel, the search could not find anything better.
    """
    best = log_alpha.argmax(-1)
    z = mean[best] + torch.exp(log_std)[best, None] * u
    a = (z[:, None] - mean) * torch.exp(-log_std)[:, None]
    evidence = torch.addcmul(-log_std[:, None], a, a, value=-0.5).cumsum(-1)
    log_odds = log_alpha.unsqueeze(-1).repeat(1, 1, u.shape[-1])
    log_odds[..., 1:] += evidence[..., :-1]
    index = best[:, None, None].expand(-1, 1, u.shape[-1])
    log_odds -= log_odds.gather(1, index)
    others = log_odds.scatter_(1, index, -torch.inf).exp_().sum(1)
    float_ = torch.finfo(u.dtype)
    limit = float_.eps / 4 * upper_tail(u.abs())
    # where e_i may have underflowed, nothing is known about it
    return z, ((others <= limit) & (limit > float_.tiny / float_.eps)).all(-1)
