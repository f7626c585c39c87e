r"""The inverses of a handful of rows, mostly in Python's own floats, which are float64.

One call of a tensor library costs as much as some forty components here. So each row goes its own
way, and does only what it needs. Where components become certain soon, as those of a trained
codebook do, that is little. Scalar mixtures take steps 1 and 2, each alone or, where they are more
than a few, all in tensors. Mix-d, per channel:

1. Start: sorted by mean, the components that come first use up the wanted tail's mass one after the
other; the one in
   which it runs out is inverted alone. This is exact where components do not overlap.
2. Newton steps in noise space from there. The first evaluation is also the test whether the start
was good; when it
   was not, the steps are kept inside the bracket of docs/math.md, eq. 20, and halve it where they
   do not shrink.
3. Bayes' rule. Components with next to no posterior mass are *dropped*; with one left, the rest is
z = mu_k + s_k u.

What was dropped stays bounded. Let e be an upper bound on its posterior mass. A channel that is
found at z multiplies e by at most max_k N(m_k; m_k, s_k^2) / p(z), with p the density of the
others. The mixture's CDF is off by at most e, so e must stay below half an ulp of the smaller tail
of u_i. A row where it does not is left to the general path, like rows with values that are not
finite.

N rows, K components, d channels. Mix-d: u, z [N, d]; log_w [N, K]; mean [K, d]; log_std [K]. Scalar
mixtures: u, z [N]; log_w, mean, log_std [N or 1, K].
"""

from ctypes import c_float
from math import erfc, exp, inf, isfinite, nan
from statistics import NormalDist
from typing import NamedTuple

import torch
from torch import Tensor

from tarflowlm.flow.numerics.normal import SQRT_HALF, clamp_

_DROPPED = 1e-40
"""Posterior mass of a component that is dropped: room for it to grow by the channels that
follow.
"""
_LARGEST_EXPONENT = _FAR = 100.0
"""A channel whose density is below exp(-100) of its components' largest is not taken here; a
component whose density is below exp(-100) of the nearest one's is dropped.
"""
_CERTAIN = 9.0
"""Q(9) = 1e-19: a component whose mean is that far below has all its mass there. One that is as far
above y has none beside Q(y), y >= 0, since Q(y + 9) < 1e-18 Q(y).
"""
_NEWTON_STEP = {torch.float32: 2.0**-11, torch.float64: 2.0**-26}
"""A step this small, over the narrowest scale, is the last: the next would be about its square."""
_MOST_STEPS = 300
_ALONE = 320
"""Rows of a scalar mixture, times components and `_CALL`, up to which they are solved one by one
(measured).
"""
_STEPS_TOGETHER = 4
"""Enough for 98 of 100 rows of a trained model."""
_MOST_ROWS, _MOST_COMPONENTS = 128, 256
_CALL = 12
"""A step costs as much as this many components before it has visited one."""
_MOST_VISITS, _MORE_VISITS = 12_000, 2
"""Components visited in steps, by all rows together, that cost as much as the general path
(measured): a number, and one for every row and component.
"""
_SMALLEST_TAIL = 1e-285
"""Beyond, at 36 sigma, linear space ends."""
_SMALLEST_SHARE, _LARGEST_SHARE = 1e-300, 1.0 - 1e-16
_quantile = NormalDist().inv_cdf


class _Book(NamedTuple):  # the codebook in lists over components
    mean: list[list[float]]  # one list per channel
    std: list[float]
    inv_std: list[float]
    largest_inv_std: float
    order: list[int]  # components sorted by their means in the first channel
    step: float  # the size from which a Newton step is the last
    eps: float  # the rounding unit of z's format
    single: bool  # True where z is rounded to float32


def is_handful(rows: int, num_components: int) -> bool:
    """True where this may be the fastest way: it is if components become certain soon, as the first
    rows show.
    """
    return rows <= _MOST_ROWS and num_components <= _MOST_COMPONENTS


def rosenblatt_inverse(
    u: Tensor, log_w: Tensor, mean: Tensor, log_std: Tensor
) -> tuple[Tensor, list[int]]:
    """z [N, d], and the rows that were left out, where z is NaN: all that follow once the general
    path is faster.
    """
    book = _book(mean, log_std)
    if book is None:
        return torch.full_like(u, nan), list(range(len(u)))
    found, left, num_rows, visits = list[list[float]](), list[int](), len(u), 0
    most_visits = _MOST_VISITS + _MORE_VISITS * num_rows * len(book.std)
    for row, (noise, weight) in enumerate(
        zip(u.tolist(), torch.softmax(log_w.double(), -1).tolist(), strict=True)
    ):
        if visits * (num_rows - row) > most_visits * row:
            left += range(row, num_rows)
            found += [[nan] * len(noise)] * (num_rows - row)
            break
        z, visited = _row(noise, weight, book)
        visits += visited
        if len(z) < len(noise):
            left.append(row)
            z = [nan] * len(noise)
        found.append(z)
    return torch.tensor(found, dtype=u.dtype).view_as(u), left


def mixture_cdf_inverse(
    u: Tensor, log_w: Tensor, mean: Tensor, log_std: Tensor
) -> tuple[Tensor, list[int]]:
    """z [N] of scalar mixtures with parameters [N or 1, K], and the rows that were left out."""
    weight, std = torch.softmax(log_w, -1, dtype=torch.float64), torch.exp(log_std.double())
    params = tuple(p if len(p) == len(u) else p.expand(len(u), -1) for p in (weight, mean, std))
    if len(u) * (mean.shape[1] + _CALL) <= _ALONE:
        found, left = _row_by_row(u.tolist(), params, u.dtype)
        return torch.tensor(found, dtype=u.dtype), left
    z, left = _together(u, *params)
    if left:
        found, still = _row_by_row(u[left].tolist(), tuple(p[left] for p in params), u.dtype)
        z[left] = torch.tensor(found, dtype=u.dtype)
        left = [left[row] for row in still]
    return z, left


def _row_by_row(
    u: list[float], params: tuple[Tensor, ...], dtype: torch.dtype
) -> tuple[list[float], list[int]]:
    """z of rows with weights, means and scales [N, K], NaN where it is left out, and these rows."""
    found, step, eps = list[float](), _NEWTON_STEP[dtype], torch.finfo(dtype).eps
    for y, w, m, s in zip(u, *(p.tolist() for p in params), strict=True):
        z, tail, narrowest = nan, 0.5 * erfc(SQRT_HALF * abs(y)), min(s)
        # written so that not a number is refused
        if narrowest > 0.0 and tail > _SMALLEST_TAIL and isfinite(sum(s) + sum(m)):
            # together, components that are left out amount to an eighth of a rounding of the tail
            # at most
            least = 0.125 * eps * tail / len(w)
            if live := sorted((k for k, share in enumerate(w) if share > least), key=m.__getitem__):
                z, _ = _solve(y, live, w, m, s, [1.0 / one for one in s], step * narrowest, eps)
        found.append(z)
    return found, [row for row, z in enumerate(found) if z != z]


def _together(u: Tensor, weight: Tensor, mean: Tensor, std: Tensor) -> tuple[Tensor, list[int]]:
    """z [N], and the rows in which it is not right yet. Weights and scales [N, K] are float64.

    `_solve` in tensors, without its bracketing: some Newton steps from the same start.
    """
    u_ = u.double().view(-1, 1, 1)
    side, y = torch.copysign(std.new_ones(()), u_), u_.abs()
    tail = torch.erfc(y * SQRT_HALF).mul_(0.5)
    # the upper tail comes first
    center, order = (side * mean.unsqueeze(1)).sort(-1, descending=True)
    weight, std = weight.unsqueeze(1).gather(-1, order), std.unsqueeze(1).gather(-1, order)
    up_to = weight.cumsum(-1)
    k = torch.searchsorted(up_to, tail).clamp_(max=mean.shape[1] - 1)
    share = (
        (tail - (up_to - weight).gather(-1, k))
        .div_(weight.gather(-1, k))
        .clamp_(_SMALLEST_SHARE, _LARGEST_SHARE)
    )
    x = torch.addcmul(
        center.gather(-1, k), std.gather(-1, k), torch.special.ndtri(share), value=-1.0
    )
    low, high = torch.aminmax(torch.addcmul(center, std, y), dim=-1, keepdim=True)
    inv_std = std.reciprocal()
    scaled = inv_std * SQRT_HALF
    offset, density_weight, weight = (
        (center * scaled).neg_(),
        (inv_std * weight).mT,
        (0.5 * weight).mT,
    )
    before = x
    for _ in range(_STEPS_TOGETHER):
        a = clamp_(torch.addcmul(offset, x, scaled))
        here = torch.special.ndtri(torch.bmm(torch.erfc(a), weight))  # minus the noise
        density = torch.bmm(a.square_().neg_().exp_(), density_weight)
        ahead = (here * here).mul_(-0.5).exp_().mul_(here.add_(y))
        before, x = x, torch.addcdiv(x, ahead, density).clamp_(low, high)
    step, eps = _NEWTON_STEP[u.dtype], torch.finfo(u.dtype).eps
    enough = torch.add(step * std.amin(-1, keepdim=True), x.abs(), alpha=4.0 * eps)
    # negated, so that not a number is open
    is_open = ~((x - before).abs_() <= enough) | (tail <= _SMALLEST_TAIL)
    return (x * side).view(-1).to(u.dtype), is_open.view(-1).nonzero().view(-1).tolist()


def _book(mean: Tensor, log_std: Tensor) -> _Book | None:
    """None unless all of it is finite."""
    std = torch.exp(log_std.double())
    means, stds, inv_std = mean.t().tolist(), std.tolist(), std.reciprocal_().tolist()
    if not isfinite(sum(stds) + sum(inv_std) + sum(map(sum, means))):
        return None
    order = sorted(range(len(stds)), key=means[0].__getitem__) if means else []
    step, eps = _NEWTON_STEP[mean.dtype] * min(stds), torch.finfo(mean.dtype).eps
    return _Book(means, stds, inv_std, max(inv_std), order, step, eps, mean.dtype == torch.float32)


def _row(noise: list[float], weight: list[float], book: _Book) -> tuple[list[float], int]:
    """z [d] of one row, cut short where it has to be left out, and the components visited.
    Overwrites `weight`.
    """
    z: list[float] = []
    live, visits = [k for k in book.order if weight[k] > _DROPPED], 0
    dropped = _DROPPED * (len(weight) - len(live))
    for u, mean in zip(noise, book.mean, strict=True):
        tail = 0.5 * erfc(SQRT_HALF * abs(u))
        # written so that not a number is refused
        if not (live and tail > _SMALLEST_TAIL and dropped <= 0.25 * book.eps * tail):
            break
        if len(live) == 1:
            k = live[0]
            x, exponent = mean[k] + book.std[k] * u, 0.5 * u * u
            if exponent > _LARGEST_EXPONENT:
                break
            dropped *= book.largest_inv_std * book.std[k] * exp(exponent)
        else:
            if z:
                live.sort(key=mean.__getitem__)
            x, steps = _solve(u, live, weight, mean, book.std, book.inv_std, book.step, book.eps)
            visits += steps * (len(live) + _CALL)
        if book.single:  # the channels that follow are conditioned on what is returned
            x = c_float(x).value
        z.append(x)
        if len(live) > 1:
            live, dropped = _update(x, live, weight, dropped, mean, book)
    return z, visits


def _update(
    x: float, live: list[int], weight: list[float], dropped: float, mean: list[float], book: _Book
) -> tuple[list[int], float]:
    """Bayes' rule after a channel at x: the components that are left, and the others' mass.
    Rewrites `weight`.
    """
    inv_std, near, total = book.inv_std, [], 0.0
    exponents = [0.5 * ((x - mean[k]) * inv_std[k]) ** 2 for k in live]
    least = min(exponents)
    if not least <= _LARGEST_EXPONENT:
        return [], inf
    limit = least + _FAR
    for k, exponent in zip(live, exponents, strict=True):
        if exponent < limit:
            weight[k] *= inv_std[k] * exp(least - exponent)
            total += weight[k]
            near.append(k)
    dropped *= exp(least)
    dropped = (dropped + (len(live) - len(near)) * exp(-_FAR)) * book.largest_inv_std / total
    scale = 1.0 / total
    for k in near:
        weight[k] *= scale
    left = [k for k in near if weight[k] > _DROPPED]
    return left, dropped + (len(near) - len(left)) * _DROPPED


def _solve(
    u: float,
    live: list[int],
    weight: list[float],
    mean: list[float],
    std: list[float],
    inv_std: list[float],
    step: float,
    eps: float,
) -> tuple[float, int]:
    """x with F(x) = Phi(u), of the components `live`, sorted by mean, or NaN; and the number of
    steps.
    """
    side, y = (1.0, u) if u >= 0.0 else (-1.0, -u)
    rest, k = 0.5 * erfc(SQRT_HALF * y), 0
    for k in reversed(live) if u >= 0.0 else live:
        if weight[k] > rest:
            break
        rest -= weight[k]
    x = mean[k] - side * std[k] * _quantile(
        min(max(rest / weight[k], _SMALLEST_SHARE), _LARGEST_SHARE)
    )
    low, high, last, beyond = inf, -inf, inf, y + _CERTAIN
    for number in range(1, _MOST_STEPS + 1):
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
        following, enough = x + side * size, step + 4.0 * eps * abs(x)
        if abs(size) <= enough:
            return following, number
        if low > high:
            ends = [mean[k] + std[k] * u for k in live]
            low, high = min(ends), max(ends)
        low, high = (max(low, x), high) if (here < y) == (u >= 0.0) else (low, min(high, x))
        if not low <= following <= high or abs(size) > 0.5 * last:
            following = low + 0.5 * (high - low)
            if high - low <= 4.0 * eps * abs(following):
                return following, number
        last, x = abs(following - x), following
    return nan, _MOST_STEPS
