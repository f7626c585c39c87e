"""The cost of a pass over many positions in steps: the constants by which `--decoder auto` decides.

    python benchmarks/decoders.py [MODEL ...] [--device cpu] [--threads 1]

For every block of the models (by default shipped ones), for B sequences and n positions: the time
of a pass over n positions over the time of a step, once for a Newton step (channel couplings
alone), once for an exact sweep. At the end the constants of `cost` in generation/inversion.py that
fit the passes best, in logarithms. The shortest of some repetitions counts, so that other work on
the machine hardly matters; `auto` itself reads no clock.
"""

import argparse
import timeit
from collections.abc import Callable
from itertools import product

import numpy as np
import torch

import tarflowlm
from tarflowlm.flow.channelwise import ChannelCoupling
from tarflowlm.flow.stack import FlowBlock

MODELS, BATCHES, POSITIONS = (
    ("english-mini", "english-passes", "english-small"),
    (1, 4, 16),
    (16, 64, 255),
)


def seconds(work: Callable[[], object], device: torch.device, repeats: int) -> float:
    """The shortest time of `repeats` calls after a first one."""

    def finished() -> None:
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()

    return min(timeit.repeat(finished, number=1, repeat=repeats + 1)[1:])


@torch.no_grad()
def costs(block: FlowBlock, channels: int, batch: int, positions: int) -> dict[str, float]:
    """The time of each kind of pass over `positions` positions, in steps."""
    device = block.start.device
    u = torch.randn(batch, positions, channels, generator=torch.Generator().manual_seed(0)).to(
        device
    )
    cache, invert = block.allocate_cache(batch, positions), block.coupling.inverter()

    def features() -> torch.Tensor:
        cache.rewind(0)
        return block.features_of(cache, u[:, :-1], first=True)

    def step() -> None:
        cache.rewind(positions // 2)
        invert(u[:, 1], block.features_at(cache, u[:, 0], batch), None)

    def sweep() -> None:
        block.coupling.invert(u.flatten(0, 1), features().flatten(0, 1))

    kinds = {"exact": sweep}
    if isinstance(coupling := block.coupling, ChannelCoupling):
        kinds["newton"] = lambda: coupling.newton_step(u, u, features())
    features()
    one = seconds(step, device, 20)
    return {kind: seconds(work, device, 3) / one for kind, work in kinds.items()}


def fitted(rows: list[tuple[int, int, float]]) -> tuple[float, float]:
    """A and b of cost = b (A + n B) / (A + B) with the least squares of its logarithm, from (B, n,
    cost).
    """
    B, n, y = np.array(rows).T
    grid = np.geomspace(0.5, 500, 200)
    off = [np.log(y) - np.log((A + n * B) / (A + B)) for A in grid]
    best = int(np.argmin([o.var() for o in off]))
    return float(grid[best]), float(np.exp(off[best].mean()))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="*", default=MODELS)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    found: dict[str, list[tuple[int, int, float]]] = {"exact": [], "newton": []}
    for name in args.models:
        model = tarflowlm.load(name, args.device).model
        config, blocks = model.config, enumerate(model.prior.blocks, 1)
        for (index, block), batch, n in product(
            blocks, BATCHES, (n for n in POSITIONS if n <= config.context)
        ):
            for kind, cost in costs(block, config.patch * config.latent_dim, batch, n).items():
                found[kind].append((batch, n, cost))
                print(
                    f"{name} block {index}, {kind:6}: B {batch:2}, n {n:3}: {cost:7.2f} steps",
                    flush=True,
                )
    for kind, rows in found.items():
        print("{}: A {:.1f}, b {:.2f}".format(kind, *fitted(rows)))


if __name__ == "__main__":
    main()
