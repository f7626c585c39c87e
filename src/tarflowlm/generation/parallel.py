"""Parallel inversion of a block: Gauss-Seidel-Jacobi sweeps over segments, with the KV cache behind them."""

import torch
from torch import Tensor

from tarflowlm.flow.stack import FlowBlock
from tarflowlm.generation.sequential import Tick

TOLERANCE = {torch.float32: 2e-6, torch.float64: 1e-12}
"""Change of a latent, over 1 + its size, that counts as none: some roundings of the format."""
LONGEST_SEGMENT = 512
PATIENCE = 4
"""Sweeps in a row that fail to halve the largest change before a segment is cut in two."""


@torch.no_grad()
def invert_parallel(block: FlowBlock, u: Tensor, *, tick: Tick | None = None) -> tuple[Tensor, int]:
    """Latents h [B, N, C] of a block from its noise u, and the number of sweeps it took.

    A sweep inverts all open positions of a segment at once, with parameters from the current guess h; the guess
    starts as the noise, which is the answer where a block is near the identity. By causality position t is final
    once the guesses before it are: after a sweep, all leading positions that no longer changed, and the one after
    them, whose inputs were right. These are frozen and stay in the cache, so every sweep settles at least one
    position and N sweeps always suffice. Nothing is clamped and no position is left unfinished.

    A segment whose changes stop shrinking is cut in two, down to single positions, which is sequential decoding; one
    that went well is followed by one twice as long. The result equals `FlowBlock.inverse` up to the rounding of the
    products.
    """
    noise = block.order(u)[0]
    B, N, C = noise.shape
    cache = block.transformer.allocate_cache(B, N, block.start.to(u.dtype))
    h = noise.clone()
    at, length, num_sweeps = 0, LONGEST_SEGMENT, 0
    while at < N:
        end, last, poor = min(N, at + length), float("inf"), 0
        while at < end:
            cache.rewind(at)
            past = h[:, at - 1 : end - 1] if at else h[:, : end - 1]
            features = block.features_of(cache, past, first=at == 0)
            new = block.coupling.invert(noise[:, at:end].flatten(0, 1), features.flatten(0, 1)).view(B, end - at, C)
            change = ((new - h[:, at:end]).abs() / (1 + new.abs())).amax((0, 2))
            h[:, at:end] = new
            settled = (change <= TOLERANCE[u.dtype]).long().cumprod(0).sum()
            # one copy to the host per sweep; NaN counts as unsettled and moves on one position at a time
            frozen, largest = torch.stack((settled, change.max().to(u.dtype))).tolist()
            frozen = min(int(frozen) + 1, end - at)
            at, num_sweeps = at + frozen, num_sweeps + 1
            if tick is not None:
                for _ in range(frozen):
                    tick()
            poor = 0 if largest < 0.5 * last else poor + 1
            last = largest
            if poor > PATIENCE and end - at > 1:
                end, poor, length = at + (end - at) // 2, 0, max(1, (end - at) // 2)
        length = min(LONGEST_SEGMENT, 2 * length)
    return block.order.inverse(h), num_sweeps
