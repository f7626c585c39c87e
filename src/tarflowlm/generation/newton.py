"""When Newton steps towards the inverse of a block converge (docs/math.md, eq. 18c).

Shape legend: B rows, N positions, C channels per position.
"""

import math

import torch
from jaxtyping import Bool
from torch import Tensor

RESIDUAL = {torch.float32: 1e-3, torch.float64: 1e-7}
"""Latents h are wrong where |f(h) - u| exceeds this times 1 + |u|; rounding causes up to 1e-5."""
CONTRACTION = 0.5
"""Newton steps converge where the first changes the noise by less than this, times 1 + |h|, and
every further one by less than this times the step before.
"""


class NewtonJudge:
    """Follows Newton steps from the guess h = u: do they converge, and what has settled?

    Latents have settled where all further changes amount to at most `tolerance`, times 1 + |h|.
    """

    def __init__(self, tolerance: float) -> None:
        self.tolerance = tolerance
        self.contracts = True
        self.last = math.inf
        """The largest change of the last step, times 1 + |h|."""

    def settled(
        self, new: Tensor, old: Tensor, residual: Tensor, noise: Tensor
    ) -> Bool[Tensor, "B N"]:
        """Where the step from `old` to `new` was the last that is needed, on the host.

        All further steps are estimated from the ratio of this one and the one before. `residual` is
        u - f(old), `noise` u; all [B, N, C].
        """
        off = (residual.abs() / (1 + noise.abs())).amax(2)
        change, off = torch.stack((largest_change(new, old), off)).cpu()
        largest = float(change.max())
        is_first = self.last == math.inf
        # NaN is not below anything, so it ends the steps
        self.contracts = largest < CONTRACTION * (1.0 if is_first else self.last)
        ahead = 1.0
        if self.contracts and not is_first:
            ahead = largest / (self.last - largest)
        self.last = largest
        return (change * ahead <= self.tolerance) & (off <= RESIDUAL[new.dtype])


def largest_change(new: Tensor, old: Tensor) -> Tensor:
    """The largest change of every position, over 1 + |h|: [B, N], for latents [B, N, C]."""
    return ((new - old).abs() / (1 + new.abs())).amax(2)
