"""One chunk of a mixture in linear space: the fast path on a CPU.

Linear space is not the careless choice here: the smaller tail's mass is a sum of positive terms, each right to an
ulp or two, so it keeps its *relative* precision down to the smallest normal number. Where it gets near that number
(`SMALLEST`) the caller repeats the row in float64, and where that ends too, in log space.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from tarflowlm.flow.numerics.families import Family

_SQRT_HALF = math.sqrt(0.5)

SMALLEST = {torch.float32: 1e-12, torch.float64: 1e-285}
"""Tail masses and densities below this leave the linear path. In float32 the bound is 7 sigma, not the 13 where the
mass underflows: beyond 7 an ulp of u^2 / 2 shows in the log-determinant, and float64 removes it."""

TINY = {torch.float32: 1e-30, torch.float64: 1e-290}
"""Floor of a density one divides by, in a Newton step that the bracket then refuses."""

_LARGEST = {("normal", torch.float32): 9.0, ("normal", torch.float64): 26.4}
_LARGEST |= {("logistic", torch.float32): 80.0, ("logistic", torch.float64): 690.0}
"""Clamp for the scaled a. Vectorised exp and erfc are 30 to 80 times slower where their result underflows, flushed
denormals or not. What the clamp leaves (4e-37, 4e-305) is nothing beside `SMALLEST`."""

_SAFE_TOTAL = (1e-20, 1e30)
"""Sums of exp(log_w) for which shifting log_w by its maximum would change nothing."""

_WIDE = 20
"""Components from which the untransposed layout is the faster one (measured between 8 and 27)."""


class Workspace:
    """Buffers reused by all chunks of one call, and the layout of a chunk.

    Fresh 256 KiB blocks would cost page faults, more than the erfc. Few components: [K, n], so that broadcasts of z
    and sums over K are long vector loops, which pays for transposing the parameters. Many: [n, K], as they come.
    """

    def __init__(self, num_buffers: int, num_components: int, max_rows: int, dtype: torch.dtype) -> None:
        self.axis = 0 if num_components < _WIDE else 1
        self._num_components = num_components
        self._buffers = [torch.empty(num_components * max_rows, dtype=dtype) for _ in range(num_buffers)]
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

    sign(sum_k w_k clamp(a_k, -1, 1)). For both families |clamp(a, -1, 1) - (1 - 2 Q(a))| < 0.55, so the tail
    that is picked never holds more than 0.78 of the mass: 1 - T then loses no precision, and no second erfc is due.
    """
    score = torch.clamp(a, -1.0, 1.0, out=buffer).mul_(weight).sum(space.axis)
    return torch.copysign(space.one, score)


def tail_in_place(a: Tensor, f: Family) -> Tensor:
    """Overwrites a with a multiple of Q: 2 Q(sqrt(2) a) for the normal, whose a comes scaled by `unit`, else Q(a)."""
    return a.erfc_() if f.name == "normal" else a.neg_().sigmoid_()


def density_into(a: Tensor, f: Family, out: Tensor, space: Workspace) -> Tensor:
    """A multiple of the density, same scaling of a: sqrt(2 pi) pdf, or pdf."""
    if f.name == "normal":
        return torch.addcmul(space.zero, a, a, value=-1.0, out=out).exp_()
    # exp(-|a|) / (1 + exp(-|a|))^2: even in a, and no difference that could cancel.
    torch.abs(a, out=out).neg_().exp_()
    return out.div_((out + 1.0).square_())


def clamp_in_place(a: Tensor, f: Family) -> Tensor:
    """a clipped to where neither tail nor density underflows."""
    bound = _LARGEST[f.name, a.dtype]
    return a.clamp_(-bound, bound)


def density(a: Tensor, f: Family) -> Tensor:
    """`density_into` a new tensor."""
    return (a * a).neg_().exp_() if f.name == "normal" else f.pdf(a)


def unit(f: Family) -> float:
    """What `tail_in_place` and `density_into` want a to be multiplied by."""
    return _SQRT_HALF if f.name == "normal" else 1.0


def tail_scale(f: Family) -> float:
    """Q = tail_scale * what `tail_in_place` gives."""
    return 0.5 if f.name == "normal" else 1.0


def density_scale(f: Family) -> float:
    """pdf = density_scale * what `density_into` gives."""
    return 1 / math.sqrt(2 * math.pi) if f.name == "normal" else 1.0


def masses(z: Tensor, c: Components, f: Family, space: Workspace, out: tuple[Tensor, Tensor, Tensor]) -> None:
    """Mass beyond z on the smaller side, density at z, and that side (+1 upper, -1 lower), into `out`, [n] each.

    Mass and density still lack the factors `tail_scale` and `density_scale`. Uses buffers 2 and 3.
    """
    rows = z.shape[0]
    tail, density, side = out
    a, other = space(2, rows), space(3, rows)
    torch.sub(space.spread(z), c.mean, out=a).mul_(c.inv_std)
    side.copy_(guess_side(a, c.weight, other, space))
    clamp_in_place(a.mul_(space.spread(side * unit(f))), f)
    density_into(a, f, other, space).mul_(c.weight).mul_(c.inv_std)
    torch.sum(other, space.axis, out=density).div_(c.total)
    torch.sum(tail_in_place(a, f).mul_(c.weight), space.axis, out=tail).div_(c.total)
