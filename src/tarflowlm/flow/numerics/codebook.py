r"""Densities under a shared codebook of isotropic Gaussians, and the Mix-d log-likelihood built from them.

    log N(z; mu_k, sigma_k^2 I) = A(z) . B_k,   A = [z, |z|^2, 1],
    B_k = [mu_k / s^2, -1 / (2 s^2), -|mu_k|^2 / (2 s^2) - d log s - d log(2 pi) / 2]          (s = sigma_k)

One matrix product, in *float64*: |z|^2 - 2 z mu + |mu|^2 cancels, and at s = 1e-3 float32 (let alone TF32) would be
wrong by some nats, centred or not. It costs d + 2 columns, little beside an LM head. Differences in float32 are as
accurate and two to four times slower on a CPU; `log_component_densities` takes them on devices without float64.
"""

import math

import torch
from torch import Tensor

_LOG_2PI = math.log(2 * math.pi)


def wide_dtype(t: Tensor) -> torch.dtype:
    """Format of the density products: float64, or float32 where the device has no other."""
    return torch.float32 if t.device.type == "mps" else torch.float64


def point_factors(z: Tensor) -> Tensor:
    """A, [N, d + 2], for z [N, d]."""
    z = z.to(wide_dtype(z))
    return torch.cat([z, (z * z).sum(-1, keepdim=True), torch.ones_like(z[:, :1])], -1)


def component_factors(mean: Tensor, log_std: Tensor) -> Tensor:
    """B, [K, d + 2], for mean [K, d], log_std [K]."""
    wide = wide_dtype(mean)
    mean, log_std = mean.to(wide), log_std.to(wide)
    precision = torch.exp(-2.0 * log_std)[:, None]
    d = mean.shape[-1]
    constant = -0.5 * (mean * mean).sum(-1, keepdim=True) * precision - d * (log_std[:, None] + 0.5 * _LOG_2PI)
    return torch.cat([mean * precision, -0.5 * precision, constant], -1)


def pull_point_factors(z: Tensor, grad: Tensor) -> Tensor:
    """The gradient of z from that of A, in the wide format."""
    d = z.shape[-1]
    return grad[:, :d] + 2.0 * z.to(grad.dtype) * grad[:, d : d + 1]


def pull_component_factors(mean: Tensor, log_std: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of mean and log_std from that of B, in the wide format."""
    d = mean.shape[-1]
    mean, precision = mean.to(grad.dtype), torch.exp(-2.0 * log_std.to(grad.dtype))
    of_linear, of_square, of_constant = grad[:, :d], grad[:, d], grad[:, d + 1]
    of_mean = precision[:, None] * (of_linear - mean * of_constant[:, None])
    of_precision = (of_linear * mean).sum(-1) - 0.5 * (of_square + (mean * mean).sum(-1) * of_constant)
    return of_mean, -2.0 * precision * of_precision - d * of_constant


def log_component_densities(z: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """log N(z; mean_k, exp(log_std_k)^2 I) of every component, without weights.

    Shapes: z [..., d]; mean [K, d]; log_std [K]; returns [..., K], nats, in z's dtype. Differentiable any number of
    times; materialises [..., K]. Errors: ValueError for shapes that do not fit.
    """
    check_codebook(z, mean, log_std)
    flat = z.reshape(-1, z.shape[-1])
    if wide_dtype(z) == torch.float32:
        squares = sum((flat[:, i, None] - mean[:, i]) ** 2 for i in range(z.shape[-1]))
        log_n = -0.5 * squares * torch.exp(-2.0 * log_std) - z.shape[-1] * (log_std + 0.5 * _LOG_2PI)
    else:
        log_n = point_factors(flat) @ component_factors(mean, log_std).T
    return log_n.to(z.dtype).view(*z.shape[:-1], mean.shape[0])


def log_own_density(z: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """log N(z_n; mean_n, exp(log_std_n)^2 I) of one component for every row, nats, in the wide format.

    Shapes: z, mean [N, d]; log_std [N]; returns [N]. The same products as in `log_component_densities`, so that what
    these round cancels in a difference.
    """
    return (point_factors(z) * component_factors(mean, log_std)).sum(-1)


def check_codebook(z: Tensor, mean: Tensor, log_std: Tensor) -> None:
    """ValueError unless z [..., d], mean [K, d], log_std [K]."""
    if mean.ndim != 2 or log_std.shape != mean.shape[:1] or z.ndim == 0 or z.shape[-1] != mean.shape[1]:
        raise ValueError(
            "need z [..., d], mean [K, d], log_std [K]; "
            f"got {tuple(z.shape)}, {tuple(mean.shape)}, {tuple(log_std.shape)}"
        )
