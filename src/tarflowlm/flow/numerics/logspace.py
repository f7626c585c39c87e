"""The mixture map in log space, [N, K]: no range limit, no branch on data.

The far tails of the CPU path, and the whole path on accelerators and under torch.compile, where a branch would
stop the device and an erfcx is as cheap as an erfc.
"""

import math

import torch
from torch import Tensor

from tarflowlm.flow.numerics.families import NORMAL, Family

_LOG_HALF = math.log(0.5)


def log_masses(z: Tensor, log_w: Tensor, mean: Tensor, log_std: Tensor, f: Family) -> tuple[Tensor, Tensor, Tensor]:
    """log of the smaller tail's mass, its side (+1 upper, -1 lower), log density; z [N], parameters [N or 1, K]."""
    log_w = torch.log_softmax(log_w, -1)
    a = (z[:, None] - mean) * torch.exp(-log_std)
    lower = torch.logsumexp(log_w + f.log_tail(-a), -1)
    upper = torch.logsumexp(log_w + f.log_tail(a), -1)
    log_density = torch.logsumexp(log_w + f.log_pdf(a) - log_std, -1)
    side = torch.where(lower < upper, -1.0, 1.0).to(z.dtype)
    return torch.minimum(lower, upper), side, log_density


def noise_of_normals(a: Tensor, log_w: Tensor) -> Tensor:
    """u [N] alone, for normal components and a normal base: half the work of `noise`; no autograd.

    a = (z - mean) / std [N, K]; log_w [N, K] normalised. One side is evaluated, chosen as in `linear.guess_side`: it
    never holds more than 0.78 of the mass, so that the other one, where smaller, is a safe difference.
    """
    side = torch.where((torch.exp(log_w) * a.clamp(-1.0, 1.0)).sum(-1) < 0, -1.0, 1.0).to(a.dtype)
    log_tail = torch.logsumexp(NORMAL.log_tail(side[:, None] * a) + log_w, -1)
    is_larger = log_tail > _LOG_HALF
    log_tail = torch.where(is_larger, torch.log1p(-torch.exp(log_tail)), log_tail)
    return torch.where(is_larger, -side, side) * NORMAL.upper_quantile_log(log_tail)


def noise(z: Tensor, log_w: Tensor, mean: Tensor, log_std: Tensor, f: Family, base: Family) -> tuple[Tensor, Tensor]:
    """u and log p - log base(u). At z = +-inf: u = +-inf, and the limit of log_det when base and family agree."""
    log_tail, side, log_density = log_masses(z, log_w, mean, log_std, f)
    u = side * base.upper_quantile_log(log_tail)
    log_det = log_density - base.log_pdf(u)
    # du/dz tends to 1 / (the largest scale), which inf - inf cannot say.
    return u, torch.where(torch.isinf(z), -log_std.amax(-1), log_det)
