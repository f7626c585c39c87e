"""The inverse of a block by steps or by sweeps, and of a stack (docs/math.md, section 7).

Steps and sweeps share one guess and one KV cache, so a block can change from one to the other at
any position.
"""

import math
from collections.abc import Generator, Iterator, Sequence
from copy import copy
from typing import Generic, TypeVar, cast

import torch
from torch import Tensor

from tarflowlm.config import Decoder
from tarflowlm.errors import SILENT, Progress
from tarflowlm.flow import full_precision
from tarflowlm.flow.channelwise import ChannelCoupling
from tarflowlm.flow.couplings import Inverter
from tarflowlm.flow.fills import FillsIn
from tarflowlm.flow.stack import FlowBlock
from tarflowlm.generation.rows import Drawn, Rows
from tarflowlm.generation.sampling import BLANK, Gumbel, Work, num_leading
from tarflowlm.model import TarFlowLM
from tarflowlm.requests import Adjustment

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
PROBED = 8
"""Sequences of noise on which `draws_last` finds out whether sweeps cost less than drawing."""

R = TypeVar("R")


class Returning(Generic[R]):
    """Iterates over a generator, and keeps its return value as `value`."""

    value: R

    def __init__(self, steps: Generator[Tensor, None, R]) -> None:
        self.steps = steps

    def __iter__(self) -> Iterator[Tensor]:
        self.value = yield from self.steps


def finish(steps: Generator[Tensor, None, R]) -> R:
    """Run a generator to its end, and return its return value."""
    returning = Returning(steps)
    for _ in returning:
        pass
    return returning.value


def block_inversion(
    block: FlowBlock,
    u: Tensor,
    *,
    decoder: Decoder = "steps",
    adjust: Adjustment | None = None,
    settled: Tensor | None = None,
    gumbel: Gumbel | None = None,
    ended: Tensor | None = None,
    progress: Progress = SILENT,
) -> Generator[Tensor, None, tuple[Tensor, Work]]:
    """Invert `block`: latents h [B, N, C] from noise u [B, N, C], in the order of the tokens.

    "steps": position by position, exact. "sweeps": in parallel (`Inverted.sweep`), equal up to
    rounding; the result is mapped forward again, and inverted by steps from the first position
    whose noise does not come back. "auto": sweeps for a block near the identity, else steps. With
    `adjust` there is no forward map to check against, so the block takes steps. With `gumbel`
    numbers the steps sample h directly, by these numbers and u; u is then not its noise.

    `settled` [B, n, C] are the latents of the first positions, in the block's order. `progress`
    advances once per position. After every step the generator yields the final latents [B, n, C],
    in the block's order; the results of sweeps are final only at the end. Rows that the reader
    marks in `ended` [B] take no further steps.
    """
    # an inverse needs the same features as the forward map; drawing does not
    half = gumbel is not None and u.is_cuda and u.dtype == torch.float32
    rows = Inverted(block, block.order(u), adjust, gumbel, progress, half=half)
    rows.ended = ended
    if settled is not None and settled.shape[1]:
        rows.settle(settled)
        progress.advance(rows.at)
    if gumbel is not None or adjust is not None:
        decoder = "steps"
    elif decoder == "auto":
        decoder = "sweeps" if rows.is_near_identity() else "steps"
    if decoder == "sweeps":
        rows.sweep()
    while rows.at < rows.num_positions:
        rows.step()
        rows.progress.advance()
        yield rows.values[:, : rows.at]
    latents = block.order.inverse(rows.values)
    return latents, Work(decoder if gumbel is None else "draw", rows.passes)


class Inverted(Rows):
    """Rows whose `noise` [B, N, C] a block turns into latents, in its own order."""

    source: FlowBlock
    invert: Inverter | None = None
    """The coupling's inverse; sweeps need none."""

    def __init__(
        self,
        block: FlowBlock,
        noise: Tensor,
        adjust: Adjustment | None = None,
        gumbel: Gumbel | None = None,
        progress: Progress = SILENT,
        *,
        half: bool = False,
    ) -> None:
        """With `gumbel` numbers latents are drawn, and `noise` is not their noise."""
        self.noise = noise
        self.values = noise.clone()
        self.num_positions = noise.shape[1]
        self.gumbel = gumbel
        self.progress = progress
        self.tolerance = TOLERANCE[noise.dtype]
        super().__init__(block, (len(noise), self.num_positions), adjust, half=half)

    def next_position(self) -> tuple[tuple[Tensor | slice, int], Tensor, Tensor | None]:
        """Go on by one position: its index, features [b, D] and Gumbel numbers [b, G, K]."""
        if self.ended is not None:
            self.drop(self.ended)
        here = self.there, self.at
        self.cache.rewind(self.at)
        previous = self.values[self.there, self.at - 1] if self.at else None
        features = self.source.features_at(self.cache, previous)
        self.at += 1
        self.passes += 1
        return here, features, None if self.gumbel is None else self.gumbel.at(*here)

    def step(self) -> Tensor | None:
        """Write the next position. Returns None, as `Drawn.step` where no tokens are given."""
        here, features, gumbel = self.next_position()
        if self.invert is None:
            self.invert = self.source.coupling.inverter()
        self.values[here] = self.invert(self.noise[here], features, self.adjust, gumbel)
        return None

    def advance(self, num: int) -> None:
        """Sweeps made `num` more positions final."""
        self.at += num
        self.progress.advance(num)

    def is_near_identity(self) -> bool:
        """Whether a few sweeps are enough.

        In channel couplings Newton steps have to converge on the first segment, which is then
        final. If they do not, a few positions are enough to show it. No clock is read, so the same
        noise takes the same path on every machine.
        """
        coupling = self.source.coupling
        if isinstance(coupling, FillsIn):
            return len(self.values) <= FEW_SEQUENCES
        end = self.at + SHORTEST_NEWTON
        if not isinstance(coupling, ChannelCoupling) or end > self.num_positions:
            return False
        noise = self.noise[:, self.at : end]
        new, _ = coupling.newton_step(noise, noise, self.features(self.at, end))
        self.passes += 1
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
        coupling = cast(ChannelCoupling, self.source.coupling)
        last: float | None = None
        at = self.at
        end = min(self.num_positions, at + LONGEST_SEGMENT)
        guess = self.values[:, at:end].clone()
        cache = self.cache
        self.there = torch.arange(len(guess), device=guess.device)
        while self.at < end:
            here = self.there, slice(self.at, end)
            old, noise = self.values[here], self.noise[here]
            new, residual = coupling.newton_step(old, noise, self.features(self.at, end))
            self.passes += 1
            off = (residual.abs() / (1 + noise.abs())).amax(2)
            # one copy to the host per step
            change, off = torch.stack((largest_change(new, old), off)).cpu()
            largest = float(change.max())
            # NaN is not below anything, so it ends the steps
            contracts = largest < CONTRACTION * (1.0 if last is None else last)
            ahead = largest / (last - largest) if contracts and last is not None else 1.0
            last = largest
            settled = (change * ahead <= self.tolerance) & (off <= RESIDUAL[off.dtype])
            self.values[here] = new
            self.advance(num_leading(settled.all(0)))
            if self.at < end and not contracts:
                self.values[:, self.at : end] = guess[:, self.at - at :]
                break
            done = settled.all(1)
            if done.any():
                left = (~done).nonzero()[:, 0].to(self.there.device)
                self.there = self.there[left]
                self.cache = copy(self.cache)
                self.cache.keep(left)
        self.there = slice(None)
        if self.cache is not cache:
            self.cache = cache
            if 0 < self.at < self.num_positions:
                self.features(0, self.at)
        return self.at >= end

    def sweep(self) -> None:
        """Gauss-Seidel-Jacobi sweeps over segments, as long as their changes shrink.

        Segments take Newton steps until these fail to converge on one. Every later sweep finishes
        at least one position. A sweep that does not shrink the changes halves the segment; `step`
        does what is left.
        """
        limit = self.num_positions
        coupling = self.source.coupling
        takes_newton = isinstance(coupling, ChannelCoupling)
        while limit - self.at >= SHORTEST_NEWTON and takes_newton:
            takes_newton = self.newton()
        first, segment, last = self.at, LONGEST_SEGMENT, math.inf
        while self.at < limit and segment:
            end = min(limit, self.at + segment)
            old, noise = (x[:, self.at : end] for x in (self.values, self.noise))
            features = self.features(self.at, end)
            self.passes += 1
            new = coupling.invert(noise.flatten(0, 1), features.flatten(0, 1)).view_as(old)
            change = largest_change(new, old).amax(0)
            converged = (change <= self.tolerance).long().cumprod(0).sum()
            old[:] = new
            # one copy to the host per sweep; NaN counts as not converged
            final, largest = torch.stack((converged, change.max().to(new.dtype))).tolist()
            self.advance(min(int(final) + 1, len(change)))
            # NaN counts as no convergence
            if not largest < CONTRACTION * last:
                segment = min(segment, limit - self.at) // 2
            last = largest
        if first < self.at:
            self._rewind_to_bad(first)

    def _rewind_to_bad(self, first: int) -> None:
        """Go back to the first position from `first` on whose latents do not map to their noise."""
        h, u = self.values[:, : self.at], self.noise[:, : self.at]
        with full_precision(h):
            again, _ = self.source.coupling(h, self.source.features(h))
        off = largest_change(u, again).amax(0)[first:]
        # NaN counts as bad
        first_bad = first + num_leading(off <= RESIDUAL[off.dtype])
        if first_bad < self.at:
            self.at = first_bad
            self.progress = SILENT


def largest_change(new: Tensor, old: Tensor) -> Tensor:
    """The largest change of every position, over 1 + |h|: [B, N], for latents [B, N, C]."""
    return ((new - old).abs() / (1 + new.abs())).amax(2)


def stack_inversion(
    model: TarFlowLM,
    noise: Tensor,
    *,
    decoder: Decoder = "steps",
    level: int | None = None,
    above: int = 0,
    adjust: Adjustment | None = None,
    known: Sequence[Tensor] = (),
    gumbel: Gumbel | None = None,
    ended: Tensor | None = None,
    progress: Progress = SILENT,
) -> Generator[Tensor, None, tuple[list[Tensor], list[Work]]]:
    """Invert blocks l = `level` (L by default), ..., above + 1; yields the steps of block 1.

    Returned are the states h^(l) = noise, ..., h^(above), each [B, T, d], and the `Work` for each
    block, l first. With `gumbel` numbers block L is drawn; then `noise` is not h^(L). `adjust` is
    for block 1, and in a stack that fills in (eq. 9a) for all blocks.
    `known` has the states of texts, h^(0) first; in a stack that runs left to right, states of
    their first tokens are enough.
    Each block copies the positions before the first whose noise differs. `ended` is for block 1.
    """
    patch = model.prior.patch
    h = patch(noise)
    states = [noise]
    work: list[Work] = []
    for index in reversed(range(above, model.num_blocks if level is None else level)):
        block = model.prior.block(index)
        settled = None
        if known:
            before, settled = (block.order(patch(x)) for x in (known[index + 1], known[index]))
            is_same = block.order(h)[:, : before.shape[1]] == before
            settled = settled[:, : num_leading(is_same.all(2).all(0))]
        adjusts = adjust if index == 0 or model.config.fills_in else None
        drawn = gumbel if index + 1 == model.num_blocks else None
        if drawn is not None and model.draws_tokens(index):
            blank = torch.full(states[-1].shape[:2], BLANK)
            rows = Drawn(model, index, states[-1], drawn, blank, adjusts)
            if settled is not None and settled.shape[1]:
                rows.settle(settled)
                progress.advance(rows.at)
            while rows.at < rows.num_positions:
                before = rows.at
                rows.step()
                progress.advance(rows.at - before)
            h, done = rows.values[:, : rows.at], Work("draw", rows.passes)
        else:
            steps = block_inversion(
                block,
                h,
                decoder=decoder,
                adjust=adjusts,
                settled=settled,
                gumbel=drawn,
                ended=None if index else ended,
                progress=progress,
            )
            h, done = finish(steps) if index else (yield from steps)
        work.append(done)
        states.append(patch.inverse(h))
    return states, work


@torch.no_grad()
def draws_last(model: TarFlowLM, decoder: Decoder) -> bool:
    """Whether block L of new texts is drawn, and not inverted: always but by "sweeps", or where it
    is above others and near the identity, so that sweeps cost less.

    This is tested on other noise, because the noise of a text must not choose how it is drawn.
    """
    if decoder == "sweeps" or model.num_blocks == 1:
        return decoder != "sweeps"
    block = model.prior.block(-1)
    shape = (PROBED, SHORTEST_NEWTON, len(block.order.channels))
    probe = torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(block.start)
    return not Inverted(block, block.order(probe)).is_near_identity()
