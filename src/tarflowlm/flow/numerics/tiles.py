r"""log p_mix, tile by tile: no [tokens, K] tensor ever exists, forward or backward.

    log p_n = logsumexp_k (x_nk + log N_nk) - logsumexp_k x_nk

with logits x from a `Logits` source and log N from the codebook's factors A . B (see `codebook`). The forward keeps
two running logsumexps per token, the backward recomputes each tile and spends it at once:

    d log p_n / d x_nk = r_nk - pi_nk,    d log p_n / d (A . B)_nk = r_nk     (posterior r, prior pi)
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from tarflowlm.flow.numerics.layout import LOWEST_EXPONENT

_TILE = {"cpu": (256, 1024)}
_TILE_ACCELERATOR = (1024, 16_384)
"""Tokens and components of a tile. On a CPU one tile of float32 and one of float64 stay in the second-level cache; an
accelerator wants matrix products large enough to fill it."""


class Logits(NamedTuple):
    """Where the weights' logits come from: a tensor, a linear head, or nothing (all weights one)."""

    log_w: Tensor | None = None
    """[N, K]."""
    features: Tensor | None = None
    """[N, E], in the format of the matrix product."""
    weight: Tensor | None = None
    """[K, E], same format."""
    bias: Tensor | None = None
    """[K] or None."""

    def tile(self, rows: slice, columns: slice, dtype: torch.dtype) -> Tensor | None:
        """x [n, k] as a new tensor of `dtype`; None where all logits are zero and the prior is not normalised."""
        if self.log_w is not None:
            return self.log_w[rows, columns].to(dtype, copy=True)
        if self.features is None or self.weight is None:
            return None
        x = (self.features[rows] @ self.weight[columns].T).to(dtype)
        return x if self.bias is None else x.add_(self.bias[columns])


class Factors(NamedTuple):
    """log N = points @ components.T, both in the wide format."""

    points: Tensor
    """[N, d + 2]."""
    components: Tensor
    """[K, d + 2]."""

    def tile(self, rows: slice, columns: slice, dtype: torch.dtype) -> Tensor:
        """log N [n, k]."""
        return (self.points[rows] @ self.components[columns].T).to(dtype)


class Gradients(NamedTuple):
    """What the backward adds up; None where nobody asked."""

    points: Tensor | None
    components: Tensor | None
    log_w: Tensor | None
    features: Tensor | None
    weight: Tensor | None
    bias: Tensor | None


def tiles(num_rows: int, num_components: int, device: torch.device, chunk: int | None) -> Iterator[tuple[slice, slice]]:
    """Row-major tiles; `chunk` overrides the tokens per tile. Few components leave room for more rows."""
    rows, columns = _TILE.get(device.type, _TILE_ACCELERATOR)
    if num_components < columns:
        rows = max(rows, rows * columns // max(1, num_components))
    rows = chunk or rows
    for i in range(0, num_rows, rows):
        for k in range(0, num_components, columns):
            yield slice(i, min(i + rows, num_rows)), slice(k, min(k + columns, num_components))


class RunningLogSumExp:
    """logsumexp over K of tiles that come one after the other; [N]."""

    def __init__(self, like: Tensor, num_rows: int, dtype: torch.dtype) -> None:
        self._top = torch.full((num_rows,), -torch.inf, dtype=dtype, device=like.device)
        self._sum = torch.zeros(num_rows, dtype=dtype, device=like.device)

    def add_(self, rows: slice, x: Tensor, out: Tensor) -> None:
        """Takes one tile in; `out` is scratch of its shape and may be `x` itself."""
        old = self._top[rows]
        top = torch.maximum(old, x.amax(1))
        # -inf - -inf is NaN: rows without any weight so far are shifted by zero instead.
        shift = torch.where(torch.isneginf(top), 0.0, top)
        part = torch.sub(x, shift[:, None], out=out).clamp_(min=LOWEST_EXPONENT[x.dtype]).exp_().sum(1)
        self._sum[rows] = self._sum[rows] * torch.exp(old - shift) + part
        self._top[rows] = top

    def value(self) -> Tensor:
        return self._top + torch.log(self._sum)


def log_sums(logits: Logits, factors: Factors, dtype: torch.dtype, chunk: int | None) -> tuple[Tensor, Tensor]:
    """logsumexp(x + log N) and logsumexp(x) over K, [N] each (the second is zero without logits)."""
    num_rows, num_components = factors.points.shape[0], factors.components.shape[0]
    joint = RunningLogSumExp(factors.points, num_rows, dtype)
    prior = RunningLogSumExp(factors.points, num_rows, dtype)
    for rows, columns in tiles(num_rows, num_components, factors.points.device, chunk):
        v = factors.tile(rows, columns, dtype)
        x = logits.tile(rows, columns, dtype)
        if x is not None:
            v.add_(x)
            prior.add_(rows, x, x)
        joint.add_(rows, v, v)
    none = logits.log_w is None and logits.features is None
    return joint.value(), torch.zeros_like(joint.value()) if none else prior.value()


def pull_back(
    logits: Logits,
    factors: Factors,
    log_joint: Tensor,
    log_prior: Tensor,
    grad: Tensor,
    out: Gradients,
    chunk: int | None,
) -> None:
    """Adds the gradients of sum_n grad_n log p_n to `out`, tile by tile."""
    num_rows, num_components = factors.points.shape[0], factors.components.shape[0]
    for rows, columns in tiles(num_rows, num_components, factors.points.device, chunk):
        scale = grad[rows, None]
        v = factors.tile(rows, columns, grad.dtype)
        x = logits.tile(rows, columns, grad.dtype)
        if x is not None:
            v.add_(x)
        share = v.sub_(log_joint[rows, None]).clamp_(min=LOWEST_EXPONENT[grad.dtype]).exp_().mul_(scale)
        _pull_factors(share, factors, rows, columns, out)
        if x is not None:
            prior = x.sub_(log_prior[rows, None]).clamp_(min=LOWEST_EXPONENT[grad.dtype]).exp_().mul_(scale)
            _pull_logits(share.sub_(prior), logits, rows, columns, out)


def _pull_factors(share: Tensor, factors: Factors, rows: slice, columns: slice, out: Gradients) -> None:
    if out.points is None and out.components is None:
        return
    share = share.to(factors.points.dtype)
    if out.points is not None:
        out.points[rows].addmm_(share, factors.components[columns])
    if out.components is not None:
        out.components[columns].addmm_(share.T, factors.points[rows])


def _pull_logits(x_grad: Tensor, logits: Logits, rows: slice, columns: slice, out: Gradients) -> None:
    if out.log_w is not None:
        out.log_w[rows, columns] = x_grad
    if out.bias is not None:
        out.bias[columns] += x_grad.sum(0)
    if logits.features is None or logits.weight is None:
        return
    x_grad = x_grad.to(logits.features.dtype)
    if out.features is not None:
        out.features[rows] += x_grad @ logits.weight[columns]
    if out.weight is not None:
        out.weight[columns] += x_grad.T @ logits.features[rows]
