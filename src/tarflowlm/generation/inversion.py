"""The inverse of one block: by steps, by sweeps, or by the quicker of the two; and of a stack.

Both ways work on the same guess and the same KV cache, so a block can change from one to the other at any position.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tarflowlm.choices import Decoder
from tarflowlm.errors import UserError
from tarflowlm.flow.couplings import AdjustWeights
from tarflowlm.flow.stack import FlowBlock
from tarflowlm.model import TarFlowLM

Decoders = Decoder | Sequence[Decoder]
"""One decoder for all blocks, or one for each, block L first, as `Generation.decoders` has them."""
Tick = Callable[[], None]
"""Called once for every position and block, to show progress."""

TOLERANCE = {torch.float32: 2e-6, torch.float64: 1e-12}
"""Change of a latent, over 1 + its size, that counts as none: some roundings of the format."""
RESIDUAL = {torch.float32: 1e-3, torch.float64: 1e-7}
"""Distance of f(h) from the noise, over 1 + the noise, above which a position is inverted again by steps.

Rounding alone brings a latent of a narrow component to some 1e-5 of its noise.
"""
LONGEST_SEGMENT = 512
PATIENCE = 4
"""Sweeps in a row that fail to halve the largest change before a segment is cut in two."""
TRIAL_STEPS, TRIAL_SEGMENT, TRIAL_SWEEPS = 4, 32, 4
"""What `auto` measures: steps (the first is not counted), then sweeps over the positions that follow."""


@dataclass(frozen=True)
class Inverted:
    """The latents of a block, and how they were found."""

    h: Tensor
    """[B, N, C], in the order of the tokens."""
    decoder: Decoder
    """sequential or parallel."""
    passes: int
    """Sweeps and steps: each is one pass of the Transformer over some positions."""
    repeated: int = 0
    """Positions that sweeps did not bring to the noise and that were inverted again by steps."""


@torch.no_grad()
def invert_block(
    block: FlowBlock,
    u: Tensor,
    *,
    decoder: Decoder = "sequential",
    adjust: AdjustWeights | None = None,
    settled: Tensor | None = None,
    num_settled: int = 0,
    tick: Tick | None = None,
) -> Inverted:
    """Latents h [B, N, C] of a block from its noise u.

    sequential: position by position, exact. parallel: sweeps (`_Inversion.sweep`), equal to it up to the rounding of
    products; the result is mapped forward again, and from the first position whose noise does not come back the
    rest is inverted by steps. auto: some positions by steps, some by sweeps, timed; the rest by the quicker way.
    The first `num_settled` positions, in the block's own order, are taken from `settled` [B, N, C] as they are.
    Changed weights (`adjust`) have no forward map to check against, so such a block is inverted by steps.
    `tick` is called once per position.
    """
    if adjust is not None:
        decoder = "sequential"
    work = _Inversion(block, u, adjust, tick)
    if settled is not None and num_settled:
        work.settle(settled, num_settled)
    if decoder == "auto":
        decoder = work.trial()
    if decoder == "sequential":
        work.step(until=work.num_positions)
        return Inverted(work.result(), decoder, work.passes)
    work.sweep()
    repeated = 0
    if work.swept_from is not None:
        bad = work.first_bad()
        if bad < work.num_positions:
            repeated = work.num_positions - bad
            work.at, work.tick = bad, None
            work.step(until=work.num_positions)
    return Inverted(work.result(), decoder, work.passes, repeated)


class _Inversion:
    """Where the inverse of a block stands. Positions count in the block's own order; those before `at` are final."""

    def __init__(self, block: FlowBlock, u: Tensor, adjust: AdjustWeights | None, tick: Tick | None) -> None:
        self.block, self.adjust, self.tick = block, adjust, tick
        self.noise = block.order(u)[0]
        self.h = self.noise.clone()
        B, self.num_positions, _ = u.shape
        self.cache = block.allocate_cache(B, self.num_positions)
        self.at = self.passes = 0
        self.swept_from: int | None = None

    def result(self) -> Tensor:
        return self.block.order.inverse(self.h)

    def settle(self, h: Tensor, num: int) -> None:
        self.h[:, :num] = self.block.order(h)[0][:, :num]
        self.block.features_of(self.cache, self.h[:, : num - 1], first=True)
        self._advance(num)

    def _advance(self, num: int) -> None:
        self.at += num
        if self.tick is not None:
            for _ in range(num):
                self.tick()

    def step(self, until: int) -> None:
        """Position after position."""
        self.cache.rewind(self.at)
        while self.at < until:
            previous = self.h[:, self.at - 1] if self.at else None
            noise = self.noise[:, self.at]
            self.h[:, self.at] = self.block.invert_position(noise, self.cache, previous, self.adjust)
            self.passes += 1
            self._advance(1)

    def _guess(self, end: int) -> tuple[int, float]:
        """One sweep over the positions from `at` to `end`: how many of them are final now, and the largest change."""
        at, (B, _, C) = self.at, self.h.shape
        self.cache.rewind(at)
        past = self.h[:, at - 1 : end - 1] if at else self.h[:, : end - 1]
        features = self.block.features_of(self.cache, past, first=at == 0)
        noise = self.noise[:, at:end].flatten(0, 1)
        new = self.block.coupling.invert(noise, features.flatten(0, 1)).view(B, end - at, C)
        change = ((new - self.h[:, at:end]).abs() / (1 + new.abs())).amax((0, 2))
        self.h[:, at:end] = new
        still = (change <= TOLERANCE[new.dtype]).long().cumprod(0).sum()
        # one copy to the host per sweep; NaN counts as unsettled and moves on one position at a time
        frozen, largest = torch.stack((still, change.max().to(new.dtype))).tolist()
        self.passes += 1
        if self.swept_from is None:
            self.swept_from = at
        return min(int(frozen) + 1, end - at), largest

    def sweep(self, *, end: int | None = None, budget: int | None = None) -> None:
        """Gauss-Seidel-Jacobi sweeps over segments, up to `end`, at most `budget` of them.

        A sweep inverts all open positions of a segment at once, with parameters from the current guess; the guess
        starts as the noise, which is the answer where a block is near the identity. By causality a position is final
        once the guesses before it are: after a sweep, all leading positions that no longer changed, and the one
        after them, whose inputs were right. These stay in the cache, so every sweep settles at least one position
        and N sweeps always suffice. Nothing is clamped and no position is left unfinished.

        A segment whose changes stop shrinking is cut in two, down to single positions, which is a step; one that
        went well is followed by one twice as long.
        """
        limit, left, length = end or self.num_positions, budget or self.num_positions, LONGEST_SEGMENT
        while self.at < limit:
            stop, last, poor = min(limit, self.at + length), float("inf"), 0
            while self.at < stop:
                if left == 0:
                    return
                frozen, largest = self._guess(stop)
                self._advance(frozen)
                left -= 1
                poor = 0 if largest < 0.5 * last else poor + 1
                last = largest
                if poor > PATIENCE and stop - self.at > 1:
                    stop = self.at + (stop - self.at) // 2
                    poor, length = 0, max(1, stop - self.at)
            length = min(LONGEST_SEGMENT, 2 * length)

    def trial(self) -> Decoder:
        """Time both ways on positions that have to be inverted anyway."""
        start, marks = self.at, []
        for until in range(start + 1, min(start + TRIAL_STEPS, self.num_positions) + 1):
            self.step(until=until)
            marks.append(self._now())
        first, begun = self.at, self._now()
        self.sweep(end=min(first + TRIAL_SEGMENT, self.num_positions), budget=TRIAL_SWEEPS)
        if len(marks) < 2 or self.at == first:
            return "parallel"
        by_step = (marks[-1] - marks[0]) / (len(marks) - 1)
        by_sweep = (self._now() - begun) / (self.at - first)
        return "parallel" if by_sweep < by_step else "sequential"

    def _now(self) -> float:
        if self.h.device.type == "cuda":
            torch.cuda.synchronize(self.h.device)
        return time.perf_counter()

    def first_bad(self) -> int:
        """The first swept position whose latents do not map back to its noise; N where all do."""
        features = self.block.features_of(None, self.h[:, :-1], first=True)
        u, _ = self.block.coupling(self.h, features)
        off = ((u - self.noise).abs() / (1 + self.noise.abs())).amax((0, 2))
        assert self.swept_from is not None
        # not within the bound, NaN included
        bad = ~(off[self.swept_from :] <= RESIDUAL[off.dtype])
        return self.swept_from + int(torch.cat((bad, bad.new_ones(1))).int().argmax())


def invert_stack(
    model: TarFlowLM,
    noise: Tensor,
    *,
    decoder: Decoders = "sequential",
    above: int = 0,
    adjust: AdjustWeights | None = None,
    tick: Tick | None = None,
) -> tuple[list[Tensor], list[Inverted]]:
    """States h^(L) = noise, ..., h^(above) of the inverse pass, each [B, T, d], and how each block was inverted.

    Both have block L first. `adjust` acts on the mixture weights of block 1, which choose the tokens.
    """
    chosen, work = per_block(decoder, model.num_blocks), []

    def invert(index: int, u: Tensor) -> Tensor:
        change = adjust if index == 0 else None
        work.append(invert_block(model.prior.block(index), u, decoder=chosen[-1 - index], adjust=change, tick=tick))
        return work[-1].h

    return model.prior.descend(noise, invert, bottom=above), work


def per_block(decoder: Decoders, num_blocks: int) -> tuple[Decoder, ...]:
    """One decoder for every block, block L first; UserError for another number of them."""
    if isinstance(decoder, str):
        return (decoder,) * num_blocks
    if len(decoder) != num_blocks:
        raise UserError(f"decoder {tuple(decoder)}: the model has {num_blocks} blocks, give one decoder for each")
    return tuple(decoder)
