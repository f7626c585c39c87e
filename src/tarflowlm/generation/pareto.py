"""The tail index of importance weights: whether their mean can be trusted (docs/math.md, section 9)."""

import math

import torch
from torch import Tensor

FEWEST = 25
"""Weights below which a tail is too short to fit."""
UNRELIABLE = 0.7
"""Tail index above which the mean of weights is unreliable, however many there are in practice."""


def pareto_k(log_w: Tensor) -> float:
    """The tail index k of weights exp(`log_w` [R]), or NaN for fewer than 25 weights and for tails without a spread.

    Moments of order 1 / k and above are infinite: from k = 1/2 on the variance. k is that of a generalised Pareto
    distribution fitted to the largest min(R / 5, 3 sqrt(R)) weights (Vehtari et al. 2024, section 2 and appendix C).
    """
    R = len(log_w)
    w = (log_w.double() - log_w.max()).exp().sort().values
    tail = math.ceil(min(0.2 * R, 3 * R**0.5))
    if R < FEWEST or not torch.isfinite(w).all():
        return math.nan
    return _fitted_k(w[-tail:] - w[-tail - 1])


def _fitted_k(x: Tensor) -> float:
    """k of a generalised Pareto distribution of the sorted values x [M] (Zhang and Stephens 2009).

    The posterior mean over a grid of theta = -k / scale with their prior from the data; k itself then gets a weak
    prior, as if ten more values had said 1/2.
    """
    M = len(x)
    quartile = x[int(M / 4 + 0.5) - 1]
    if not quartile > 0:
        return math.nan
    points = 30 + int(M**0.5)
    j = torch.arange(1, points + 1, dtype=x.dtype) - 0.5
    theta = 1 / x[-1] + (1 - (points / j).sqrt()) / (3 * quartile)
    k = torch.log1p(-theta[:, None] * x).mean(-1)
    log_likelihood = M * ((-theta / k).log() - k - 1)
    mean_theta = (log_likelihood.softmax(0) * theta).sum()
    found = torch.log1p(-mean_theta * x).mean().item()
    return (M * found + 10 * 0.5) / (M + 10)
