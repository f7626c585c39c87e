r"""Every map of this package in log space: any range, no branch on data.

Read this file for the mathematics (docs/math.md, sections 3 and 8). It also runs on accelerators,
where a branch would stop the device and an erfcx is as cheap as an erfc, and in the far tails on a
CPU. The fast paths are tested against it: `cpu_forward`, `cpu_inverse`, `cpu_few_rows` and
`rosenblatt_forward`.

N rows, K components, d channels. Scalar mixtures: z, u [N]; log_w (unnormalised), mean, log_std [N
or 1, K]. Codebook mixtures: z, u [N, d]; log_w [N, K]; mean [K, d]; log_std [K]. Densities are in
nats, and a_k = (z - m_k) / s_k is a standardised value, Q the upper tail of the standard normal.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tarflowlm.flow import wide_dtype
from tarflowlm.flow.numerics import layout, normal
from tarflowlm.flow.numerics.normal import (
    HALF_LOG_2PI,
    log_standard_normal,
    log_upper_tail,
    upper_quantile_of_log,
)

Gradients = tuple[Tensor, Tensor, Tensor, Tensor]
"""Gradients of z [N], log_w, mean, log_std."""
BISECTIONS = {torch.float32: 18, torch.float64: 20}
NEWTON_STEPS = {torch.float32: 4, torch.float64: 6}
TINY = {torch.float32: 1e-30, torch.float64: 1e-290}
"""Floor of a density one divides by, in a Newton step that the bracket then refuses."""
FEWEST = 64
"""Of fewer components none are left out."""


def smaller_tail(a: Tensor, log_w: Tensor) -> tuple[Tensor, Tensor]:
    """Log mass of the mixture beyond z on its smaller side, and that side (+1 upper, -1 lower),
    [N]. A sum of positive terms keeps its relative precision. a [N, K] standardised, log_w [N or 1,
    K] normalised.
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
    log_det = torch.logsumexp(log_w + log_standard_normal(a) - log_std, -1) - log_standard_normal(u)
    # at z = +-inf, du/dz tends to 1 / (the largest scale), which inf - inf cannot say
    return u, torch.where(torch.isinf(z), -log_std.amax(-1), log_det)


def mixture_cdf_backward(
    z: Tensor,
    params: tuple[Tensor, ...],
    u: Tensor,
    log_det: Tensor,
    grad_u: Tensor,
    grad_log_p: Tensor,
) -> Gradients:
    r"""Gradients [N], 3 x [N, K] of z, log_w, mean, log_std, from cotangents g_u of u and g_p of
    log p = log F'(z).

    With r_k = w_k N_k(z) / p (responsibilities), t_k the k-th component's mass beyond z on the
    smaller side sigma = +-1, T = sum_k w_k t_k, and H = g_u du/dz:

        mean_k     r_k (g_p a_k / s_k - H)
        log_std_k  (z - m_k) * (the line above) - g_p r_k
        log_w_k    g_p (r_k - w_k) + sigma g_u w_k (T - t_k) / N(u; 0, 1)
        z          - sum_k mean_k                        (u and p do not change when z and all m_k
        move together)

    T and t_k belong to one tail, so nothing cancels in the far tails.
    """
    log_w, mean, log_std = params
    log_w = torch.log_softmax(log_w, -1)
    diff, inv_std = z[:, None] - mean, torch.exp(-log_std)
    a = diff * inv_std
    share = torch.softmax(log_w + log_standard_normal(a) - log_std, -1)
    log_tail, side = (t[:, None] for t in smaller_tail(a, log_w))
    log_base = log_standard_normal(u)[:, None]
    tail_ratio = torch.exp(log_tail - log_base)
    mass_ratio = torch.exp(log_w + log_upper_tail(side * a) - log_base)
    grad_u, grad_log_p, slope = grad_u[:, None], grad_log_p[:, None], torch.exp(log_det)[:, None]
    of_mean = share * (grad_log_p * a * inv_std - grad_u * slope)
    of_log_std = diff * of_mean - grad_log_p * share
    weight = torch.exp(log_w)
    of_log_w = grad_log_p * (share - weight) + side * grad_u * (weight * tail_ratio - mass_ratio)
    return -of_mean.sum(-1), of_log_w, of_mean, of_log_std


def mixture_log_density(z: Tensor, log_w: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """log F'(z) = log sum_k w_k N(z; m_k, s_k^2), [N]."""
    log_w = torch.log_softmax(log_w, -1)
    return torch.logsumexp(
        log_w + log_standard_normal((z[:, None] - mean) * torch.exp(-log_std)) - log_std, -1
    )


def mixture_log_density_backward(z: Tensor, params: tuple[Tensor, ...], grad: Tensor) -> Gradients:
    """Gradients [N], 3 x [N, K] of z, log_w, mean, log_std: those of `mixture_cdf_backward` with
    g_u = 0.
    """
    log_w, mean, log_std = params
    inv_std = torch.exp(-log_std)
    a = (z[:, None] - mean) * inv_std
    share = grad[:, None] * torch.softmax(
        torch.log_softmax(log_w, -1) + log_standard_normal(a) - log_std, -1
    )
    of_scale, of_log_w = share * a, share - grad[:, None] * torch.softmax(log_w, -1)
    of_mean = of_scale * inv_std
    return -of_mean.sum(-1), of_log_w, of_mean, of_scale * a - share


def mixture_cdf_inverse(u: Tensor, log_w: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """z [N] with F(z) = Phi(u): bisections inside the bracket of docs/math.md, eq. 20, then Newton
    steps; mirrored to u >= 0, where the upper tail is the smaller one.
    """
    log_w, inv_std = torch.log_softmax(log_w, -1), torch.exp(-log_std)
    side, y = torch.where(u < 0, -1.0, 1.0).to(u.dtype), u.abs()
    log_wanted, center = log_upper_tail(y), side[:, None] * mean
    candidates = center + y[:, None] / inv_std
    low, high = candidates.amin(-1), candidates.amax(-1)
    for _ in range(BISECTIONS[u.dtype]):
        x = 0.5 * (low + high)
        log_tail = torch.logsumexp(log_w + log_upper_tail((x[:, None] - center) * inv_std), -1)
        above = log_tail > log_wanted
        low, high = torch.where(above, x, low), torch.where(above, high, x)
    x = 0.5 * (low + high)
    step = newton_step(y, torch.exp(log_standard_normal(y) - log_wanted), low, high)
    for _ in range(NEWTON_STEPS[u.dtype]):
        a = (x[:, None] - center) * inv_std
        log_tail = torch.logsumexp(log_w + log_upper_tail(a), -1)
        log_density = torch.logsumexp(log_w + log_standard_normal(a) - log_std, -1)
        above = log_tail > log_wanted
        low, high = torch.where(above, x, low), torch.where(above, high, x)
        ratio = 2.0 * torch.exp((log_tail - log_density).clamp(max=-math.log(TINY[u.dtype])))
        x = step(x, log_tail - log_wanted, ratio, low, high)
    return torch.where(torch.isinf(u), u, side * x)


def newton_step(u: Tensor, hazard: Tensor, low: Tensor, high: Tensor) -> Callable[..., Tensor]:
    r"""A Newton step towards T(x) = Q(u), u >= 0, T the upper tail, in the bracket [low, high] of
    now; all [N].

    The step is taken in noise space, where a single component is a straight line: with L = log T(x)
    - log Q(u), `hazard` h = N(u) / Q(u) and curvature kappa = h (h - u) of -log Q at u, the noise
    still missing is e from L = h e - kappa e^2 / 2, and dx = e N(u - e) / p(x).
    """
    square = hazard * hazard
    # least value of (h - kappa e)^2, where the quadratic model has no solution; 2 kappa
    floor, bend = square * 0.01, (square - hazard * u) * 2.0
    slack = torch.maximum(low.abs(), high.abs()) * (4.0 * torch.finfo(u.dtype).eps)

    def step(x: Tensor, excess: Tensor, ratio: Tensor, low: Tensor, high: Tensor) -> Tensor:
        """The next x from `excess` L and `ratio` 2 T / p; the bracket's midpoint where Newton would
        leave it.
        """
        slope = torch.maximum(torch.addcmul(square, bend, excess, value=-1.0), floor).sqrt_()
        following = (excess * slope).mul_(ratio).div_(slope + hazard).add_(x)
        middle = torch.lerp(low, high, 0.5)
        # a converged x is itself an end of the bracket: rounding must not count as leaving it
        limit = torch.add(slack, high - low, alpha=0.501)
        inside = torch.le((following - middle).abs_(), limit).to(x.dtype)
        # an infinite step is left out, too: 0 times infinity is not
        return torch.lerp(middle, following.nan_to_num_(), inside)

    return step


def bayes_update(log_alpha: Tensor, a: Tensor, log_std: Tensor) -> Tensor:
    """log alpha_k + log N(z_i; mean_ki, s_k^2) + log(2 pi) / 2, [N, K]: Bayes' rule of
    docs/math.md, eq. 9.

    a [N, K] is channel i standardised. The result still has to be normalised; its logsumexp gives
    log p_i.
    """
    return log_alpha - 0.5 * a * a - log_std


def rosenblatt(
    z: Tensor,
    log_w: Tensor,
    mean: Tensor,
    log_std: Tensor,
    scalar_map: Callable[..., Any] = mixture_cdf,
) -> tuple[Tensor, Tensor]:
    """u [N, d], log_det [N] of the Mix-d map by channels (docs/math.md, eq. 9); differentiable if
    `scalar_map` is.
    """
    log_alpha = torch.log_softmax(log_w, -1)
    inv_std, channels, log_p = torch.exp(-log_std), [], torch.zeros_like(z[:, 0])
    for i in range(z.shape[-1]):
        channels.append(scalar_map(z[:, i], log_alpha, mean[:, i], log_std)[0])
        a = (z[:, i, None] - mean[:, i]) * inv_std
        log_alpha = bayes_update(log_alpha, a, log_std) - HALF_LOG_2PI
        log_p_i = torch.logsumexp(log_alpha, -1, keepdim=True)
        log_alpha = log_alpha - log_p_i
        log_p = log_p + log_p_i.squeeze(-1)
    u = torch.stack(channels, -1)
    return u, log_p - normal.log_standard_normal_vectors(u)


@torch.no_grad()
def rosenblatt_forward(
    z: Tensor, log_w: Tensor, mean: Tensor, log_std: Tensor
) -> tuple[Tensor, Tensor]:
    r"""u [N, d] and log p_mix(z) [N] of the Mix-d map without autograd: one sweep over the
    channels, in linear space.

    As z is known, every component has its own weights, and a channel takes three sums over them:

        alpha_k^(i) = w_k prod_{j<i} N(z_j; mean_kj, s_k^2),   T_i = sum_k alpha_k^(i) Q(a_ki) /
        sum_k alpha_k^(i)

    They are held relative to those of the component b that is nearest to z. It is also known how
    far the weight of b falls by the last channel, next to the largest density that a channel of any
    component can have. What is `reach` below that can be left out from there on. Once few
    components are left, the other channels are summed over the remaining pairs of rows and
    components. Rows where a tail is below exp(-ROOM) are left to `rosenblatt`.
    """
    dim, pairs = z.shape[1], list[Tensor]()
    best = (
        normal.point_factors(z).float() @ normal.component_factors(mean, log_std).float().T
    ).argmax(-1)
    inv_std, own = torch.exp(-log_std) * normal.SQRT_HALF, log_std[best, None]
    falls = ((z - mean[best]) * inv_std[best, None]).square().add_(own)
    left = torch.arange(dim - 1, -1, -1, device=z.device)
    rests = falls.sum(-1, keepdim=True) - falls.cumsum(-1) - left * log_std.amin()
    log_alpha = torch.log_softmax(log_w, -1)
    log_p = (
        log_alpha.gather(-1, best[:, None]) - falls.sum(-1, keepdim=True) - dim * HALF_LOG_2PI
    )  # of b
    log_alpha -= log_alpha.gather(-1, best[:, None])
    tail, side, ones = torch.empty_like(z), torch.empty_like(z), torch.ones_like(log_std)
    by_component = torch.stack((ones, -log_std))
    for i in range(dim):
        alpha = exp_clamped(log_alpha)
        total, first = (alpha @ torch.stack((ones, mean[:, i]), -1)).unbind(-1)
        # the tail beyond z as seen from the mixture's mean, which usually is the smaller one
        side[:, i] = torch.where(z[:, i] * total < first, -1.0, 1.0)
        sign = side[:, i, None]
        a = torch.addcmul(sign * z[:, i, None], sign, mean[:, i], value=-1.0).mul_(inv_std)
        log_alpha.addcmul_(a, a, value=-1.0)
        # the sum of a row's and a component's number as a product, which needs one pass
        log_alpha.addmm_(torch.stack((falls[:, i], torch.ones_like(total)), -1), by_component)
        tail[:, i] = 0.5 * alpha.mul_(erfc_clamped_(a)).sum(-1) / total
        if len(mean) >= FEWEST and 2 <= i < dim - 1:
            alive = log_alpha >= -(rests[:, i, None] + normal.reach(z.dtype, len(mean)))
            # no tensor over pairs and channels is then larger than those over rows and components
            if alive.sum() * (dim - i) <= alive.numel():
                pairs += alive.nonzero().unbind(-1)
                break
    if pairs:
        over = z, log_alpha[*pairs], pairs[0], pairs[1], mean, log_std, falls, tail, side
        total = _rosenblatt_over_pairs(*over, start=i + 1)
    else:
        total = exp_clamped(log_alpha).sum(-1)
    log_p = torch.log(total) + log_p.squeeze(-1)
    is_larger = tail > 0.5
    log_tail = torch.where(is_larger, torch.log1p(-tail), torch.log(tail))
    u = torch.where(is_larger, -side, side) * upper_quantile_of_log(log_tail)
    # negated, so that NaN is left to the general path
    fine = ((tail >= math.exp(-normal.ROOM)) & (tail <= 0.95)).all(-1) & torch.isfinite(log_p)
    if len(rest := (~fine).nonzero().squeeze(-1)):
        z, log_w, mean, log_std = (
            t.to(wide_dtype(z)) for t in (z[rest], log_w[rest], mean, log_std)
        )
        found, log_det = rosenblatt(z, log_w, mean, log_std)
        u[rest] = found.to(u.dtype)
        log_p[rest] = (log_det + normal.log_standard_normal_vectors(found)).to(u.dtype)
    return u, log_p


def _rosenblatt_over_pairs(
    z: Tensor,
    log_alpha: Tensor,
    rows: Tensor,
    components: Tensor,
    mean: Tensor,
    log_std: Tensor,
    falls: Tensor,
    tail: Tensor,
    side: Tensor,
    start: int,
) -> Tensor:
    """Fills `tail` and `side` from channel `start` on, by sums over pairs, whose weights there are
    log_alpha [M]. Returns the sum of the last weights, [N].
    """
    own = log_std[components, None]
    a = (z[rows, start:] - mean[components, start:]).mul_(torch.exp(-own) * normal.SQRT_HALF)
    steps = torch.addcmul(falls[rows, start:] - own, a, a, value=-1.0)
    alpha, mass = (
        exp_clamped(log_alpha[:, None] + F.pad(steps.cumsum(-1), (1, 0))),
        erfc_clamped_(a.abs()),
    )
    sums = alpha.new_zeros(len(z), alpha.shape[1]).index_add_(0, rows, alpha)
    alpha = alpha[:, :-1]
    upper, lower = (
        torch.zeros_like(sums[:, :-1]).index_add_(
            0, rows, alpha * torch.where(beyond, mass, 2.0 - mass)
        )
        for beyond in (a > 0, a <= 0)
    )
    tail[:, start:] = 0.5 * torch.minimum(upper, lower) / sums[:, :-1]
    side[:, start:] = torch.where(upper <= lower, 1.0, -1.0)
    return sums[:, -1]


def exp_clamped(x: Tensor) -> Tensor:
    """exp(x), floored on a CPU, where one that underflows is slow."""
    return (
        torch.clamp(x, min=layout.LOWEST_EXPONENT[x.dtype]).exp_()
        if layout.use_eager_cpu(x)
        else torch.exp(x)
    )


def erfc_clamped_(a: Tensor) -> Tensor:
    """erfc(a), in place, of a clipped on a CPU for the same reason."""
    return (normal.clamp_(a) if layout.use_eager_cpu(a) else a).erfc_()


def rosenblatt_inverse(
    u: Tensor,
    log_w: Tensor,
    mean: Tensor,
    log_std: Tensor,
    scalar_inverse: Callable[..., Any] = mixture_cdf_inverse,
) -> Tensor:
    """z [N, d]: the recursion of docs/math.md, eq. 9, channel by channel; differentiable if
    `scalar_inverse` is.
    """
    mean, log_std = mean[None], log_std[None]
    log_alpha, channels, inv_std = log_w, [], torch.exp(-log_std)
    for i in range(u.shape[-1]):
        channels.append(scalar_inverse(u[:, i], log_alpha, mean[..., i], log_std))
        if i + 1 < u.shape[-1]:
            a = (channels[i][:, None] - mean[..., i]) * inv_std
            log_alpha = torch.log_softmax(bayes_update(log_alpha, a, log_std), -1)
    return torch.stack(channels, -1)
