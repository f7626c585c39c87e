r"""The standard normal, and isotropic Gaussians around a codebook: the one home of log N.

Elementwise, with Q(a) = 1 - Phi(a) the *upper tail* (the lower one is Q(-a)):

    log N(a; 0, 1) = -a^2 / 2 - log(2 pi) / 2
    Q(a) = erfc(a / sqrt 2) / 2,   and its inverse, Q^-1(q) and Q^-1(exp(log q))

For N rows z [N, d] and K components mean [K, d], log_std [K], with s_k = exp(log_std_k):

    log N(z_n; mean_k, s_k^2 I) = A_n . B_k,   A_n = [z_n, |z_n|^2, 1],
    B_k = [mean_k / s_k^2,  -1 / (2 s_k^2),  -|mean_k|^2 / (2 s_k^2) - d log s_k - d log(2 pi) / 2]

This is one matrix product, in *float64*: |z|^2 - 2 z mean + |mean|^2 cancels, and at s = 1e-3
float32 would be wrong by some nats. Devices without float64 take differences, which are slower.
"""

import math

import torch
from torch import Tensor

from tarflowlm.flow import wide_dtype

HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)
SQRT_HALF = math.sqrt(0.5)
INV_SQRT_2PI = 1 / math.sqrt(2 * math.pi)
LARGEST = {torch.float32: 9.0, torch.float64: 26.4}
"""Bound for standardised values over sqrt 2: on a CPU, exp and erfc are 30 to 80 times slower where
they underflow. Their values at the bound (4e-37, 4e-305) vanish next to exact ones.
"""
LOWEST_EXPONENT = {torch.float32: -50.0, torch.float64: -100.0}
"""Floor for exponents whose sum is at least 1, for the same reason. It adds 1e-22 (1e-44) each."""


def log_standard_normal(x: Tensor) -> Tensor:
    """log N(x; 0, 1), elementwise, nats."""
    return -0.5 * x.square() - HALF_LOG_2PI


def standard_normal_log_prob(u: Tensor) -> Tensor:
    """log N(u; 0, I) over all but the first axis: u [B, ...] to [B], nats (docs/math.md, eq. 4)."""
    return log_standard_normal(u).flatten(1).sum(-1)


def clamp_(a: Tensor) -> Tensor:
    """Scaled a clipped, in place, to where neither tail nor density underflows."""
    return a.clamp_(-LARGEST[a.dtype], LARGEST[a.dtype])


def exp_clamped(x: Tensor) -> Tensor:
    """exp(x) of exponents whose sum is at least 1, floored to where it does not underflow."""
    return torch.clamp(x, min=LOWEST_EXPONENT[x.dtype]).exp_()


def upper_tail(a: Tensor) -> Tensor:
    """Q(a), elementwise; its relative precision is kept until it underflows."""
    return torch.erfc(a * SQRT_HALF).mul_(0.5)


def upper_quantile(q: Tensor) -> Tensor:
    """Q^-1(q), elementwise; the relative precision of a small q is kept."""
    return torch.special.ndtri(q).neg_()


def log_upper_tail(a: Tensor) -> Tensor:
    """log Q(a), elementwise, for any a, to a few ulps.

        a <= 1:  log1p(-Q(-a))            a > 1:  log(erfcx(a / sqrt 2) / 2) - a^2 / 2

    torch.special.log_ndtr is the same, but has no kernel on Apple's GPUs.
    """
    near = torch.erfc(a.clamp(max=1.0) * -SQRT_HALF)
    far = torch.special.erfcx(a.clamp(min=1.0) * SQRT_HALF)
    return torch.where(a > 1.0, torch.log(0.5 * far) - 0.5 * a * a, torch.log1p(-0.5 * near))


def upper_quantile_of_log(log_q: Tensor) -> Tensor:
    """x with Q(x) = exp(log_q), elementwise, for log_q <= 0, however small; -inf gives inf.

    Newton steps on the side of the smaller tail. log Q(x) - log q is concave, so no step takes a
    wrong branch.
    """
    is_larger = log_q > -math.log(2.0)
    log_q = torch.where(is_larger, torch.log1p(-torch.exp(log_q)), log_q)
    square = (-2.0 * log_q).clamp(min=1.0)
    series = torch.sqrt((square - torch.log(square) - 2.0 * HALF_LOG_2PI).clamp(min=0.0))
    # Abramowitz & Stegun 26.2.23, right to 4.5e-4
    t = torch.sqrt(-2.0 * log_q)
    top = (t * 0.010328).add_(0.802853).mul_(t).add_(2.515517)
    bottom = (t * 0.001308).add_(0.189269).mul_(t).add_(1.432788).mul_(t).add_(1.0)
    # the asymptotic series from where the fit ends, at q = 1e-30
    x = torch.where(log_q < -60.0, series, t - top.div_(bottom))
    for _ in range(3):
        log_tail = log_upper_tail(x)
        x = x + (log_tail - log_q) * torch.exp(log_tail - log_standard_normal(x))
    x = torch.where(torch.isneginf(log_q), math.inf, x)
    return torch.where(is_larger, -x, x)


def point_factors(z: Tensor) -> Tensor:
    """A [N, d + 2] of z [N, d], in the wide format."""
    z = z.to(wide_dtype(z))
    return torch.cat([z, (z * z).sum(-1, keepdim=True), torch.ones_like(z[:, :1])], -1)


def component_factors(mean: Tensor, log_std: Tensor) -> Tensor:
    """B [K, d + 2] of mean [K, d], log_std [K], in the wide format."""
    wide = wide_dtype(mean)
    mean = mean.to(wide)
    log_std = log_std.to(wide)[:, None]
    precision = torch.exp(-2.0 * log_std)
    at_zero = -0.5 * (mean * mean).sum(-1, keepdim=True) * precision
    constant = at_zero - mean.shape[-1] * (log_std + HALF_LOG_2PI)
    return torch.cat([mean * precision, -0.5 * precision, constant], -1)


def _from_squares(squares: Tensor, log_std: Tensor, dim: int) -> Tensor:
    """log N in d dimensions from squared distances."""
    return -0.5 * squares * torch.exp(-2.0 * log_std) - dim * (log_std + HALF_LOG_2PI)


def log_component_densities(z: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """log N(z; mean_k, exp(log_std_k)^2 I) of every component k (docs/math.md, eq. 1).

    Shapes: z [..., d]; mean [K, d]; log_std [K]; returns [..., K], nats, in z's dtype.
    Differentiable any number of times. Errors: ValueError for shapes that do not fit.
    """
    check_codebook(z, mean, log_std)
    flat = z.reshape(-1, z.shape[-1])
    if wide_dtype(z) == torch.float32:
        squares = torch.zeros_like(flat[:, :1])
        for i in range(z.shape[-1]):
            squares = squares + (flat[:, i, None] - mean[:, i]) ** 2
        log_density = _from_squares(squares, log_std, z.shape[-1])
    else:
        log_density = point_factors(flat) @ component_factors(mean, log_std).T
    return log_density.to(z.dtype).view(*z.shape[:-1], mean.shape[0])


def log_own_density(z: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """log N(z_n; mean_n, exp(log_std_n)^2 I) of one component for every row (docs/math.md, eq. 1).

    Shapes: z, mean [N, d]; log_std [N]; returns [N], nats, in the wide format. The products are as
    in `log_component_densities`, so that their rounding cancels in a difference.
    """
    if wide_dtype(z) == torch.float32:
        return _from_squares(((z - mean) ** 2).sum(-1), log_std, z.shape[-1])
    return (point_factors(z) * component_factors(mean, log_std)).sum(-1)


def check_codebook(z: Tensor, mean: Tensor, log_std: Tensor) -> None:
    """ValueError unless z [..., d], mean [K, d], log_std [K], all in float32 or float64."""
    is_codebook = mean.ndim == 2 and log_std.shape == mean.shape[:1]
    if not is_codebook or z.shape[-1:] != mean.shape[1:]:
        got = f"{tuple(z.shape)}, {tuple(mean.shape)}, {tuple(log_std.shape)}"
        raise ValueError(f"need z [..., d], mean [K, d], log_std [K]; got {got}")
    dtypes = {z.dtype, mean.dtype, log_std.dtype}
    if len(dtypes) > 1 or not dtypes <= {torch.float32, torch.float64}:
        found = [z.dtype, mean.dtype, log_std.dtype]
        raise ValueError(f"z and parameters must all be float32, or float64, got {found}")
