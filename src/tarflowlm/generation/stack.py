"""The inverse of the whole stack, each block by the decoder chosen for it."""

from collections.abc import Sequence

from torch import Tensor

from tarflowlm.choices import Decoder
from tarflowlm.errors import UserError
from tarflowlm.flow.couplings import AdjustWeights
from tarflowlm.flow.stack import FlowBlock
from tarflowlm.generation.inversion import Inverted, invert_block
from tarflowlm.generation.passage import Tick
from tarflowlm.model import TarFlowLM

Decoders = Decoder | Sequence[Decoder]
"""One decoder for all blocks, or one for each, block L first, as `Generation.decoders` has them."""


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
    prior = model.prior
    h = prior.patch(noise)[0]
    states, work = [noise], []
    chosen = per_block(decoder, len(prior.blocks))
    for index in reversed(range(above, len(prior.blocks))):
        block = prior.blocks[index]
        assert isinstance(block, FlowBlock)
        change = adjust if index == 0 else None
        found = invert_block(block, h, decoder=chosen[-1 - index], adjust=change, tick=tick)
        h = found.h
        states.append(prior.patch.inverse(h))
        work.append(found)
    return states, work


def per_block(decoder: Decoders, num_blocks: int) -> tuple[Decoder, ...]:
    if isinstance(decoder, str):
        return (decoder,) * num_blocks
    if len(decoder) != num_blocks:
        raise UserError(f"decoder {tuple(decoder)}: the model has {num_blocks} blocks, give one decoder for each")
    return tuple(decoder)
