r"""Every map on a CPU, chunk by chunk in linear space.

The smaller tail's mass is a sum of positive terms, each right to an ulp or two, so it keeps its
*relative* precision down to the smallest normal number. `with_wider` repeats rows that get near
that number (`SMALLEST`) in float64, and beyond its range in log space by `reference`.

Standardised values are scaled by sqrt(1/2) before they reach erfc and `density_into`, and constant
factors come last:

    Q(a) = erfc(a sqrt(1/2)) / 2,        N(a; 0, 1) = exp(-(a sqrt(1/2))^2) / sqrt(2 pi)

Inverses stay inside an exact bracket. Bisection, as often as the rows need it, shrinks that of
docs/math.md, eq. 20, to the scale of the narrowest component. Then Newton steps finish. Everything
is mirrored to u >= 0 as in `reference`. Where functions are compiled, `compiled.invert` takes the
rows that it can.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from tarflowlm import chunks
from tarflowlm.flow import packing
from tarflowlm.flow.numerics import reference
from tarflowlm.flow.numerics.normal import (
    INV_SQRT_2PI,
    SQRT_HALF,
    clamp_,
    log_standard_normal,
    upper_quantile,
    upper_tail,
)
from tarflowlm.flow.numerics.reference import STEPS, Gradients, Params, bayes_update

BISECTIONS = 30
"""The most of one search. `reference` takes rows whose bracket is too wide for them."""
SMALLEST = {torch.float32: 1e-12, torch.float64: 1e-285}
"""Tail masses and densities below this leave the linear path. In float32 that is 7 sigma: beyond,
an ulp of u^2 / 2 shows in the log-determinant, and float64 removes it.
"""


# --- chunks


def budget(elements_per_row: int) -> int:
    """Elements of a buffer that stays in the cache of a CPU, by all threads.

    At least 16 rows, however many components: with fewer, calls cost more than work.
    """
    return max(chunks.CACHED * torch.get_num_threads(), 16 * elements_per_row)


def take_rows(params: Params, rows: slice | Tensor | list[int]) -> Params:
    """Rows of [N, K] parameters; a [1, K] one is shared by all rows."""
    return tuple(p if len(p) == 1 else p[rows] for p in params)


class Workspace:
    """Buffers that all chunks of one call share, and the layout of a chunk.

    Few components: [K, n], so that broadcasts of z and sums over K are long vector loops, which
    pays for transposing the parameters. Many components: [n, K], as they come.
    """

    def __init__(self, num_buffers: int, num_components: int, dtype: torch.dtype) -> None:
        # measured: the turn is between 8 and 27
        self.axis = 0 if num_components < 20 else 1
        self._num_components = num_components
        self.size = budget(num_components)
        """Elements of a buffer: the most that a chunk may have."""
        self._buffers = [torch.empty(self.size, dtype=dtype) for _ in range(num_buffers)]
        self.one = torch.ones((), dtype=dtype)
        self.zero = torch.zeros((), dtype=dtype)

    def __call__(self, index: int, rows: int) -> Tensor:
        """Buffer `index` as a contiguous chunk of `rows`, with its last values still in it."""
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
    # in this range, shifting log_w by its maximum would change nothing
    if not (bool(low > 1e-20) and bool(high < 1e30)):
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


def with_wider(
    path: Callable[..., Tensor | tuple[Tensor, ...]],
    last: Callable[..., Tensor | tuple[Tensor, ...]],
    found: tuple[Tensor, ...],
    size: Tensor,
    z: Tensor,
    params: Params,
    *rest: Tensor,
) -> None:
    """Repeat in float64 the rows of `found` whose `size` [n] is below `SMALLEST`, or NaN.

    They become path(z, *params, *rest), or if `found` is float64 already, the result of `last`, the
    same map of `reference`.
    """
    limit = SMALLEST[size.dtype]
    if size.numel() == 0 or bool(size.amin() >= limit):
        return
    rows = torch.nonzero(~(size >= limit)).squeeze(-1)
    wide = (p.double() for p in take_rows(params, rows))
    wider = last if size.dtype == torch.float64 else path
    repeated = wider(z[rows].double(), *wide, *(t[rows].double() for t in rest))
    values = (repeated,) if isinstance(repeated, Tensor) else repeated
    for narrow, value in zip(found, values, strict=True):
        narrow[rows] = value.to(narrow.dtype)


# --- scalar mixtures


def mixture_cdf(z: Tensor, *params: Tensor) -> tuple[Tensor, Tensor]:
    """u and log_det, [N], as `reference.mixture_cdf` of log_w, mean, log_std."""
    num_components = params[1].shape[-1]
    tail, density, side = (torch.empty_like(z) for _ in range(3))
    space = Workspace(4, num_components, z.dtype)
    axis, spread = space.axis, space.spread
    for rows in chunks.row_ranges(len(z), num_components, space.size):
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
    with_wider(mixture_cdf, reference.mixture_cdf, (u, log_det), size, z, params)
    return u, log_det


def mixture_log_density(z: Tensor, *params: Tensor) -> Tensor:
    """log p, [N], as `reference.mixture_log_density` of log_w, mean, log_std."""
    num_components = params[1].shape[-1]
    density = torch.empty_like(z)
    space = Workspace(3, num_components, z.dtype)
    for rows in chunks.row_ranges(len(z), num_components, space.size):
        weight, total, mean, inv_std = load(take_rows(params, rows), space)
        a = torch.sub(space.spread(z[rows]), mean, out=space(2, len(z[rows])))
        clamp_(a.mul_(inv_std).mul_(SQRT_HALF))
        density_into(a, a, space).mul_(weight).mul_(inv_std)
        torch.sum(a, space.axis, out=density[rows]).div_(total)
    size = density.mul_(INV_SQRT_2PI)
    log_p = size.log()
    with_wider(mixture_log_density, reference.mixture_log_density, (log_p,), size, z, params)
    return log_p


def mixture_backward(
    z: Tensor, log_w: Tensor, mean: Tensor, log_std: Tensor, grad_log_p: Tensor, *noise: Tensor
) -> Gradients:
    """Gradients as `reference.mixture_backward`, shaped like z and the parameters."""
    params = log_w, mean, log_std
    num_components = mean.shape[-1]
    out = (torch.empty_like(z), *(torch.zeros(p.shape, dtype=p.dtype) for p in params))
    space = Workspace(7, num_components, z.dtype)
    for rows in chunks.row_ranges(len(z), num_components, space.size):
        part = take_rows(params, rows)
        cotangents = grad_log_p[rows], *(t[rows] for t in noise)
        grads, size = _gradients(z[rows], part, *cotangents, space=space)
        # with parameters of their own, so that gradients come row by row
        own = tuple(p.expand(len(size), -1) for p in part)
        again = mixture_backward, reference.mixture_backward
        with_wider(*again, grads, size, z[rows], own, *cotangents)
        out[0][rows] = grads[0]
        for total, grad in zip(out[1:], grads[1:], strict=True):
            if len(total) == len(z):
                torch.add(space.orient(grad), space.zero, out=space.orient(total[rows]))
            else:  # shared by all rows
                total[0].add_(grad.sum(0))
    return out


def _gradients(
    z: Tensor, params: Params, grad_log_p: Tensor, *noise: Tensor, space: Workspace
) -> tuple[Gradients, Tensor]:
    """Gradients of one chunk, [n, K] views of the workspace, and its smallest masses [n]."""
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
    # not in place: rows that share their weights have a single row of them
    of_weight = torch.mul(weight, less if noise else spread(grad_log_p), out=space(6, n))
    of_log_w = share.sub_(of_weight)
    of_params = (space.orient(g) for g in (of_log_w, of_mean, of_log_std))
    return (-of_mean.sum(axis), *of_params), size


def mixture_cdf_inverse(u: Tensor, *params: Tensor) -> Tensor:
    """z [N], as `reference.mixture_cdf_inverse` of log_w, mean, log_std."""
    if not packing.is_loaded(u):
        return by_bisection(u, *params)
    from tarflowlm.compiled.invert import invert_mixtures

    z = torch.from_numpy(invert_mixtures(*map(packing.array, (u, *params))))
    left = z.isnan().nonzero()[:, 0]
    if len(left):
        z[left] = by_bisection(u[left], *take_rows(params, left))
    return z


def by_bisection(u: Tensor, *params: Tensor) -> Tensor:
    """`mixture_cdf_inverse` for any number of rows."""
    num_components = params[1].shape[-1]
    z, size = torch.empty_like(u), torch.empty_like(u)
    space = Workspace(5, num_components, u.dtype)
    for rows in chunks.row_ranges(len(u), num_components, space.size):
        z[rows], size[rows] = _solve(u[rows], take_rows(params, rows), space)
    with_wider(by_bisection, reference.mixture_cdf_inverse, (z,), size, u, params)
    return z


def _solve(u: Tensor, params: Params, space: Workspace) -> tuple[Tensor, Tensor]:
    """z [n] of one chunk, and the mass beyond it, or 0 where the bracket is too wide."""
    n, axis, spread = u.shape[0], space.axis, space.spread
    weight, total, mean, inv_std = load(params, space)
    a, other = space(2, n), space(3, n)
    side = torch.copysign(space.one, u)
    y = u.abs()
    tail = upper_tail(y)
    center = torch.mul(mean, spread(side), out=space(4, n))
    torch.div(spread(y), inv_std, out=a).add_(center)
    low, high = a.amin(axis), a.amax(axis)
    # brackets over the narrowest scale, halved until they are 2^-8 of it, where Newton's steps are
    # safe; NaN takes all steps
    width = (high - low).mul_(inv_std.amax(axis))
    widest, limit = float(width.amax()), 2.0 ** (BISECTIONS - 8)
    size, bisections = tail, BISECTIONS
    if widest <= limit:
        bisections = max(0, math.ceil(math.log2(max(widest, 1e-9))) + 8)
    else:
        size = torch.where(width > limit, 0.0, tail)
    inv_std.mul_(SQRT_HALF)
    wanted = 2.0 * tail * total
    above = torch.empty_like(u)

    for _ in range(bisections):
        x = torch.lerp(low, high, 0.5)
        clamp_(torch.sub(spread(x), center, out=a).mul_(inv_std))
        mass = a.erfc_().mul_(weight).sum(axis)
        torch.gt(mass, wanted, out=above)
        low, high = torch.lerp(low, x, above), torch.lerp(x, high, above)
    x = torch.lerp(low, high, 0.5)
    for _ in range(STEPS[u.dtype][1]):
        clamp_(torch.sub(spread(x), center, out=a).mul_(inv_std))
        density = density_into(a, other, space).mul_(weight).mul_(inv_std).sum(axis)
        mass = a.erfc_().mul_(weight).sum(axis)
        here = upper_quantile(mass.div_(total).mul_(0.5))
        # not by mass: a step never leaves the bracket because the two are rounded differently
        torch.lt(here, y, out=above)
        low, high = torch.lerp(low, x, above), torch.lerp(x, high, above)
        slope = (here * here).mul_(-0.5).exp_().mul_(INV_SQRT_2PI).mul_(total).div_(density)
        step = slope.mul_(SQRT_HALF / INV_SQRT_2PI).mul_(y - here)
        step.add_(x)
        x = torch.where(step > low, torch.minimum(step, high), low)  # not NaN
    # the bracket knows nothing of a weight that is NaN
    return x.mul_(side).add_(total.mul_(0.0)), size


# --- Mix-d


def rosenblatt_inverse(u: Tensor, log_w: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """z [N, d], as `reference.rosenblatt_inverse`."""
    if not packing.is_loaded(u):
        return by_channels(u, log_w, mean, log_std)
    from tarflowlm.compiled.invert import invert_vectors

    z = torch.from_numpy(invert_vectors(*map(packing.array, (u, log_w, mean, log_std))))
    left = z.isnan().any(1).nonzero()[:, 0]
    if len(left):
        z[left] = by_channels(u[left], log_w[left], mean, log_std)
    return z


def by_channels(u: Tensor, log_alpha: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """`rosenblatt_inverse` for any number of rows; those of a certain component skip the search."""
    size = chunks.rows_at_once(len(mean), budget(len(mean)))
    if len(u) > size:
        parts = zip(u.split(size), log_alpha.split(size), strict=True)
        return torch.cat([by_channels(*part, mean, log_std) for part in parts])
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
        # check for certainty once half the rows, or all of a few, have nearly reached it
        enough = len(u) if len(u) <= 64 else len(u) // 2
        if (log_alpha.amax(-1) > -1e-5).sum() < enough:
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
    # an e_i that may have underflowed tells nothing
    return z, ((others <= limit) & (limit > float_.tiny / float_.eps)).all(-1)
