r"""The inverses of mixtures, row by row, in float64: each row does only what it needs.

Mix-d takes these steps per channel; scalar mixtures take the first two:

1. Start. The components, sorted by mean, use up the wanted tail's mass one after the other. The one
   in which it runs out is inverted alone. This is exact where components do not overlap.
2. Newton steps in noise space from there, kept inside the bracket of docs/math.md, eq. 20, which
   they halve where they do not shrink.
3. Bayes' rule. Components with next to no posterior mass are *dropped*. With one left, the rest is
   z = mu_k + s_k u.

Let e be an upper bound on the posterior mass of all dropped components. A channel that is found at
z multiplies e by at most max_k N(m_k; m_k, s_k^2) / p(z), with p the density of the others. The
mixture's CDF is off by at most e, so e must stay below half an ulp of the smaller tail of u_i. A
row where it does not is *left out*, like a row with values that are not finite: its z is NaN, and
the general path takes it.
"""

import math

import numpy as np
from numba import njit
from numpy.typing import NDArray

from tarflowlm.compiled.step import Floats, Integers

Doubles = NDArray[np.float64]

DROPPED = 1e-40
"""Largest posterior mass of a dropped component; there is room for it to grow in later channels."""
FAR = 100.0
"""A component whose density is below exp(-100) of the nearest one's is dropped. A row in which the
nearest one's is below exp(-100) of its largest value is left out.
"""
CERTAIN = 9.0
"""Q(9) = 1e-19: a component whose mean is that far below has all its mass there. One that is as far
above y >= 0 adds nothing to Q(y), since Q(y + 9) < 1e-18 Q(y).
"""
NEWTON_STEP = 2.0**-11
"""A step this small, over the narrowest scale, is the last: the next would be about its square. So
is one that is lost in rounding, in float64: components may be narrower than an ulp of float32.
"""
SMALLEST_TAIL = 1e-285
"""Rows beyond, at 36 sigma, are left out: there linear space ends."""
SMALLEST_SHARE = 1e-300
"""Q^-1 is finite from here on."""
LARGEST_SHARE = 1.0 - 1e-16
"""Q^-1 is finite up to here."""
EPS = 2.0**-23
"""The rounding unit of z."""
EPS_WIDE = 2.0**-52
SQRT_HALF = math.sqrt(0.5)


@njit(cache=True, nogil=True)
def ratio(r: float, a: tuple[float, ...], b: tuple[float, ...]) -> float:
    """The ratio of two polynomials of the seventh degree in r, the highest coefficients first."""
    upper, lower = a[0], b[0]
    for i in range(1, 8):
        upper, lower = upper * r + a[i], lower * r + b[i]
    return upper / lower


@njit(cache=True, nogil=True)
def quantile(p: float) -> float:
    """Phi^-1(p), to 16 digits: algorithm AS 241 (Wichura 1988)."""
    q = p - 0.5
    if abs(q) <= 0.425:
        return q * ratio(
            0.180625 - q * q,
            (
                2.5090809287301226727e3,
                3.3430575583588128105e4,
                6.7265770927008700853e4,
                4.5921953931549871457e4,
                1.3731693765509461125e4,
                1.9715909503065514427e3,
                1.3314166789178437745e2,
                3.3871328727963666080e0,
            ),
            (
                5.2264952788528545610e3,
                2.8729085735721942674e4,
                3.9307895800092710610e4,
                2.1213794301586595867e4,
                5.3941960214247511077e3,
                6.8718700749205790830e2,
                4.2313330701600911252e1,
                1.0,
            ),
        )
    r = math.sqrt(-math.log(min(p, 1.0 - p)))
    if r <= 5.0:
        x = ratio(
            r - 1.6,
            (
                7.74545014278341407640e-4,
                2.27238449892691845833e-2,
                2.41780725177450611770e-1,
                1.27045825245236838258e0,
                3.64784832476320460504e0,
                5.76949722146069140550e0,
                4.63033784615654529590e0,
                1.42343711074968357734e0,
            ),
            (
                1.05075007164441684324e-9,
                5.47593808499534494600e-4,
                1.51986665636164571966e-2,
                1.48103976427480074590e-1,
                6.89767334985100004550e-1,
                1.67638483018380384940e0,
                2.05319162663775882187e0,
                1.0,
            ),
        )
    else:
        x = ratio(
            r - 5.0,
            (
                2.01033439929228813265e-7,
                2.71155556874348757815e-5,
                1.24266094738807843860e-3,
                2.65321895265761230930e-2,
                2.96560571828504891230e-1,
                1.78482653991729133580e0,
                5.46378491116411436990e0,
                6.65790464350110377720e0,
            ),
            (
                2.04426310338993978564e-15,
                1.42151175831644588870e-7,
                1.84631831751005468180e-5,
                7.86869131145613259100e-4,
                1.48753612908506148525e-2,
                1.36929880922735805310e-1,
                5.99832206555887937690e-1,
                1.0,
            ),
        )
    return -x if q < 0.0 else x


@njit(cache=True, nogil=True)
def search(u: float, live: Integers, weight: Doubles, mean: Doubles, std: Doubles) -> float:
    """x with F(x) = Phi(u), or NaN; the components `live` are sorted by mean."""
    side, y = (1.0, u) if u >= 0.0 else (-1.0, -u)
    rest = 0.5 * math.erfc(SQRT_HALF * y)
    count = len(live)
    k = live[0]
    for i in range(count):
        k = live[count - 1 - i] if u >= 0.0 else live[i]
        if weight[k] > rest:
            break
        rest -= weight[k]
    share = min(max(rest / weight[k], SMALLEST_SHARE), LARGEST_SHARE)
    x = mean[k] - side * std[k] * quantile(share)
    low, high = np.inf, -np.inf
    last = np.inf
    narrowest = std[live[0]]
    for i in range(count):
        narrowest = min(narrowest, std[live[i]])
    beyond = y + CERTAIN
    for _ in range(300):  # each halves the bracket, or takes more than half off the step
        tail, density = 0.0, 0.0
        for i in range(count):
            k = live[i]
            a = side * (x - mean[k]) / std[k]
            if a < -CERTAIN:
                tail += weight[k]
            elif a < beyond:
                tail += 0.5 * weight[k] * math.erfc(SQRT_HALF * a)
                density += weight[k] / std[k] * math.exp(-0.5 * a * a)
        here = -quantile(min(max(tail, SMALLEST_SHARE), LARGEST_SHARE))
        size = np.inf
        if density > 0.0:
            size = (y - here) * math.exp(-0.5 * here * here) / density
        following = x + side * size
        if abs(size) <= NEWTON_STEP * narrowest + 4.0 * EPS_WIDE * abs(x):
            return following
        if low > high:
            for i in range(count):
                end = mean[live[i]] + std[live[i]] * u
                low, high = min(low, end), max(high, end)
        if (here < y) == (u >= 0.0):
            low = max(low, x)
        else:
            high = min(high, x)
        if not low <= following <= high or abs(size) > 0.5 * last:
            following = low + 0.5 * (high - low)
            if high - low <= 4.0 * EPS_WIDE * abs(following):
                return following
        last = abs(following - x)
        x = following
    return np.nan


@njit(cache=True, nogil=True)
def sorted_by(live: Integers, mean: Doubles) -> Integers:
    """The components `live` in the order of their means."""
    keys = np.empty(len(live))
    for i in range(len(live)):
        keys[i] = mean[live[i]]
    return live[np.argsort(keys)]


@njit(cache=True, nogil=True)
def softmax(log_w: Floats, weight: Doubles) -> None:
    largest, total = np.float64(log_w[0]), 0.0
    for k in range(len(log_w)):
        largest = max(largest, np.float64(log_w[k]))
    for k in range(len(log_w)):
        weight[k] = math.exp(log_w[k] - largest)
        total += weight[k]
    for k in range(len(log_w)):
        weight[k] /= total


@njit(cache=True, nogil=True)
def selected(weight: Doubles, least: float) -> Integers:
    """The components of more than the `least` weight."""
    live, count = np.empty(len(weight), np.int64), 0
    for k in range(len(weight)):
        if weight[k] > least:
            live[count] = k
            count += 1
    return live[:count]


@njit(cache=True, nogil=True)
def invert_mixtures(u: Floats, log_w: Floats, mean: Floats, log_std: Floats) -> Floats:
    """z [N] with F(z) = Phi(u), for parameters [N, K] or [1, K]; NaN where rows are left out."""
    K = mean.shape[1]
    z = np.full(len(u), np.nan, np.float32)
    weight, m, s = np.empty(K), np.empty(K), np.empty(K)
    for r in range(len(u)):
        softmax(log_w[r % len(log_w)], weight)
        is_finite = True
        for k in range(K):
            m[k] = mean[r % len(mean), k]
            s[k] = math.exp(log_std[r % len(log_std), k])
            is_finite &= np.isfinite(m[k] + weight[k]) and 0.0 < s[k] < np.inf
        tail = 0.5 * math.erfc(SQRT_HALF * abs(u[r]))
        # written so that NaN is left out
        if is_finite and tail > SMALLEST_TAIL:
            # dropped components amount to at most an eighth of a rounding of the tail
            live = selected(weight, 0.125 * EPS * tail / K)
            if len(live):
                z[r] = search(u[r], sorted_by(live, m), weight, m, s)
    return z


@njit(cache=True, nogil=True)
def invert_vector(
    u: Floats, weight: Doubles, mean: Doubles, std: Doubles, narrowest: float, z: Floats
) -> None:
    """z [d] of one row, for means [d, K]; NaN from the channel on where it is left out.

    Overwrites `weight`.
    """
    live = selected(weight, DROPPED)
    dropped = DROPPED * (len(weight) - len(live))
    exponents = np.empty(len(weight))
    z[:] = np.nan
    for i in range(len(u)):
        here = np.float64(u[i])
        tail = 0.5 * math.erfc(SQRT_HALF * abs(here))
        # written so that NaN is left out
        if not (len(live) and tail > SMALLEST_TAIL and dropped <= 0.25 * EPS * tail):
            return
        if len(live) == 1:
            x = np.float32(mean[i, live[0]] + std[live[0]] * here)
        else:
            live = sorted_by(live, mean[i])
            x = np.float32(search(here, live, weight, mean[i], std))
        z[i] = x
        if i + 1 == len(u):
            return
        if len(live) == 1:
            exponent = 0.5 * here * here
            if exponent > FAR:
                z[i] = np.nan
                return
            dropped *= std[live[0]] / narrowest * math.exp(exponent)
            continue
        # Bayes' rule; later channels are conditioned on the value that is returned
        least = np.inf
        for k in live:
            a = (np.float64(x) - mean[i, k]) / std[k]
            exponents[k] = 0.5 * a * a
            least = min(least, exponents[k])
        if not least <= FAR:
            z[i] = np.nan
            return
        total, near = 0.0, 0
        for k in live:
            if exponents[k] < least + FAR:
                weight[k] *= math.exp(least - exponents[k]) / std[k]
                total += weight[k]
                near += 1
            else:
                weight[k] = 0.0
        dropped = dropped * math.exp(least) + (len(live) - near) * math.exp(-FAR)
        dropped /= narrowest * total
        kept = 0
        for k in live:
            weight[k] /= total
            if weight[k] > DROPPED:
                live[kept] = k
                kept += 1
        dropped += (near - kept) * DROPPED
        live = live[:kept]


@njit(cache=True, nogil=True)
def invert_vectors(u: Floats, log_w: Floats, mean: Floats, log_std: Floats) -> Floats:
    """z [N, d] of mixtures of shared components [K, d]; rows that are left out have a NaN."""
    rows, d = u.shape
    K = len(mean)
    z = np.full((rows, d), np.nan, np.float32)
    weight, std, by_channel = np.empty(K), np.empty(K), np.empty((d, K))
    narrowest, is_finite = np.inf, True
    for k in range(K):
        std[k] = math.exp(log_std[k])
        narrowest = min(narrowest, std[k])
        is_finite &= 0.0 < std[k] < np.inf and 1.0 / std[k] < np.inf
        for i in range(d):
            by_channel[i, k] = mean[k, i]
            is_finite &= np.isfinite(mean[k, i])
    for r in range(rows if is_finite else 0):
        softmax(log_w[r], weight)
        invert_vector(u[r], weight, by_channel, std, narrowest, z[r])
    return z
