"""The inverse of the whole stack, each block by the decoder chosen for it."""

from typing import Literal

from torch import Tensor

from tarflowlm.flow.couplings import AdjustWeights, MixDCoupling
from tarflowlm.flow.stack import FlowBlock
from tarflowlm.generation.parallel import invert_parallel
from tarflowlm.generation.sequential import Tick
from tarflowlm.model import TarFlowLM

Decoder = Literal["sequential", "parallel", "auto"]


def invert_stack(
    model: TarFlowLM,
    noise: Tensor,
    *,
    decoder: Decoder = "sequential",
    known: Tensor | None = None,
    adjust: AdjustWeights | None = None,
    tick: Tick | None = None,
) -> tuple[list[Tensor], tuple[int, ...]]:
    """States h^(L) = noise, ..., h^(1), h^(0) = z of the inverse pass, each [B, T, d], and the sweeps of each block.

    Sweeps are in the same order, block L first; a block that was inverted position by position took one per position.
    `known` [B, n, d] fixes the latents of the first n tokens in block 1, whose weights then see them. The states
    above were sampled without that knowledge: exact for one block, an approximation for more (docs/math.md, eq. 18).
    `adjust` acts on the mixture weights of block 1, which choose the tokens. A block with either is inverted
    position by position, whatever the decoder.
    """
    prior = model.prior
    h = prior.patch(noise)[0]
    states, sweeps = [noise], []
    for index in reversed(range(len(prior.blocks))):
        block, first = prior.blocks[index], index == 0
        assert isinstance(block, FlowBlock)
        prefix = known.flatten(1) if first and known is not None else None
        change = adjust if first else None
        if prefix is None and change is None and in_parallel(block, decoder):
            h, num_sweeps = invert_parallel(block, h, tick=tick)
        else:
            h, num_sweeps = block.inverse(h, adjust=change, known=prefix, tick=tick), h.shape[1]
        states.append(prior.patch.inverse(h))
        sweeps.append(num_sweeps)
    return states, tuple(sweeps)


def in_parallel(block: FlowBlock, decoder: Decoder) -> bool:
    """Whether a block is inverted by sweeps; `auto` leaves out Mix-d, which is nearly a token language model.

    Its tokens depend on those before them all the way, so its sweeps commit a few positions each and cost more than
    they save (docs/log.md).
    """
    return decoder == "parallel" or (decoder == "auto" and not isinstance(block.coupling, MixDCoupling))
