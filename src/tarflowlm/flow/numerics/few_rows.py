r"""The inverses of a handful of rows, mostly in Python's own floats, which are float64.

One call of a tensor library costs as much as some forty components here, so each row does only what
it needs. Mix-d takes these steps per channel; scalar mixtures take the first two:

1. Start. The components, sorted by mean, use up the wanted tail's mass one after the other. The one
   in which it runs out is inverted alone. This is exact where components do not overlap.
2. Newton steps in noise space from there, kept inside the bracket of docs/math.md, eq. 20, which
   they halve where they do not shrink.
3. Bayes' rule. Components with next to no posterior mass are *dropped*. With one left, the rest is
   z = mu_k + s_k u.

Let e be an upper bound on the posterior mass of all dropped components. A channel that is found at
z multiplies e by at most max_k N(m_k; m_k, s_k^2) / p(z), with p the density of the others. The
mixture's CDF is off by at most e, so e must stay below half an ulp of the smaller tail of u_i. A
row where it does not is *left out*, like a row with values that are not finite: the general path
takes it.
"""

from ctypes import c_float
from math import erfc, exp, inf, isfinite, nan
from statistics import NormalDist
from sys import float_info
from typing import NamedTuple

import torch
from torch import Tensor

from tarflowlm.flow.numerics.normal import SQRT_HALF, clamp_, upper_tail

# These decide which results are exact.

_DROPPED = 1e-40
"""Largest posterior mass of a dropped component; there is room for it to grow in later channels."""
_FAR = 100.0
"""A component whose density is below exp(-100) of the nearest one's is dropped. A row in which the
nearest one's is below exp(-100) of its largest value is left out.
"""
_CERTAIN = 9.0
"""Q(9) = 1e-19: a component whose mean is that far below has all its mass there. One that is as far
above y >= 0 adds nothing to Q(y), since Q(y + 9) < 1e-18 Q(y).
"""
_NEWTON_STEP = {torch.float32: 2.0**-11, torch.float64: 2.0**-26}
"""A step this small, over the narrowest scale, is the last: the next would be about its square. So
is one that is lost in rounding, in float64: components may be narrower than an ulp of float32.
"""
_SMALLEST_TAIL = 1e-285
"""Rows beyond, at 36 sigma, are left out: there linear space ends."""
_SMALLEST_SHARE = 1e-300
"""Q^-1 is finite from here on."""
_LARGEST_SHARE = 1.0 - 1e-16
"""Q^-1 is finite up to here."""

# These only decide which way is the fastest. They were measured, and are right to a factor of two.

_CALL = 12
"""The calls of a step cost as much as this many components."""
ONE_BY_ONE = 320
"""Visits of one step in all rows, N (K + `_CALL`), up to which scalar mixtures go one by one."""
PATIENCE = 12_000
"""Visits from which Mix-d rows give up once the general path promises to be faster."""
MOST_ROWS = 128
"""More Mix-d rows are no handful, and not even tried."""
MOST_COMPONENTS = 256
"""Nor are rows of Mix-d with more components."""

_quantile = NormalDist().inv_cdf


class _Scales(NamedTuple):
    std: list[float]
    inv_std: list[float]
    narrowest: float
    step: float  # the size from which a Newton step is the last
    eps: float  # the rounding unit of z's format


def _scales(std: list[float], dtype: torch.dtype) -> _Scales | None:
    """None unless they and their inverses are positive and finite."""
    narrowest = min(std)
    if not (narrowest > 0.0 and isfinite(1.0 / narrowest + sum(std))):
        return None
    inv_std = [1.0 / s for s in std]
    return _Scales(std, inv_std, narrowest, _NEWTON_STEP[dtype] * narrowest, torch.finfo(dtype).eps)


# --- Mix-d


def rosenblatt_inverse(
    u: Tensor, log_w: Tensor, mean: Tensor, log_std: Tensor
) -> tuple[Tensor, list[int]]:
    """z [N, d], and the rows that were left out, whose z is NaN."""
    num_rows, dim = u.shape
    found = [[nan] * dim] * num_rows
    left = list[int]()
    scales = _scales(torch.exp(log_std.double()).tolist(), mean.dtype)
    means = mean.t().tolist()
    if scales is None or not isfinite(sum(map(sum, means))):
        return torch.full_like(u, nan), list(range(num_rows))
    order = sorted(range(len(mean)), key=means[0].__getitem__)
    weights = torch.softmax(log_w.double(), -1).tolist()
    # in steps, by all rows together: they cost as much as the general path
    most_visits = PATIENCE + 2 * num_rows * len(mean)
    visits = 0
    for row, (noise, weight) in enumerate(zip(u.tolist(), weights, strict=True)):
        if visits * (num_rows - row) > most_visits * row:
            left += range(row, num_rows)
            break
        live = [k for k in order if weight[k] > _DROPPED]
        z, visited = _row(noise, live, weight, means, scales, u.dtype == torch.float32)
        visits += visited
        if len(z) == dim:
            found[row] = z
        else:
            left.append(row)
    return torch.tensor(found, dtype=u.dtype).view_as(u), left


def _row(
    noise: list[float],
    live: list[int],
    weight: list[float],
    means: list[list[float]],
    scales: _Scales,
    is_single: bool,
) -> tuple[list[float], int]:
    """z [d] of one row, cut short where it has to be left out, and the components visited.

    `live` is sorted by the first of `means`, one list per channel. Overwrites `weight`.
    """
    inv_std = scales.inv_std
    dropped = _DROPPED * (len(weight) - len(live))
    z: list[float] = []
    visits = 0
    for u, mean in zip(noise, means, strict=True):
        tail = 0.5 * erfc(SQRT_HALF * abs(u))
        # written so that NaN is left out
        if not (live and tail > _SMALLEST_TAIL and dropped <= 0.25 * scales.eps * tail):
            break
        if len(live) == 1:
            x = mean[live[0]] + scales.std[live[0]] * u
        else:
            if z:
                live.sort(key=mean.__getitem__)
            x, steps = _solve(u, live, weight, mean, scales)
            visits += steps * (len(live) + _CALL)
        if is_single:  # later channels are conditioned on the value that is returned
            x = c_float(x).value
        z.append(x)
        if len(z) == len(noise):
            break
        if len(live) == 1:
            exponent = 0.5 * u * u
            if exponent > _FAR:
                break
            dropped *= scales.std[live[0]] / scales.narrowest * exp(exponent)
            continue
        # Bayes' rule
        exponents = [0.5 * ((x - mean[k]) * inv_std[k]) ** 2 for k in live]
        least = min(exponents)
        if not least <= _FAR:
            break
        near = []
        total = 0.0
        for k, exponent in zip(live, exponents, strict=True):
            if exponent < least + _FAR:
                weight[k] *= inv_std[k] * exp(least - exponent)
                total += weight[k]
                near.append(k)
        dropped = dropped * exp(least) + (len(live) - len(near)) * exp(-_FAR)
        dropped /= scales.narrowest * total
        for k in near:
            weight[k] /= total
        live = [k for k in near if weight[k] > _DROPPED]
        dropped += (len(near) - len(live)) * _DROPPED
    return z, visits


def _solve(
    u: float, live: list[int], weight: list[float], mean: list[float], scales: _Scales
) -> tuple[float, int]:
    """x with F(x) = Phi(u), or NaN, and the number of steps; `live` is sorted by mean."""
    std, inv_std, _, step, _ = scales
    side, y = (1.0, u) if u >= 0.0 else (-1.0, -u)
    rest = 0.5 * erfc(SQRT_HALF * y)
    k = 0
    for k in reversed(live) if u >= 0.0 else live:
        if weight[k] > rest:
            break
        rest -= weight[k]
    share = min(max(rest / weight[k], _SMALLEST_SHARE), _LARGEST_SHARE)
    x = mean[k] - side * std[k] * _quantile(share)
    low, high = inf, -inf
    last = inf
    beyond = y + _CERTAIN
    for number in range(1, 301):  # each halves the bracket, or takes more than half off the step
        tail = density = 0.0
        for k in live:
            a = side * (x - mean[k]) * inv_std[k]
            if a < -_CERTAIN:
                tail += weight[k]
            elif a < beyond:
                tail += 0.5 * weight[k] * erfc(SQRT_HALF * a)
                density += weight[k] * inv_std[k] * exp(-0.5 * a * a)
        here = -_quantile(min(max(tail, _SMALLEST_SHARE), _LARGEST_SHARE))
        size = (y - here) * exp(-0.5 * here * here) / density if density else inf
        following = x + side * size
        if abs(size) <= step + 4.0 * float_info.epsilon * abs(x):
            return following, number
        if low > high:
            ends = [mean[k] + std[k] * u for k in live]
            low, high = min(ends), max(ends)
        if (here < y) == (u >= 0.0):
            low = max(low, x)
        else:
            high = min(high, x)
        if not low <= following <= high or abs(size) > 0.5 * last:
            following = low + 0.5 * (high - low)
            if high - low <= 4.0 * float_info.epsilon * abs(following):
                return following, number
        last = abs(following - x)
        x = following
    return nan, number


# --- scalar mixtures


def mixture_cdf_inverse(
    u: Tensor, log_w: Tensor, mean: Tensor, log_std: Tensor
) -> tuple[Tensor, list[int]]:
    """z [N], and the rows that were left out, where z is NaN."""
    weight = torch.softmax(log_w, -1, dtype=torch.float64)
    std = torch.exp(log_std.double())
    weight, mean, std = (
        p if len(p) == len(u) else p.expand(len(u), -1) for p in (weight, mean, std)
    )
    if len(u) * (mean.shape[1] + _CALL) <= ONE_BY_ONE:
        return _row_by_row(u, weight, mean, std)
    z, is_open = _newton_steps(u, weight, mean, std)
    rows = is_open.nonzero().view(-1)
    if not len(rows):
        return z, []
    z[rows], left = _row_by_row(u[rows], weight[rows], mean[rows], std[rows])
    return z, rows[left].tolist()


def _row_by_row(u: Tensor, weight: Tensor, mean: Tensor, std: Tensor) -> tuple[Tensor, list[int]]:
    """z [N], and the rows that were left out, whose z is NaN."""
    found = list[float]()
    for y, w, m, s in zip(*(t.tolist() for t in (u, weight, mean, std)), strict=True):
        z = nan
        tail = 0.5 * erfc(SQRT_HALF * abs(y))
        scales = _scales(s, u.dtype)
        # written so that NaN is left out
        if scales and tail > _SMALLEST_TAIL and isfinite(sum(m)):
            # dropped components amount to at most an eighth of a rounding of the tail
            least = 0.125 * scales.eps * tail / len(w)
            live = sorted([k for k, share in enumerate(w) if share > least], key=m.__getitem__)
            if live:
                z, _ = _solve(y, live, w, m, scales)
        found.append(z)
    return torch.tensor(found, dtype=u.dtype), [row for row, z in enumerate(found) if z != z]


def _newton_steps(u: Tensor, weight: Tensor, mean: Tensor, std: Tensor) -> tuple[Tensor, Tensor]:
    """z [N], and where it is not right yet: `_solve` in tensors [N, 1, K] without its bracket."""
    u_ = u.double().view(-1, 1, 1)
    side = torch.copysign(std.new_ones(()), u_)
    y = u_.abs()
    tail = upper_tail(y)
    # the upper tail comes first
    center, order = (side * mean.unsqueeze(1)).sort(-1, descending=True)
    weight = weight.unsqueeze(1).gather(-1, order)
    std = std.unsqueeze(1).gather(-1, order)
    up_to = weight.cumsum(-1)
    k = torch.searchsorted(up_to, tail).clamp_(max=mean.shape[1] - 1)
    share = (tail - (up_to - weight).gather(-1, k)).div_(weight.gather(-1, k))
    start = torch.special.ndtri(share.clamp_(_SMALLEST_SHARE, _LARGEST_SHARE))
    x = torch.addcmul(center.gather(-1, k), std.gather(-1, k), start, value=-1.0)
    low, high = torch.aminmax(torch.addcmul(center, std, y), dim=-1, keepdim=True)
    inv_std = std.reciprocal()
    scaled = inv_std * SQRT_HALF
    offset = (center * scaled).neg_()
    density_weight = (inv_std * weight).mT
    mass_weight = (0.5 * weight).mT
    step = torch.full_like(x, inf)
    for _ in range(4):  # enough for 98 of 100 rows of a trained model
        a = clamp_(torch.addcmul(offset, x, scaled))
        here = torch.special.ndtri(torch.bmm(torch.erfc(a), mass_weight))  # minus the noise
        density = torch.bmm(a.square_().neg_().exp_(), density_weight)
        ahead = (here * here).mul_(-0.5).exp_().mul_(here.add_(y))
        step = ahead.div_(density)
        x = (x + step).clamp_(low, high)
    least = _NEWTON_STEP[u.dtype] * std.amin(-1, keepdim=True)
    enough = torch.add(least, x.abs(), alpha=4.0 * float_info.epsilon)
    # negated, so that NaN is open; before x is clamped, which may stop it where it is not right
    is_open = ~(step.abs_() <= enough) | (tail <= _SMALLEST_TAIL)
    return (x * side).view(-1).to(u.dtype), is_open.view(-1)
