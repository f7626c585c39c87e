r"""One chunk of scalar mixtures in linear space: buffers, parameters, tails and densities.

Linear space is not the careless choice here: the smaller tail's mass is a sum of positive terms, each right to an
ulp or two, so it keeps its *relative* precision down to the smallest normal number. Where it gets near that number
(`SMALLEST`) the caller repeats the row in float64, and where that ends too, in log space.

n rows of a chunk, K components. Standardised values are scaled by `UNIT` = sqrt(1/2) before they reach `tail_` and
`density_into`, which leave out constant factors:

    Q(a) = TAIL_SCALE * erfc(UNIT a),        N(a; 0, 1) = DENSITY_SCALE * exp(-(UNIT a)^2)
"""

from typing import NamedTuple

import torch
from torch import Tensor

from tarflowlm.flow.numerics.layout import chunk_rows
from tarflowlm.flow.numerics.normal import INV_SQRT_2PI, SQRT_HALF

UNIT = SQRT_HALF
TAIL_SCALE = 0.5
DENSITY_SCALE = INV_SQRT_2PI

SMALLEST = {torch.float32: 1e-12, torch.float64: 1e-285}
"""Tail masses and densities below this leave the linear path. In float32 the bound is 7 sigma, not the 13 where the
mass underflows: beyond 7 an ulp of u^2 / 2 shows in the log-determinant, and float64 removes it."""

_LARGEST = {torch.float32: 9.0, torch.float64: 26.4}
"""Clamp for the scaled a. Vectorised exp and erfc are 30 to 80 times slower where their result underflows, flushed
denormals or not. What the clamp leaves (4e-37, 4e-305) is nothing beside `SMALLEST`."""

_SAFE_TOTAL = (1e-20, 1e30)
"""Sums of exp(log_w) for which shifting log_w by its maximum would change nothing."""

_WIDE = 20
"""Components from which the untransposed layout is the faster one (measured between 8 and 27)."""


class Workspace:
    """Buffers reused by all chunks of one call, and the layout of a chunk.

    Fresh 256 KiB blocks would cost page faults, more than the erfc. Few components: [K, n], so that broadcasts of z
    and sums over K are long vector loops, which pays for transposing the parameters; with K innermost and small they
    would cost more than the erfc between them. Many components: [n, K], as they come.
    """

    def __init__(self, num_buffers: int, num_components: int, dtype: torch.dtype, rows: int | None = None) -> None:
        """For chunks of up to `rows` rows, by default those of `row_chunks`."""
        self.axis = 0 if num_components < _WIDE else 1
        self._num_components = num_components
        size = num_components * (chunk_rows(num_components) if rows is None else rows)
        self._buffers = [torch.empty(size, dtype=dtype) for _ in range(num_buffers)]
        self.one = torch.ones((), dtype=dtype)
        self.zero = torch.zeros((), dtype=dtype)

    def __call__(self, index: int, rows: int) -> Tensor:
        """Buffer `index` as a contiguous chunk of `rows`; its contents are whatever was left there."""
        flat = self._buffers[index][: self._num_components * rows]
        return flat.view(self._num_components, rows) if self.axis == 0 else flat.view(rows, self._num_components)

    def orient(self, p: Tensor) -> Tensor:
        """[n, K] as a chunk (a view), and back."""
        return p.t() if self.axis == 0 else p

    def spread(self, x: Tensor) -> Tensor:
        """[n] so that it broadcasts against a chunk."""
        return x if self.axis == 0 else x.unsqueeze(-1)


class Components(NamedTuple):
    """A chunk's parameters in the workspace's layout; n is 1 when all rows share them."""

    weight: Tensor
    """Mixture weights times a positive number of each row's own."""
    total: Tensor
    """[n]: sum of `weight` over K."""
    mean: Tensor
    """A view: the first operation on it brings it into the layout."""
    inv_std: Tensor


def load(log_w: Tensor, mean: Tensor, log_std: Tensor, space: Workspace) -> Components:
    """Parameters [n, K] (or [1, K]) of one chunk, in buffers 0 and 1."""
    weight = torch.exp(space.orient(log_w), out=space(0, log_w.shape[0]))
    total = weight.sum(space.axis)
    low, high = torch.aminmax(total)
    if not (bool(low > _SAFE_TOTAL[0]) and bool(high < _SAFE_TOTAL[1])):
        # Not copy_: for two components a transposing copy is four times slower than a transposing add.
        torch.add(space.orient(log_w), space.zero, out=weight)
        weight.sub_(weight.amax(space.axis, keepdim=True)).exp_()
        total = weight.sum(space.axis)
    inv_std = torch.exp(space.orient(log_std), out=space(1, log_std.shape[0])).reciprocal_()
    return Components(weight, total, space.orient(mean), inv_std)


def guess_side(a: Tensor, weight: Tensor, buffer: Tensor, space: Workspace) -> Tensor:
    """+1 where the upper tail is (nearly) the smaller one, -1 where the lower is; [n]. Overwrites `buffer`.

    sign(sum_k w_k clamp(a_k, -1, 1)). As |clamp(a, -1, 1) - (1 - 2 Q(a))| < 0.55, the tail that is picked never holds
    more than 0.78 of the mass: 1 - T then loses no precision, and no second erfc is due.
    """
    score = torch.clamp(a, -1.0, 1.0, out=buffer).mul_(weight).sum(space.axis)
    return torch.copysign(space.one, score)


def clamp_(a: Tensor) -> Tensor:
    """Scaled a clipped, in place, to where neither tail nor density underflows."""
    bound = _LARGEST[a.dtype]
    return a.clamp_(-bound, bound)


def tail_(a: Tensor) -> Tensor:
    """Overwrites scaled a with its tail, without TAIL_SCALE."""
    return a.erfc_()


def density_into(a: Tensor, out: Tensor, space: Workspace) -> Tensor:
    """The density of scaled a, without DENSITY_SCALE, in `out`."""
    return torch.addcmul(space.zero, a, a, value=-1.0, out=out).exp_()


def rows_below(size: Tensor, limit: float) -> Tensor | None:
    """Indices with not size >= limit (NaN included), or None when there are none."""
    if size.numel() == 0 or bool(size.amin() >= limit):
        return None
    return torch.nonzero(~(size >= limit)).squeeze(-1)
