r"""The two location-scale families of the mixture flows: standard normal and standard logistic.

Everything is written with the *upper tail* Q(a) = 1 - CDF(a); the lower one is Q(-a) by symmetry.

    normal     Q(a) = erfc(a / sqrt 2) / 2     pdf(a) = exp(-a^2 / 2) / sqrt(2 pi)      psi(a) = a
    logistic   Q(a) = sigmoid(-a)              pdf(a) = sigmoid(a) sigmoid(-a)          psi(a) = tanh(a / 2)

with psi = -d log pdf / da. All functions are elementwise and keep shape, dtype and device.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

Kind = Literal["normal", "logistic"]

_SQRT_HALF = math.sqrt(0.5)
_LOG_SQRT_2PI = 0.5 * math.log(2 * math.pi)


@dataclass(frozen=True)
class Family:
    """One family as plain functions of the standardised variable a (or of a tail mass q)."""

    name: Kind
    tail: Callable[[Tensor], Tensor]
    """Q(a), relative precision kept until it underflows."""
    log_tail: Callable[[Tensor], Tensor]
    """log Q(a), any a."""
    pdf: Callable[[Tensor], Tensor]
    """Density."""
    log_pdf: Callable[[Tensor], Tensor]
    """Log density."""
    score: Callable[[Tensor], Tensor]
    """psi(a) = -d log pdf / da."""
    upper_quantile: Callable[[Tensor], Tensor]
    """x >= 0 with Q(x) = q, for q in (0, 1/2]."""
    upper_quantile_log: Callable[[Tensor], Tensor]
    """x with Q(x) = exp(log_q), for log_q <= log(1/2), however small."""


def _normal_tail(a: Tensor) -> Tensor:
    return torch.erfc(a * _SQRT_HALF).mul_(0.5)


def _normal_log_tail(a: Tensor) -> Tensor:
    return torch.special.log_ndtr(-a)


def _normal_pdf(a: Tensor) -> Tensor:
    return (a * a).mul_(-0.5).exp_().mul_(1 / math.sqrt(2 * math.pi))


def _normal_log_pdf(a: Tensor) -> Tensor:
    return -0.5 * a * a - _LOG_SQRT_2PI


def _rational_start(t: Tensor) -> Tensor:
    """x with Q(x) = exp(-t^2 / 2) to 4.5e-4 (Abramowitz & Stegun 26.2.23)."""
    top = (t * 0.010328).add_(0.802853).mul_(t).add_(2.515517)
    bottom = (t * 0.001308).add_(0.189269).mul_(t).add_(1.432788).mul_(t).add_(1.0)
    return t - top.div_(bottom)


def _normal_upper_quantile(q: Tensor) -> Tensor:
    """Rational start, then Halley steps on Q(x) - q: cubic, so one is enough in float32, two in float64."""
    x = _rational_start(torch.log(q).mul_(-2.0).sqrt_())
    for _ in range(2 if q.dtype == torch.float64 else 1):
        newton = _normal_tail(x).sub_(q).div_(_normal_pdf(x))
        x = x + newton / (1.0 - 0.5 * x * newton)
    return x


def _normal_upper_quantile_log(log_q: Tensor) -> Tensor:
    """Newton steps on log Q(x) - log q, which is concave: at most quadratic error, never a wrong branch."""
    x = _rational_start(torch.sqrt(-2.0 * log_q))
    # The rational start is only fitted to q > 1e-30; beyond, the leading term of the asymptotic series is closer.
    square = (-2.0 * log_q).clamp(min=1.0)
    asymptotic = torch.sqrt((square - torch.log(square) - 2 * _LOG_SQRT_2PI).clamp(min=0.0))
    x = torch.where(log_q < -60.0, asymptotic, x)
    for _ in range(3):
        log_tail = torch.special.log_ndtr(-x)
        x = x + (log_tail - log_q) * torch.exp(log_tail - _normal_log_pdf(x))
    return torch.where(torch.isneginf(log_q), math.inf, x)


def _logistic_tail(a: Tensor) -> Tensor:
    return torch.sigmoid(-a)


def _logistic_log_tail(a: Tensor) -> Tensor:
    return functional.logsigmoid(-a)


def _logistic_pdf(a: Tensor) -> Tensor:
    return torch.sigmoid(a).mul_(torch.sigmoid(-a))


def _logistic_log_pdf(a: Tensor) -> Tensor:
    # Even in a and written with |a| so that neither sigmoid is the logarithm of zero.
    size = a.abs()
    return -size - 2.0 * torch.log1p(torch.exp(-size))


def _logistic_score(a: Tensor) -> Tensor:
    return torch.tanh(0.5 * a)


def _logistic_upper_quantile(q: Tensor) -> Tensor:
    return torch.log1p(-q) - torch.log(q)


def _logistic_upper_quantile_log(log_q: Tensor) -> Tensor:
    return torch.log1p(-torch.exp(log_q)) - log_q


NORMAL = Family(
    "normal",
    _normal_tail,
    _normal_log_tail,
    _normal_pdf,
    _normal_log_pdf,
    torch.clone,
    _normal_upper_quantile,
    _normal_upper_quantile_log,
)
LOGISTIC = Family(
    "logistic",
    _logistic_tail,
    _logistic_log_tail,
    _logistic_pdf,
    _logistic_log_pdf,
    _logistic_score,
    _logistic_upper_quantile,
    _logistic_upper_quantile_log,
)
_FAMILIES: dict[str, Family] = {"normal": NORMAL, "logistic": LOGISTIC}


def family(kind: str) -> Family:
    """The family of a name; ValueError for any other."""
    if kind not in _FAMILIES:
        raise ValueError(f"kind must be one of {sorted(_FAMILIES)}, got {kind!r}")
    return _FAMILIES[kind]
