r"""The safeguarded Newton step shared by all inverses.

The problem is mirrored to u >= 0, where the upper tail T(x) is to meet Q, the base's upper tail at u. Newton acts in
noise space, where a single component is a straight line: with L = log T(x) - log Q, hazard h = b / Q and curvature
kappa = h (h - psi) of -log Q at u, the noise still missing is e from L = h e - kappa e^2 / 2, and
dx = e b(u - e) / p(x).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from tarflowlm.flow.numerics.families import Family


class Target(NamedTuple):
    """Constants of a Newton step towards u >= 0; all [n]."""

    hazard: Tensor
    square: Tensor
    """hazard^2."""
    floor: Tensor
    """Least value of (h - kappa e)^2, where the quadratic model has no solution."""
    bend: Tensor
    """2 kappa."""
    slack: Tensor
    """A few ulps of the bracket's ends."""


def target(y: Tensor, hazard: Tensor, low: Tensor, high: Tensor, base: Family) -> Target:
    """For u = y >= 0 with base hazard b(y) / Q(y), in the bracket [low, high]."""
    square = hazard * hazard
    slack = torch.maximum(low.abs(), high.abs()) * (4.0 * torch.finfo(y.dtype).eps)
    return Target(hazard, square, square * 0.01, (square - hazard * base.score(y)) * 2.0, slack)


def newton(x: Tensor, excess: Tensor, ratio: Tensor, low: Tensor, high: Tensor, t: Target) -> Tensor:
    """The next x from L = `excess` and 2 T / p = `ratio`; the bracket's midpoint where Newton would leave it."""
    slope = torch.maximum(torch.addcmul(t.square, t.bend, excess, value=-1.0), t.floor).sqrt_()
    step = (excess * slope).mul_(ratio).div_(slope + t.hazard)
    following = step.add_(x)
    middle = torch.lerp(low, high, 0.5)
    # A converged x is itself an end of the bracket: rounding must not count as leaving it.
    limit = torch.add(t.slack, high - low, alpha=0.501)
    inside = torch.le((following - middle).abs_(), limit).to(x.dtype)
    return torch.lerp(middle, following, inside)
