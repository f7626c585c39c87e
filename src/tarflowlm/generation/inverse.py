"""The inverse of a block by steps or by sweeps, and of a stack (docs/math.md, section 7)."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tarflowlm import config
from tarflowlm.errors import SILENT, Progress
from tarflowlm.flow.stack import FlowBlock
from tarflowlm.generation.decoder import Drawing
from tarflowlm.generation.inversion import Inversion
from tarflowlm.generation.sampling import BLANK, Gumbel, Way, Work, num_leading
from tarflowlm.generation.sweeps import SHORTEST_NEWTON, Sweeps
from tarflowlm.model import TarFlowLM
from tarflowlm.requests import Adjustment

PROBED = 8
"""Sequences of noise on which `draws_last` finds out whether sweeps cost less than drawing."""


def begin(
    block: FlowBlock,
    u: Tensor,
    *,
    decoder: config.Decoder = "steps",
    adjust: Adjustment | None = None,
    settled: Tensor | None = None,
    gumbel: Gumbel | None = None,
    progress: Progress = SILENT,
) -> tuple[Inversion, Way]:
    """Begin to invert `block`: latents h [B, N, C] from noise u [B, N, C], in the order of tokens.

    "steps": position by position, exact. "sweeps": in parallel (`Sweeps`), equal up to rounding;
    the result is mapped forward again, and steps go on from the first position whose noise does not
    come back. "auto": sweeps for a block near the identity, else steps. With `adjust` there is no
    forward map to check against, so the block takes steps. With `gumbel` numbers the steps sample h
    directly, by these numbers and u; u is then not its noise.

    `settled` [B, n, C] are the latents of the first positions, in the block's order. Returns what
    is left to step, maybe nothing, and the way that was taken.
    """
    rows = Inversion(block, block.order(u), adjust, gumbel)
    rows.progress = progress
    if settled is not None and settled.shape[1]:
        rows.settle(settled)
    if gumbel is not None:
        return rows, "draw"
    if adjust is not None or decoder == "steps":
        return rows, "steps"
    sweeps = Sweeps(rows)
    if decoder == "auto" and not sweeps.is_near_identity():
        return rows, "steps"
    sweeps.run()
    return rows, "sweeps"


@torch.no_grad()
def invert_block(block: FlowBlock, u: Tensor, **options: Any) -> tuple[Tensor, Work]:
    """What `begin`, with these options, begins: latents [B, N, C], in the order of tokens."""
    rows, way = begin(block, u, **options)
    while rows.is_open:
        rows.step()
    return block.order.inverse(rows.values), Work(way, rows.passes)


def invert_stack(
    model: TarFlowLM,
    noise: Tensor,
    *,
    decoder: config.Decoder = "steps",
    level: int | None = None,
    above: int = 0,
    adjust: Adjustment | None = None,
    known: Sequence[Tensor] = (),
    gumbel: Gumbel | None = None,
    progress: Progress = SILENT,
) -> tuple[list[Tensor], list[Work]]:
    """Invert blocks l = `level` (L by default), ..., above + 1.

    Returned are the states h^(l) = noise, ..., h^(above), each [B, T, d], and the `Work` for each
    block, l first. With `gumbel` numbers block L is drawn; then `noise` is not h^(L). `adjust` is
    for block 1, and in a stack that fills in (eq. 9a) for all blocks.
    `known` has the states of texts, h^(0) first; in a stack that runs left to right, states of
    their first tokens are enough.
    Each block copies the positions before the first whose noise differs.
    """
    patch = model.prior.patch
    states = [noise]
    work: list[Work] = []
    for index in reversed(range(above, model.num_blocks if level is None else level)):
        block = model.prior.block(index)
        adjusts = adjust if index == 0 or model.config.fills_in else None
        drawn = gumbel if index + 1 == model.num_blocks else None
        settled = settled_by(model, index, patch(states[-1]), known)
        if drawn is not None and model.draws_tokens(index):
            blank = torch.full(states[-1].shape[:2], BLANK)
            rows = Drawing(model, index, states[-1], drawn, blank, adjusts)
            rows.progress = progress
            if settled is not None and settled.shape[1]:
                rows.settle(settled)
            while rows.is_open:
                rows.step()
            h, done = rows.values, Work("draw", rows.passes)
        else:
            h, done = invert_block(
                block,
                patch(states[-1]),
                decoder=decoder,
                adjust=adjusts,
                settled=settled,
                gumbel=drawn,
                progress=progress,
            )
        work.append(done)
        states.append(patch.inverse(h))
    return states, work


def settled_by(
    model: TarFlowLM, index: int, noise: Tensor, known: Sequence[Tensor]
) -> Tensor | None:
    """Latents [B, n, C] that a block need not invert, because `noise` [B, N, C] is that of `known`
    states there, in the block's order.
    """
    if not known:
        return None
    order, patch = model.prior.block(index).order, model.prior.patch
    before, settled = (order(patch(h)) for h in (known[index + 1], known[index]))
    is_same = order(noise)[:, : before.shape[1]] == before
    return settled[:, : num_leading(is_same.all(2).all(0))]


@torch.no_grad()
def draws_last(model: TarFlowLM, decoder: config.Decoder) -> bool:
    """Whether block L of new texts is drawn, and not inverted: always but by "sweeps", or where it
    is above others and near the identity, so that sweeps cost less.

    This is tested on other noise, because the noise of a text must not choose how it is drawn.
    """
    if decoder == "sweeps" or model.num_blocks == 1:
        return decoder != "sweeps"
    block = model.prior.block(-1)
    shape = (PROBED, SHORTEST_NEWTON, len(block.order.channels))
    probe = torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(block.start)
    return not Sweeps(Inversion(block, block.order(probe))).is_near_identity()
