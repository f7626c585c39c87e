"""When the last block is drawn from its conditionals, and by which numbers (docs/math.md, 18d)."""

import torch
from torch import Generator, Tensor

from tarflowlm.config import Decoder
from tarflowlm.flow import wide_dtype
from tarflowlm.flow.channelwise import ChannelCoupling
from tarflowlm.generation.inversion import SHORTEST_NEWTON, Decoders, per_block
from tarflowlm.generation.newton import CONTRACTION, largest_change
from tarflowlm.generation.sampling import row_uniform
from tarflowlm.model import TarFlowLM

PROBED = 8
"""Sequences of noise that show whether a block is near the identity."""


@torch.no_grad()
def sampler_decoders(model: TarFlowLM, decoder: Decoders) -> tuple[Decoder, ...]:
    """`per_block` for a sampler with noise of its own: it draws block L where that says "auto".

    Unless blocks are below it and it seems near the identity, where sweeps cost less. Whether
    shows on noise of its own: if that of the sample decided, it would not be drawn exactly.
    """
    first, *below = per_block(decoder, model.num_blocks, draws=True)
    if first != "auto":
        return (first, *below)
    block = model.prior.block(-1)
    is_near = False
    if below and isinstance(block.coupling, ChannelCoupling):
        shape = (PROBED, SHORTEST_NEWTON, len(block.order.channels))
        noise = torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(block.start)
        new, _ = block.coupling.newton_step(noise, noise, block.features(noise))
        is_near = bool(largest_change(new, noise).max() < CONTRACTION)
    return ("auto" if is_near else "draw", *below)


def row_draws(
    model: TarFlowLM,
    decoders: tuple[Decoder, ...],
    generators: list[Generator],
    num_tokens: int,
    particles: int = 1,
) -> Tensor | None:
    """Uniform numbers [num R, N, G] by which the last block is drawn; None if it is inverted."""
    if decoders[0] != "draw":
        return None
    block = model.prior.block(-1)
    groups = len(block.order.channels) // block.coupling.group
    uniform = row_uniform(generators, particles, num_tokens // model.config.patch, groups)
    return uniform.flatten(0, 1).to(model.device, wide_dtype(block.start))
