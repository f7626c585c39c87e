r"""Every map of this package in log space: any range, no branch on data.

Read this file for the mathematics (docs/math.md, sections 3 and 8). It also runs on accelerators,
where a branch would stop the device and an erfcx is as cheap as an erfc, and in the far tails on a
CPU. The fast paths are tested against it: `cpu_forward`, `cpu_inverse`, `cpu_few_rows`, `sweep`.

a_k = (z - m_k) / s_k is a standardised value; for the other letters see `tarflowlm.flow.numerics`.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from tarflowlm.flow.numerics.normal import (
    HALF_LOG_2PI,
    log_standard_normal,
    log_standard_normal_vectors,
    log_upper_tail,
    upper_quantile_of_log,
)

Params = tuple[Tensor, ...]
"""log_w, mean, log_std of scalar mixtures, each [N or 1, K]."""
Gradients = tuple[Tensor, ...]
"""Gradients of z [N] and of log_w, mean, log_std [N, K]."""
ScalarMap = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
ScalarInverse = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
BISECTIONS = {torch.float32: 18, torch.float64: 20}
NEWTON_STEPS = {torch.float32: 4, torch.float64: 6}
TINY = {torch.float32: 1e-30, torch.float64: 1e-290}
"""Floor of a density that a Newton step divides by; the bracket then refuses the step."""


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


def mixture_cdf_backward(
    z: Tensor, params: Params, u: Tensor, log_det: Tensor, grad_u: Tensor, grad_log_p: Tensor
) -> Gradients:
    r"""Gradients of z, log_w, mean, log_std, from cotangents g_u of u and g_p of log p = log F'(z).

    With r_k = w_k N_k(z) / p (responsibilities), t_k the k-th component's mass beyond z on the
    smaller side sigma = +-1, T = sum_k w_k t_k, and H = g_u du/dz:

        mean_k     r_k (g_p a_k / s_k - H)
        log_std_k  (z - m_k) * (the line above) - g_p r_k
        log_w_k    g_p (r_k - w_k) + sigma g_u w_k (T - t_k) / N(u; 0, 1)
        z          -sum_k mean_k, since u and p stay when z and all m_k move together

    T and t_k belong to one tail, so nothing cancels in the far tails.
    """
    log_w, mean, log_std = params
    log_w = torch.log_softmax(log_w, -1)
    diff = z[:, None] - mean
    inv_std = torch.exp(-log_std)
    a = diff * inv_std
    share = torch.softmax(log_w + log_standard_normal(a) - log_std, -1)
    log_tail, side = (t[:, None] for t in smaller_tail(a, log_w))
    log_base = log_standard_normal(u)[:, None]
    tail_ratio = torch.exp(log_tail - log_base)
    mass_ratio = torch.exp(log_w + log_upper_tail(side * a) - log_base)
    grad_u = grad_u[:, None]
    grad_log_p = grad_log_p[:, None]
    slope = torch.exp(log_det)[:, None]
    of_mean = share * (grad_log_p * a * inv_std - grad_u * slope)
    of_log_std = diff * of_mean - grad_log_p * share
    weight = torch.exp(log_w)
    of_log_w = grad_log_p * (share - weight) + side * grad_u * (weight * tail_ratio - mass_ratio)
    return -of_mean.sum(-1), of_log_w, of_mean, of_log_std


def mixture_log_density(z: Tensor, log_w: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """log F'(z) = log sum_k w_k N(z; m_k, s_k^2), [N]."""
    a = (z[:, None] - mean) * torch.exp(-log_std)
    return torch.logsumexp(torch.log_softmax(log_w, -1) + log_standard_normal(a) - log_std, -1)


def mixture_log_density_backward(z: Tensor, params: Params, grad: Tensor) -> Gradients:
    """Gradients of z, log_w, mean, log_std: the formulas of `mixture_cdf_backward` at g_u = 0."""
    log_w, mean, log_std = params
    inv_std = torch.exp(-log_std)
    a = (z[:, None] - mean) * inv_std
    grad = grad[:, None]
    log_share = torch.log_softmax(log_w, -1) + log_standard_normal(a) - log_std
    share = grad * torch.softmax(log_share, -1)
    of_log_w = share - grad * torch.softmax(log_w, -1)
    of_mean = share * a * inv_std
    return -of_mean.sum(-1), of_log_w, of_mean, share * a * a - share


def mixture_cdf_inverse(u: Tensor, log_w: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """z [N] with F(z) = Phi(u): bisections in the bracket of docs/math.md, eq. 20, then Newton.

    Mirrored to u >= 0, where the upper tail is the smaller one.
    """
    log_w = torch.log_softmax(log_w, -1)
    inv_std = torch.exp(-log_std)
    side = torch.where(u < 0, -1.0, 1.0).to(u.dtype)
    y = u.abs()
    log_wanted = log_upper_tail(y)
    center = side[:, None] * mean
    candidates = center + y[:, None] / inv_std
    low, high = candidates.amin(-1), candidates.amax(-1)
    for _ in range(BISECTIONS[u.dtype]):
        x = 0.5 * (low + high)
        log_tail = torch.logsumexp(log_w + log_upper_tail((x[:, None] - center) * inv_std), -1)
        above = log_tail > log_wanted
        low, high = torch.where(above, x, low), torch.where(above, high, x)
    x = 0.5 * (low + high)
    step = NewtonStep(y, torch.exp(log_standard_normal(y) - log_wanted), low, high)
    for _ in range(NEWTON_STEPS[u.dtype]):
        a = (x[:, None] - center) * inv_std
        log_tail = torch.logsumexp(log_w + log_upper_tail(a), -1)
        log_density = torch.logsumexp(log_w + log_standard_normal(a) - log_std, -1)
        above = log_tail > log_wanted
        low, high = torch.where(above, x, low), torch.where(above, high, x)
        ratio = 2.0 * torch.exp((log_tail - log_density).clamp(max=-math.log(TINY[u.dtype])))
        x = step(x, log_tail - log_wanted, ratio, low, high)
    return torch.where(torch.isinf(u), u, side * x)


class NewtonStep:
    r"""Newton steps towards T(x) = Q(u), u >= 0, with T the upper tail; all [N].

    A step is taken in noise space, where a single component is a straight line. With
    L = log T(x) - log Q(u), hazard h = N(u) / Q(u), and curvature kappa = h (h - u) of -log Q at u,
    the noise that is still missing is e, and x moves by dx:

        L = h e - kappa e^2 / 2,   dx = e N(u - e) / p(x)

    `low` and `high` are the bracket in which the steps begin.
    """

    def __init__(self, u: Tensor, hazard: Tensor, low: Tensor, high: Tensor) -> None:
        self.hazard = hazard
        self.square = hazard * hazard
        # the least value of (h - kappa e)^2, where the quadratic model has no solution
        self.floor = self.square * 0.01
        self.twice_curvature = (self.square - hazard * u) * 2.0
        self.slack = torch.maximum(low.abs(), high.abs()) * (4.0 * torch.finfo(u.dtype).eps)

    def __call__(
        self, x: Tensor, excess: Tensor, ratio: Tensor, low: Tensor, high: Tensor
    ) -> Tensor:
        """The next x from `excess` L and `ratio` 2 T / p, in the bracket [low, high] of now.

        The bracket's midpoint where Newton would leave it.
        """
        slope = torch.addcmul(self.square, self.twice_curvature, excess, value=-1.0)
        slope = torch.maximum(slope, self.floor).sqrt_()
        following = (excess * slope).mul_(ratio).div_(slope + self.hazard).add_(x)
        middle = torch.lerp(low, high, 0.5)
        # a converged x is itself an end of the bracket: rounding must not count as leaving it
        limit = torch.add(self.slack, high - low, alpha=0.501)
        inside = torch.le((following - middle).abs_(), limit).to(x.dtype)
        # an infinite step is left out, too: 0 times infinity is not
        return torch.lerp(middle, following.nan_to_num_(), inside)


# --- codebook mixtures


def bayes_update(log_alpha: Tensor, a: Tensor, log_std: Tensor) -> Tensor:
    """log alpha_k + log N(z_i; mu_ki, s_k^2) + log(2 pi) / 2, [N, K] (docs/math.md, eq. 9).

    Bayes' rule after channel i, of which a [N, K] is standardised. The result still has to be
    normalised; its logsumexp gives log p_i.
    """
    return log_alpha - 0.5 * a * a - log_std


def rosenblatt(
    z: Tensor,
    log_w: Tensor,
    mean: Tensor,
    log_std: Tensor,
    scalar_map: ScalarMap = mixture_cdf,
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
    return u, log_p - log_standard_normal_vectors(u)


def rosenblatt_inverse(
    u: Tensor,
    log_w: Tensor,
    mean: Tensor,
    log_std: Tensor,
    scalar_inverse: ScalarInverse = mixture_cdf_inverse,
) -> Tensor:
    """z [N, d], by the same recursion; differentiable if `scalar_inverse` is."""
    mean = mean[None]
    log_std = log_std[None]
    inv_std = torch.exp(-log_std)
    log_alpha = log_w
    channels = list[Tensor]()
    for i in range(u.shape[-1]):
        if i:
            a = (channels[-1][:, None] - mean[..., i - 1]) * inv_std
            log_alpha = torch.log_softmax(bayes_update(log_alpha, a, log_std), -1)
        channels.append(scalar_inverse(u[:, i], log_alpha, mean[..., i], log_std))
    return torch.stack(channels, -1)
