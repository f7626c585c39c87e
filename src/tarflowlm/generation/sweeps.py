"""Many positions of a block inverted at once: Newton steps and Gauss-Seidel-Jacobi sweeps.

They share the guess and the KV cache of an `Inversion`, so steps can go on at any position
(docs/math.md, section 7).
"""

import math
from copy import copy
from typing import cast

import torch
from torch import Tensor

from tarflowlm.errors import SILENT
from tarflowlm.flow import full_precision
from tarflowlm.flow.channelwise import ChannelCoupling
from tarflowlm.flow.fills import FillsIn
from tarflowlm.generation.inversion import Inversion
from tarflowlm.generation.sampling import num_leading

TOLERANCE = {torch.float32: 2e-6, torch.float64: 1e-12}
"""A latent h has converged when it changes by at most this times 1 + |h|: a few rounding errors."""
RESIDUAL = {torch.float32: 1e-3, torch.float64: 1e-7}
"""Latents h are wrong where |f(h) - u| exceeds this times 1 + |u|; rounding causes up to 1e-5."""
CONTRACTION = 0.5
"""Newton steps converge where the first one changes the noise by less than this times 1 + |h|, and
every later one by less than this times the change before.
"""
SHORTEST_NEWTON = 8
"""Fewest positions for Newton's method; the first 8 also tell whether it will converge."""
LONGEST_SEGMENT = 512
"""The most positions that one sweep inverts."""
FEW_SEQUENCES = 2
"""Up to this many sequences, exact inverses of many positions at once cost less than steps."""


class Sweeps:
    """Advances an `Inversion` by many positions at a time."""

    def __init__(self, rows: Inversion) -> None:
        self.rows = rows
        self.coupling = rows.source.coupling
        self.tolerance = TOLERANCE[rows.noise.dtype]

    def advance(self, num: int) -> None:
        """`num` more positions are final."""
        self.rows.at += num
        self.rows.progress.advance(num)

    def is_near_identity(self) -> bool:
        """Whether a few sweeps are enough.

        In channel couplings Newton steps have to converge on the first segment, which is then
        final. If they do not, a few positions are enough to show it. No clock is read, so the same
        noise takes the same path on every machine.
        """
        rows = self.rows
        if isinstance(self.coupling, FillsIn):
            return len(rows.values) <= FEW_SEQUENCES
        end = rows.at + SHORTEST_NEWTON
        if not isinstance(self.coupling, ChannelCoupling) or end > rows.num_positions:
            return False
        noise = rows.noise[:, rows.at : end]
        new, _ = self.coupling.newton_step(noise, noise, rows.features(end))
        rows.passes += 1
        # NaN counts as far
        if not largest_change(new, noise).max() < CONTRACTION:
            return False
        return self.newton()

    def newton(self) -> bool:
        """Newton steps of the next LONGEST_SEGMENT positions at once: True if they converged.

        Latents have settled where all further changes, estimated from the ratio of this one and the
        one before, amount to at most the tolerance times 1 + |h| (docs/math.md, eq. 18c). Settled
        rows take no further steps. A step that fails to shrink the changes is the last one, and the
        open positions get back their guess.
        """
        rows, coupling = self.rows, cast(ChannelCoupling, self.coupling)
        last: float | None = None
        at = rows.at
        end = min(rows.num_positions, at + LONGEST_SEGMENT)
        guess = rows.values[:, at:end].clone()
        cache = rows.cache
        rows.there = torch.arange(len(guess), device=guess.device)
        while rows.at < end:
            here = rows.there, slice(rows.at, end)
            old, noise = rows.values[here], rows.noise[here]
            new, residual = coupling.newton_step(old, noise, rows.features(end))
            rows.passes += 1
            off = (residual.abs() / (1 + noise.abs())).amax(2)
            # one copy to the host per step
            change, off = torch.stack((largest_change(new, old), off)).cpu()
            largest = float(change.max())
            # NaN is not below anything, so it ends the steps
            contracts = largest < CONTRACTION * (1.0 if last is None else last)
            ahead = largest / (last - largest) if contracts and last is not None else 1.0
            last = largest
            settled = (change * ahead <= self.tolerance) & (off <= RESIDUAL[off.dtype])
            rows.values[here] = new
            self.advance(num_leading(settled.all(0)))
            if rows.at < end and not contracts:
                rows.values[:, rows.at : end] = guess[:, rows.at - at :]
                break
            done = settled.all(1)
            if done.any():
                left = (~done).nonzero()[:, 0].to(rows.there.device)
                rows.there = rows.there[left]
                rows.cache = copy(rows.cache)
                rows.cache.keep(left)
        rows.there = slice(None)
        if rows.cache is not cache:
            rows.cache = cache
            reached, rows.at = rows.at, 0
            if 0 < reached < rows.num_positions:
                rows.features(reached)
            rows.at = reached
        return rows.at >= end

    def run(self) -> None:
        """Gauss-Seidel-Jacobi sweeps over segments, as long as their changes shrink.

        Segments take Newton steps until these fail to converge on one. Every later sweep finishes
        at least one position. A sweep that does not shrink the changes halves the segment; steps do
        what is left.
        """
        rows, limit = self.rows, self.rows.num_positions
        takes_newton = isinstance(self.coupling, ChannelCoupling)
        while limit - rows.at >= SHORTEST_NEWTON and takes_newton:
            takes_newton = self.newton()
        first, segment, last = rows.at, LONGEST_SEGMENT, math.inf
        while rows.at < limit and segment:
            end = min(limit, rows.at + segment)
            old, noise = (x[:, rows.at : end] for x in (rows.values, rows.noise))
            features = rows.features(end)
            rows.passes += 1
            new = self.coupling.invert(noise.flatten(0, 1), features.flatten(0, 1)).view_as(old)
            change = largest_change(new, old).amax(0)
            converged = (change <= self.tolerance).long().cumprod(0).sum()
            old[:] = new
            # one copy to the host per sweep; NaN counts as not converged
            final, largest = torch.stack((converged, change.max().to(new.dtype))).tolist()
            self.advance(min(int(final) + 1, len(change)))
            # NaN counts as no convergence
            if not largest < CONTRACTION * last:
                segment = min(segment, limit - rows.at) // 2
            last = largest
        if first < rows.at:
            self._go_back_to_bad(first)

    def _go_back_to_bad(self, first: int) -> None:
        """Go back to the first position from `first` on whose latents do not map to their noise."""
        rows = self.rows
        h, u = rows.values[:, : rows.at], rows.noise[:, : rows.at]
        with full_precision(h):
            again, _ = self.coupling(h, rows.source.features(h))
        off = largest_change(u, again).amax(0)[first:]
        # NaN counts as bad
        first_bad = first + num_leading(off <= RESIDUAL[off.dtype])
        if first_bad < rows.at:
            rows.at = first_bad
            rows.progress = SILENT


def largest_change(new: Tensor, old: Tensor) -> Tensor:
    """The largest change of every position, over 1 + |h|: [B, N], for latents [B, N, C]."""
    return ((new - old).abs() / (1 + new.abs())).amax(2)
