"""Plain log-space versions of the mixture flows: right, not yet fast."""

import math
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

Kind = Literal["normal", "logistic"]
_HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)


def _log_cdf(a: Tensor, kind: Kind) -> Tensor:
    return torch.special.log_ndtr(a) if kind == "normal" else functional.logsigmoid(a)


def _log_pdf(a: Tensor, kind: Kind) -> Tensor:
    if kind == "normal":
        return -0.5 * a * a - _HALF_LOG_2PI
    return functional.logsigmoid(a) + functional.logsigmoid(-a)


def _quantile_of_log_tail(log_q: Tensor, kind: Kind) -> Tensor:
    """x >= 0 with log(1 - CDF(x)) = log_q, by Newton steps on the log tail."""
    if kind == "logistic":
        return -log_q + torch.log1p(-torch.exp(log_q))
    with torch.no_grad():
        x = -torch.special.ndtri(torch.exp(log_q.clamp(min=-20.0)))
        far = (-2 * log_q - torch.log(-2 * log_q.clamp(max=-1.0)) - 2 * _HALF_LOG_2PI + 1e-3).clamp(min=0).sqrt()
        x = torch.where(log_q < -20, far, x)
        for _ in range(4):
            tail = torch.special.log_ndtr(-x)
            hazard = torch.exp(_log_pdf(x, kind) - tail)
            x = x + (tail - log_q) / hazard
        hazard = torch.exp(_log_pdf(x, kind) - torch.special.log_ndtr(-x))
    return x - (log_q - log_q.detach()) / hazard


def mixture_log_density(z: Tensor, log_w: Tensor, mean: Tensor, log_std: Tensor, *, kind: Kind = "normal") -> Tensor:
    a = (z[..., None] - mean) * torch.exp(-log_std)
    return torch.logsumexp(torch.log_softmax(log_w, -1) + _log_pdf(a, kind) - log_std, -1)


def mixture_cdf(
    z: Tensor, log_w: Tensor, mean: Tensor, log_std: Tensor, *, kind: Kind = "normal"
) -> tuple[Tensor, Tensor]:
    log_w = torch.log_softmax(log_w, -1)
    a = (z[..., None] - mean) * torch.exp(-log_std)
    lower = torch.logsumexp(log_w + _log_cdf(a, kind), -1)
    upper = torch.logsumexp(log_w + _log_cdf(-a, kind), -1)
    sign = torch.where(lower < upper, -1.0, 1.0).to(z.dtype)
    u = sign * _quantile_of_log_tail(torch.minimum(lower, upper), kind)
    log_p = torch.logsumexp(log_w + _log_pdf(a, kind) - log_std, -1)
    return u, log_p - _log_pdf(u, kind)


def mixture_cdf_inverse(
    u: Tensor, log_w: Tensor, mean: Tensor, log_std: Tensor, *, kind: Kind = "normal"
) -> Tensor:
    with torch.no_grad():
        candidates = mean + torch.exp(log_std) * u[..., None]
        low, high = candidates.amin(-1), candidates.amax(-1)
        for _ in range(50):
            mid = (low + high) / 2
            below = mixture_cdf(mid, log_w, mean, log_std, kind=kind)[0] < u
            low, high = torch.where(below, mid, low), torch.where(below, high, mid)
        z = (low + high) / 2
    if not (torch.is_grad_enabled() and any(t.requires_grad for t in (u, log_w, mean, log_std))):
        return z
    value, log_det = mixture_cdf(z, log_w, mean, log_std, kind=kind)
    return z - (value - value.detach() - (u - u.detach())) * torch.exp(-log_det.detach())


def log_component_densities(z: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    squares = ((z[..., None, :] - mean) ** 2).sum(-1)
    d = z.shape[-1]
    return -0.5 * squares * torch.exp(-2 * log_std) - d * (log_std + _HALF_LOG_2PI)


def mixture_log_prob(z: Tensor, log_w: Tensor | None, mean: Tensor, log_std: Tensor) -> Tensor:
    log_n = log_component_densities(z, mean, log_std)
    if log_w is None:
        return torch.logsumexp(log_n, -1)
    return torch.logsumexp(torch.log_softmax(log_w, -1) + log_n, -1)


def mixture_log_prob_from_features(
    z: Tensor,
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mean: Tensor,
    log_std: Tensor,
    *,
    chunk: int | None = None,
) -> Tensor:
    logits = functional.linear(features, weight, bias).to(z.dtype)
    return mixture_log_prob(z, logits, mean, log_std)


def rosenblatt(z: Tensor, log_w: Tensor, mean: Tensor, log_std: Tensor) -> tuple[Tensor, Tensor]:
    log_alpha, u, total = log_w, [], torch.zeros_like(z[..., 0])
    for i in range(z.shape[-1]):
        u_i, log_det = mixture_cdf(z[..., i], log_alpha, mean[:, i], log_std)
        a = (z[..., i, None] - mean[:, i]) * torch.exp(-log_std)
        log_alpha = log_alpha - 0.5 * a * a - log_std
        u.append(u_i)
        total = total + log_det
    return torch.stack(u, -1), total


def rosenblatt_inverse(u: Tensor, log_w: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    log_alpha, z = log_w, []
    for i in range(u.shape[-1]):
        z_i = mixture_cdf_inverse(u[..., i], log_alpha, mean[:, i].expand_as(log_w), log_std.expand_as(log_w))
        a = (z_i[..., None] - mean[:, i]) * torch.exp(-log_std)
        log_alpha = log_alpha - 0.5 * a * a - log_std
        z.append(z_i)
    return torch.stack(z, -1)
