"""Random numbers of a sampler: every row of a batch has a stream of its own."""

import torch
from torch import Tensor


def row_generators(num: int, generator: torch.Generator) -> list[torch.Generator]:
    """One CPU generator per row; that of row b depends on `generator` and b alone, not on `num`.

    CPU generators, so that a seed gives the same noise whatever device the model is on.
    """
    seed = int(torch.randint(2**62, (1,), generator=generator, device=generator.device))
    return [torch.Generator().manual_seed(seed + row) for row in range(num)]


def row_normal(generators: list[torch.Generator], *shape: int) -> Tensor:
    """Standard normal noise [B, *shape], float32."""
    return torch.stack([torch.randn(*shape, generator=g) for g in generators])


def row_uniform(generators: list[torch.Generator], *shape: int) -> Tensor:
    """Uniform numbers [B, *shape] in [0, 1), float64."""
    return torch.stack([torch.rand(*shape, generator=g, dtype=torch.float64) for g in generators])
