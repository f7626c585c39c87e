"""Densities of vectors: `tarflowlm.flow.VectorFlow` beside zuko's neural spline flow.

    pip install zuko
    python benchmarks/vectors.py

Two tables that are generated: two moons, and six correlated columns of eight clusters, one of them
with heavy tails, whose own density is known. For every flow and seed: log p of a test set in nats
per row, parameters, milliseconds of processor time a step, and for 1,000 samples.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributions import MixtureSameFamily, MultivariateNormal
from torch.distributions.categorical import Categorical

from tarflowlm.flow import VectorFlow

ROWS, TEST, BATCH = 20_000, 10_000, 256


def moons(count: int, generator: torch.Generator) -> Tensor:
    """Two half circles with noise, in standard units."""
    angle = math.pi * torch.rand(count, generator=generator)
    is_upper = torch.rand(count, generator=generator) < 0.5
    x = torch.where(is_upper, angle.cos(), 1 - angle.cos())
    y = torch.where(is_upper, angle.sin(), 0.5 - angle.sin())
    points = torch.stack((x, y), -1) + 0.08 * torch.randn(count, 2, generator=generator)
    return (points - torch.tensor([0.5, 0.25])) / torch.tensor([0.87, 0.5])


def clusters() -> MixtureSameFamily:
    """Eight Gaussians of six correlated columns, the same in every run."""
    generator = torch.Generator().manual_seed(0)
    means = torch.randn(8, 6, generator=generator)
    mixing = torch.randn(8, 6, 6, generator=generator) / 4
    covariance = mixing @ mixing.mT + 0.02 * torch.eye(6)
    return MixtureSameFamily(Categorical(torch.ones(8)), MultivariateNormal(means, covariance))


def table(count: int, generator: torch.Generator) -> Tensor:
    """Rows of the clusters, with the first column y as sinh(y)."""
    with torch.random.fork_rng():
        torch.manual_seed(int(torch.randint(2**31, (1,), generator=generator)))
        rows = clusters().sample((count,))
    return torch.cat((rows[:, :1].sinh(), rows[:, 1:]), -1)


def true_log_prob(rows: Tensor) -> Tensor:
    """log p of rows of `table`."""
    first = rows[:, :1].asinh()
    flat = torch.cat((first, rows[:, 1:]), -1)
    return clusters().log_prob(flat) - first[:, 0].cosh().log()


@dataclass
class Zuko:
    """A flow of zuko, called as ours are."""

    flow: nn.Module

    def parameters(self) -> list[nn.Parameter]:
        return list(self.flow.parameters())

    def log_prob(self, z: Tensor) -> Tensor:
        found: Tensor = self.flow().log_prob(z)
        return found

    @torch.no_grad()
    def sample(self, count: int) -> Tensor:
        found: Tensor = self.flow().sample((count,))
        return found


def flows(dim: int) -> dict[str, Callable[[], VectorFlow | Zuko]]:
    """What is compared; zuko's only where it is installed."""
    made: dict[str, Callable[[], VectorFlow | Zuko]] = {
        "VectorFlow(dim)": lambda: VectorFlow(dim),
    }
    try:
        import zuko
    except ImportError:
        sys.stderr.write("zuko is missing: pip install zuko\n")
        return made
    return made | {"zuko NSF(dim)": lambda: Zuko(zuko.flows.NSF(dim))}


def measure(
    make: Callable[[], VectorFlow | Zuko],
    draw: Callable[[int, torch.Generator], Tensor],
    seed: int,
    steps: int,
) -> dict[str, float]:
    """Train a flow by AdamW with one peak rate and a cosine, and test it."""
    generator = torch.Generator().manual_seed(seed)
    train, test = draw(ROWS, generator), draw(TEST, torch.Generator().manual_seed(1_000))
    torch.manual_seed(seed)
    flow = make()
    optimizer = torch.optim.AdamW(flow.parameters(), lr=2e-3, weight_decay=1e-4)
    plan = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    start = time.process_time()
    for _ in range(steps):
        rows = train[torch.randint(ROWS, (BATCH,), generator=generator)]
        optimizer.zero_grad()
        (-flow.log_prob(rows).mean()).backward()
        torch.nn.utils.clip_grad_norm_(flow.parameters(), 5.0)
        optimizer.step()
        plan.step()
    seconds = time.process_time() - start
    with torch.no_grad():
        log_p = flow.log_prob(test).mean().item()
    start = time.process_time()
    flow.sample(1000)
    return {
        "log_p": log_p,
        "parameters": sum(p.numel() for p in flow.parameters()),
        "ms_per_step": 1000 * seconds / steps,
        "ms_per_1000_samples": 1000 * (time.process_time() - start),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seeds", type=int, default=2)
    args = parser.parse_args()
    tables = {"moons": (2, moons), "table": (6, table)}
    for name, (dim, draw) in tables.items():
        if name == "table":
            rows = draw(TEST, torch.Generator().manual_seed(1_000))
            truth = true_log_prob(rows).mean().item()
            print(json.dumps({"data": name, "flow": "truth", "log_p": truth}))
        for label, make in flows(dim).items():
            for seed in range(args.seeds):
                found = measure(make, draw, seed, args.steps)
                print(json.dumps({"data": name, "flow": label, "seed": seed, **found}), flush=True)


if __name__ == "__main__":
    main()
