r"""Every map of this package in log space: any range, no branch on data.

Read this file for the mathematics (docs/math.md, sections 3 and 8). It runs on accelerators, where
a branch would stop the device, and in the far tails on a CPU. The fast paths are tested against it.

a_k = (z - m_k) / s_k is a standardised value; for the other letters see `tarflowlm.flow.numerics`.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from tarflowlm.flow.numerics.normal import (
    HALF_LOG_2PI,
    log_standard_normal,
    log_upper_tail,
    standard_normal_log_prob,
    upper_quantile_of_log,
)

Params = tuple[Tensor, ...]
"""log_w, mean, log_std of scalar mixtures, each [N or 1, K]."""
Gradients = tuple[Tensor, ...]
"""Gradients of z [N] and of log_w, mean, log_std [N, K]."""
BISECTIONS = {torch.float32: 20, torch.float64: 22}
NEWTON_STEPS = {torch.float32: 3, torch.float64: 5}


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
        log_base = log_standard_normal(u)
        tail_ratio = torch.exp(log_tail - log_base)
        mass_ratio = torch.exp(log_w + log_upper_tail(side * a) - log_base)
        of_mean = of_mean - grad_u * torch.exp(log_det)
        of_log_w = of_log_w + side * grad_u * (weight * tail_ratio - mass_ratio)
    of_mean = of_mean * share
    return -of_mean.sum(-1), of_log_w, of_mean, diff * of_mean - grad_log_p * share


def mixture_log_density(z: Tensor, log_w: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """log F'(z) = log sum_k w_k N(z; m_k, s_k^2), [N]."""
    a = (z[:, None] - mean) * torch.exp(-log_std)
    return torch.logsumexp(torch.log_softmax(log_w, -1) + log_standard_normal(a) - log_std, -1)


def mixture_cdf_inverse(u: Tensor, log_w: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """z [N] with F(z) = Phi(u): bisections in the bracket of docs/math.md, eq. 20, then Newton.

    Mirrored to u >= 0, where the upper tail is the smaller one. Newton steps are taken in noise
    space, where a single component is a straight line: with v the noise of x, x moves by
    (u - v) N(v; 0, 1) / p(x).
    """
    log_w = torch.log_softmax(log_w, -1)
    inv_std = torch.exp(-log_std)
    side = torch.where(u < 0, -1.0, 1.0).to(u.dtype)
    y = u.abs()
    log_wanted = log_upper_tail(y)
    center = side[:, None] * mean
    candidates = center + y[:, None] / inv_std
    low, high = candidates.amin(-1), candidates.amax(-1)
    slack = rounding(low, high)
    for step in range(BISECTIONS[u.dtype] + NEWTON_STEPS[u.dtype]):
        is_newton = step >= BISECTIONS[u.dtype]
        if step <= BISECTIONS[u.dtype]:
            x = 0.5 * (low + high)
        a = (x[:, None] - center) * inv_std
        log_tail = torch.logsumexp(log_w + log_upper_tail(a), -1)
        above = log_tail > log_wanted
        low, high = torch.where(above, x, low), torch.where(above, high, x)
        if is_newton:
            log_density = torch.logsumexp(log_w + log_standard_normal(a) - log_std, -1)
            here = upper_quantile_of_log(log_tail)
            slope = torch.exp(log_standard_normal(here) - log_density)
            x = or_middle(x + (y - here) * slope, low, high, slack)
    return torch.where(torch.isinf(u), u, side * x)


def rounding(low: Tensor, high: Tensor) -> Tensor:
    """How far rounding may put values outside the bracket in which a search begins, [N]."""
    return torch.maximum(low.abs(), high.abs()) * (4.0 * torch.finfo(low.dtype).eps)


def or_middle(x: Tensor, low: Tensor, high: Tensor, slack: Tensor) -> Tensor:
    """x [N], or the midpoint of its bracket where it is more than `slack` outside, or NaN."""
    middle = torch.lerp(low, high, 0.5)
    # a converged x is itself an end of the bracket
    limit = torch.add(slack, high - low, alpha=0.501)
    return torch.where((x - middle).abs_() <= limit, x, middle)


# --- codebook mixtures


def bayes_update(log_alpha: Tensor, a: Tensor, log_std: Tensor) -> Tensor:
    """log alpha_k + log N(z_i; mu_ki, s_k^2) + log(2 pi) / 2, [N, K] (docs/math.md, eq. 9).

    Bayes' rule after channel i, whose standardised values are a [N, K]. The result still has to be
    normalised; its logsumexp gives log p_i.
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
