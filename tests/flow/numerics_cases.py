"""Mixtures that break flows, shared by the numerics tests: scales e^-6..e^2, modes 20 sigma apart,
weights e^-12.
"""

import torch
from torch import Tensor


def nasty_mixtures(
    rows: int, components: int, seed: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """log_w, mean, log_std, [rows, components]."""
    g = torch.Generator().manual_seed(seed)
    log_std = torch.rand(rows, components, generator=g, dtype=torch.float64) * 8 - 6
    std = log_std.exp()
    gaps = (
        20
        * torch.maximum(std, std.roll(1, -1))
        * torch.rand(rows, components, generator=g, dtype=torch.float64)
    )
    apart = torch.cumsum(gaps, -1)
    close = torch.randn(rows, components, generator=g, dtype=torch.float64) * 3
    mean = torch.where(
        torch.rand(rows, 1, generator=g) < 0.5, apart - apart.mean(-1, keepdim=True), close
    )
    log_w = -12 * torch.rand(rows, components, generator=g, dtype=torch.float64)
    return log_w.to(dtype), mean.to(dtype), log_std.to(dtype)


def wide_noise(rows: int, seed: int, dtype: torch.dtype, largest: float = 30.0) -> Tensor:
    """u [rows]: half uniform over [-largest, largest], half ordinary."""
    g = torch.Generator().manual_seed(seed + 1000)
    u = (2 * torch.rand(rows, generator=g, dtype=torch.float64) - 1) * largest
    u[::2] *= 3.0 / largest
    return u.to(dtype)


def codebook_case(
    rows: int, components: int, d: int, seed: int, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """z [rows, d], log_w [rows, K], mean [K, d], log_std [K]."""
    g = torch.Generator().manual_seed(seed)
    draw = [
        torch.randn(*s, generator=g, dtype=torch.float64)
        for s in ((rows, d), (rows, components), (components, d))
    ]
    log_std = torch.randn(components, generator=g, dtype=torch.float64) * 0.4 - 0.7
    return draw[0].to(dtype), draw[1].to(dtype), draw[2].to(dtype), log_std.to(dtype)
