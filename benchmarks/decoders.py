"""What a sweep costs in steps: the constants by which `--decoder auto` decides (generation/inversion.py).

    python benchmarks/decoders.py [MODEL ...] [--device auto] [--repeats 5]

For every block, batch B and number of positions n: the time of a pass over n positions, in units of the time of a
step, once for a Newton step (channel couplings alone) and once for an exact sweep. Last the constants ROWS and PASS of
    cost(n, B) = PASS (ROWS + n B) / (ROWS + B)
that fit best, in logarithms. The shortest of some repetitions counts, so that other work hardly disturbs it.
"""

import time
from collections.abc import Callable

import torch

from tarflowlm.device import synchronize
from tarflowlm.flow.channelwise import ChannelCoupling, Newton
from tarflowlm.flow.stack import FlowBlock
from tarflowlm.generation.inversion import TOLERANCE

BATCHES, POSITIONS = (1, 4, 16, 64), (16, 64, 255)
MOST_ROWS = 4096


def seconds(work: Callable[[], object], device: torch.device, repeats: int) -> float:
    """The shortest time of `repeats` calls."""
    times = []
    for _ in range(repeats + 1):
        synchronize(device)
        begun = time.perf_counter()
        work()
        synchronize(device)
        times.append(time.perf_counter() - begun)
    return min(times[1:])


@torch.no_grad()
def ratios(block: FlowBlock, batch: int, positions: int, repeats: int) -> dict[str, float]:
    """The cost of a pass over `positions` positions in steps, by the kind of pass."""
    device, channels = block.start.device, block.input.in_features
    u = torch.randn(batch, positions + 1, channels, generator=torch.Generator().manual_seed(0)).to(device)
    # latents of the model's own making: a step and a sweep from anywhere else may need more iterations
    h = block.order(block.inverse(block.order.inverse(u)))[0] if False else u
    cache = block.allocate_cache(batch, positions + 1)

    def features() -> torch.Tensor:
        cache.rewind(0)
        return block.features_of(cache, h[:, :positions], first=True)

    def step() -> None:
        cache.rewind(positions // 2)
        block.invert_position(u[:, 1], cache, h[:, 0])

    def sweep() -> None:
        block.coupling.invert(u.flatten(0, 1), features().flatten(0, 1))

    def newton() -> None:
        assert isinstance(block.coupling, ChannelCoupling)
        new, residual = block.coupling.newton_step(h, u, features())
        Newton(TOLERANCE[u.dtype]).settled(new, h, residual, u)

    one = seconds(step, device, 4 * repeats)
    kinds = {"exact": sweep} | ({"newton": newton} if isinstance(block.coupling, ChannelCoupling) else {})
    return {kind: seconds(work, device, repeats) / one for kind, work in kinds.items()} | {"ms": 1e3 * one}
