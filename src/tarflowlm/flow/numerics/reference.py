r"""Every map of this package in log space: any range, no branch on data.

Read this file for the mathematics (docs/math.md, sections 3 and 8); `vocabulary` has the density of
a token's mixture and the normaliser of the codebook. It runs on accelerators, where
a branch would stop the device, and in the far tails on a CPU. The fast paths are tested against it.

a_k = (z - m_k) / s_k is a standardised value; for the other letters see `tarflowlm.flow.numerics`.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from tarflowlm.flow.numerics.normal import (
    HALF_LOG_2PI,
    SQRT_HALF,
    log_standard_normal,
    log_upper_tail,
    standard_normal_log_prob,
    upper_quantile_of_log,
)

Params = tuple[Tensor, ...]
"""log_w, mean, log_std of scalar mixtures, each [N or 1, K]."""
Gradients = tuple[Tensor, ...]
"""Gradients of z [N] and of log_w, mean, log_std [N, K]."""
STEPS = {torch.float32: (13, 3), torch.float64: (15, 5)}
"""Bisections and Newton steps of an inverse."""


# --- scalar mixtures


def smaller_tail(a: Tensor, log_w: Tensor) -> tuple[Tensor, Tensor]:
    """Log mass of the mixture beyond z on its smaller side, and that side (+1 upper, -1 lower).

    a [N, K] standardised, log_w [N or 1, K] normalised; returns [N] each. A sum of positive terms
    keeps its relative precision.
    """
    lower = torch.logsumexp(log_w + log_upper_tail(-a), -1)
    upper = torch.logsumexp(log_w + log_upper_tail(a), -1)
    return torch.minimum(lower, upper), torch.where(lower < upper, -1.0, 1.0).to(a.dtype)


def mixture_cdf(z: Tensor, log_w: Tensor, mean: Tensor, log_std: Tensor) -> tuple[Tensor, Tensor]:
    """u = Phi^-1(F(z)) and log_det = log F'(z) - log N(u; 0, 1), [N] (docs/math.md, eq. 8)."""
    log_w = torch.log_softmax(log_w, -1)
    a = (z[:, None] - mean) * torch.exp(-log_std)
    log_tail, side = smaller_tail(a, log_w)
    u = side * upper_quantile_of_log(log_tail)
    log_p = torch.logsumexp(log_w + log_standard_normal(a) - log_std, -1)
    # at z = +-inf, du/dz tends to 1 / (the largest scale), which inf - inf cannot say
    return u, torch.where(torch.isinf(z), -log_std.amax(-1), log_p - log_standard_normal(u))


def mixture_backward(
    z: Tensor, log_w: Tensor, mean: Tensor, log_std: Tensor, grad_log_p: Tensor, *noise: Tensor
) -> Gradients:
    r"""Gradients of z, log_w, mean, log_std, from the cotangent g_p of log p = log F'(z).

    `noise` is u, log_det = log du/dz and the cotangent g_u of u, if u has one.

    With r_k = w_k N_k(z) / p (responsibilities), t_k the k-th component's mass beyond z on the
    smaller side sigma = +-1, T = sum_k w_k t_k, and H = g_u du/dz:

        mean_k     r_k (g_p a_k / s_k - H)
        log_std_k  (z - m_k) * (the line above) - g_p r_k
        log_w_k    g_p (r_k - w_k) + sigma g_u w_k (T - t_k) / N(u; 0, 1)
        z          -sum_k mean_k, since u and p stay when z and all m_k move together

    T and t_k belong to one tail, so nothing cancels in the far tails.
    """
    log_w = torch.log_softmax(log_w, -1)
    weight = torch.exp(log_w)
    diff = z[:, None] - mean
    inv_std = torch.exp(-log_std)
    a = diff * inv_std
    share = torch.softmax(log_w + log_standard_normal(a) - log_std, -1)
    grad_log_p = grad_log_p[:, None]
    of_mean = grad_log_p * a * inv_std
    of_log_w = grad_log_p * (share - weight)
    if noise:
        u, log_det, grad_u = (t[:, None] for t in noise)
        log_tail, side = (t[:, None] for t in smaller_tail(a, log_w))
        # T / N(u; 0, 1), in which the rounding of u does not grow
        tail_ratio = math.sqrt(0.5 * math.pi) * torch.special.erfcx(u.abs() * SQRT_HALF)
        mass_ratio = tail_ratio * torch.exp(log_w + log_upper_tail(side * a) - log_tail)
        of_mean = of_mean - grad_u * torch.exp(log_det)
        of_log_w = of_log_w + side * grad_u * (weight * tail_ratio - mass_ratio)
    of_mean = of_mean * share
    return -of_mean.sum(-1), of_log_w, of_mean, diff * of_mean - grad_log_p * share


def mixture_log_density(z: Tensor, log_w: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """log F'(z) = log sum_k w_k N(z; m_k, s_k^2), [N]."""
    a = (z[:, None] - mean) * torch.exp(-log_std)
    return torch.logsumexp(torch.log_softmax(log_w, -1) + log_standard_normal(a) - log_std, -1)


def mixture_cdf_inverse(u: Tensor, log_w: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """z [N] with F(z) = Phi(u), however far the scales are apart.

    1. Find which neighbouring means, or ends of the bracket (docs/math.md, eq. 20), enclose z.
    2. Bisect t, z = left + (right - left) / (1 + e^-t): near a mean, the log of the distance from
       it, so a scale of e^-12 is found as soon as one of e^12.
    3. Newton steps in noise space, where a single component is a straight line.
    """
    log_w = torch.log_softmax(log_w, -1)
    std = torch.exp(log_std)
    inv_std = torch.where(u < 0, -1.0, 1.0)[:, None] / std
    log_wanted = log_upper_tail(u.abs())

    def is_below(x: Tensor) -> Tensor:
        log_tail = torch.logsumexp(log_w + log_upper_tail((x[:, None] - mean) * inv_std), -1)
        return (log_tail > log_wanted) == (u >= 0)

    y_k = mean + std * u[:, None]
    ordered = mean.sort(-1).values.expand(len(u), -1)
    ends = torch.cat([y_k.amin(-1, True), ordered, y_k.amax(-1, True)], -1)
    first = torch.zeros_like(u, dtype=torch.long)
    last = first + mean.shape[-1] + 1
    for _ in range(mean.shape[-1].bit_length()):
        middle = (first + last) // 2
        below = is_below(ends.gather(-1, middle[:, None]).squeeze(-1))
        first, last = torch.where(below, middle, first), torch.where(below, last, middle)
    left, right = low, high = ends.gather(-1, torch.stack((first, last), -1)).unbind(-1)

    num_bisections, num_newton = STEPS[u.dtype]
    t = torch.zeros_like(u)
    step = torch.log((right - left).abs() / std.amin(-1)).clamp(min=0.0) + 4.0
    for _ in range(num_bisections):
        share = torch.sigmoid(-t.abs()) * (right - left)
        x = torch.where(t < 0, left + share, right - share)
        below = is_below(x)
        low, high = torch.where(below, x, low), torch.where(below, high, x)
        step = 0.5 * step
        t = torch.where(below, t + step, t - step)

    x = torch.lerp(low, high, 0.5)
    for _ in range(num_newton):
        v, log_det = mixture_cdf(x, log_w, mean, log_std)
        # not by mass, which is rounded differently
        low, high = torch.where(v < u, x, low), torch.where(v < u, high, x)
        x = x + (u - v) * torch.exp(-log_det)
        x = torch.where(x > low, torch.minimum(x, high), low)
    return torch.where(torch.isinf(u), u, x + 0.0 * log_w.amax(-1))  # NaN stays


# --- codebook mixtures


def bayes_update(log_alpha: Tensor, a: Tensor, log_std: Tensor) -> Tensor:
    """log alpha_k + log N(z_i; mu_ki, s_k^2) + log(2 pi) / 2, [N, K] (docs/math.md, eq. 9).

    Bayes' rule after channel i, whose standardised values are a [N, K]. The result still has to be
    normalised; its logsumexp, less log(2 pi) / 2, is log p_i.
    """
    return log_alpha - 0.5 * a * a - log_std


def rosenblatt(
    z: Tensor,
    log_w: Tensor,
    mean: Tensor,
    log_std: Tensor,
    scalar_map: Callable[..., tuple[Tensor, Tensor]] = mixture_cdf,
) -> tuple[Tensor, Tensor]:
    """u [N, d], log_det [N] of the Mix-d map, channel by channel (docs/math.md, eq. 9).

    Differentiable if `scalar_map` is.
    """
    log_alpha = torch.log_softmax(log_w, -1)
    inv_std = torch.exp(-log_std)
    log_p = torch.zeros_like(z[:, 0])
    channels = []
    for i in range(z.shape[-1]):
        channels.append(scalar_map(z[:, i], log_alpha, mean[:, i], log_std)[0])
        a = (z[:, i, None] - mean[:, i]) * inv_std
        log_alpha = bayes_update(log_alpha, a, log_std) - HALF_LOG_2PI
        log_p_i = torch.logsumexp(log_alpha, -1, keepdim=True)
        log_alpha = log_alpha - log_p_i
        log_p = log_p + log_p_i.squeeze(-1)
    u = torch.stack(channels, -1)
    return u, log_p - standard_normal_log_prob(u)


def rosenblatt_inverse(
    u: Tensor,
    log_w: Tensor,
    mean: Tensor,
    log_std: Tensor,
    scalar_inverse: Callable[..., Tensor] = mixture_cdf_inverse,
) -> Tensor:
    """z [N, d], by the same recursion; differentiable if `scalar_inverse` is."""
    log_alpha = torch.log_softmax(log_w, -1)
    inv_std = torch.exp(-log_std)
    channels = list[Tensor]()
    for i, u_i in enumerate(u.unbind(-1)):
        channels.append(scalar_inverse(u_i, log_alpha, mean[:, i], log_std))
        a = (channels[-1][:, None] - mean[:, i]) * inv_std
        log_alpha = bayes_update(log_alpha, a, log_std)
        log_alpha = log_alpha - torch.logsumexp(log_alpha, -1, keepdim=True)
    return torch.stack(channels, -1)
