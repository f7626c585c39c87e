r"""The safeguarded Newton step shared by all inverses.

The problem is mirrored to u >= 0, where the upper tail T(x) is to meet Q, the base's upper tail at u. Newton acts in
noise space, where a single component is a straight line: with L = log T(x) - log Q, hazard h = b / Q and curvature
kappa = h (h - psi) of -log Q at u, the noise still missing is e from L = h e - kappa e^2 / 2, and dx = e b(u - e) / p(x).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from tarflowlm.flow.numerics.families import Family


class Target(NamedTuple):
    """What u >= 0 asks for; all [n]."""

    log_tail: Tensor
    hazard: Tensor
    curvature: Tensor


def target_of(y: Tensor, base: Family) -> Target:
    """log Q(y), h = b / Q and h (h - psi)."""
    log_tail = base.log_tail(y)
    hazard = torch.exp(base.log_pdf(y) - log_tail)
    return Target(log_tail, hazard, hazard * (hazard - base.score(y)))


def newton(
    x: Tensor, excess: Tensor, ratio: Tensor, low: Tensor, high: Tensor, t: Target
) -> Tensor:
    """The next x from L = `excess` and T / p = `ratio`; the bracket's midpoint where Newton would leave it."""
    square = t.hazard * t.hazard
    slope = torch.sqrt(torch.maximum(square - 2.0 * t.curvature * excess, 0.01 * square))
    step = 2.0 * excess * slope * ratio / (t.hazard + slope)
    middle = 0.5 * (low + high)
    following = x + step
    # A converged x is itself an end of the bracket: rounding must not count as leaving it.
    slack = 0.501 * (high - low) + 4.0 * torch.finfo(x.dtype).eps * x.abs()
    inside = ((following - middle).abs() <= slack).to(x.dtype)
    return torch.lerp(middle, following, inside)
