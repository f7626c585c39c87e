"""When Newton steps towards the latents of given noise are done, and when they lead nowhere.

Shape legend: B batch, N positions, C channels.
"""

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor

CONTRACTION = 0.5
"""Newton steps go on while each changes the latents by at most this times the step before."""
RESIDUAL = {torch.float32: 1e-3, torch.float64: 1e-7}
"""Latents h are wrong where |f(h) - u| exceeds this times 1 + |u|.

Rounding alone causes residuals of about 1e-5, in narrow components.
"""


class Newton:
    """Whether Newton steps from the guess h = u converge, and where they have."""

    def __init__(self, tolerance: float, *, largest: float = math.inf) -> None:
        """Latents have settled where all further changes amount to at most `tolerance`, times 1 + |h|.

        A first step that changes them by more than `largest`, times 1 + |h|, counts as one that does not converge.
        """
        self.tolerance, self.last, self.contracts = tolerance, math.inf, True
        self._bound = largest

    def settled(
        self, new: Float[Tensor, "B N C"], old: Tensor, residual: Tensor, noise: Tensor
    ) -> Bool[Tensor, " N"]:
        """The positions, on the host, at which the step from `old` to `new` was the last that is needed.

        The ratio q of the largest changes of this step and the one before estimates how the next will compare with
        this one. All further ones then add up to q / (1 - q) times this one, so where that is within rounding they
        need not be computed. `residual` is u - f(old), `noise` u.
        """
        change = ((new - old).abs() / (1 + new.abs())).amax((0, 2))
        off = (residual.abs() / (1 + noise.abs())).amax((0, 2))
        change, off = torch.stack((change, off)).cpu()
        largest = float(change.max())
        # NaN is less than nothing, so it ends the steps
        self.contracts = largest < self._bound
        # the first step has none before it to compare with
        ahead = largest / (self.last - largest) if self.contracts and self.last < math.inf else 1.0
        self.last, self._bound = largest, CONTRACTION * largest
        return (change * ahead <= self.tolerance) & (off <= RESIDUAL[new.dtype])
