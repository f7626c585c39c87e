r"""Mixtures over a whole vocabulary of isotropic Gaussians (docs/math.md, eq. 9 and 12), from logits or features.

    log p_mix(z) = log sum_k w_k N(z; mu_k, s_k^2 I)

The public functions, and their derivatives: the backward computes the tiles of the forward again (see `tiles`).

N rows (tokens), K components, d channels, E features: flat problems are z [N, d], mean [K, d], log_std [K], and the
weights come from log_w [N, K], or from features [N, E], weight [K, E], bias [K].
"""

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from tarflowlm.flow.numerics import layout
from tarflowlm.flow.numerics.autograd import first_derivatives, scale_gradients
from tarflowlm.flow.numerics.normal import (
    check_codebook,
    component_factors,
    component_factors_backward,
    log_component_densities,
    point_factors,
    point_factors_backward,
)
from tarflowlm.flow.numerics.tiles import (
    Factors,
    Gradients,
    Logits,
    accumulate_gradients,
    column_slices,
    log_sums,
    row_slices,
)
from tarflowlm.flow.precision import autocast_device, full_precision


def mixture_log_prob(z: Tensor, log_w: Tensor | None, mean: Tensor, log_std: Tensor) -> Tensor:
    r"""log p_mix(z) = log sum_k w_k N(z; mu_k, s_k^2 I), w = softmax(log_w) (docs/math.md, eq. 9).

    Without log_w all w_k are 1: the normaliser of the decoder (eq. 2).

    Shapes: z [..., d]; log_w [..., K]; mean [K, d]; log_std [K]; returns [...], nats. Float32 or float64; distances
    do not lose precision for small s. Memory: a tile of about 256 x 1024 elements on a CPU, however large K is.
    First derivatives only: a second backward raises RuntimeError. Errors: ValueError for shapes that do not fit.
    """
    check_codebook(z, mean, log_std)
    shape, flat = z.shape[:-1], z
    if log_w is None:
        flat = z.reshape(-1, z.shape[-1])
    else:
        shape, flat, log_w = layout.flatten_vectors(z, log_w, mean, log_std)
    tensors = (flat, mean, log_std, log_w, None, None, None)
    return _apply(_Problem(None, False, _needs(*tensors)), tensors, equal=False).view(shape)


def mixture_log_prob_from_features(
    z: Tensor,
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mean: Tensor,
    log_std: Tensor,
    *,
    relative: bool = False,
) -> Tensor:
    r"""`mixture_log_prob` with log_w = features @ weight.T + bias, which is never materialised beyond a tile.

    Shapes: z [..., d]; features [..., E]; weight [K, E]; bias [K] or None; mean [K, d]; log_std [K]; returns [...],
    nats, in z's dtype. Under autocast the head's products run in the autocast format; densities and logsumexps keep
    z's. Backward recomputes the tiles: one product more than a head that keeps its logits, and no [tokens, K] tensor.
    `relative` returns log p_mix(z) - log sum_k N(z; mu_k, s_k^2 I), which is log sum_k w_k p(k | z) under the decoder
    (docs/math.md, eq. 12), in nats: one sweep over the codebook serves both terms and their gradients.
    First derivatives only: a second backward raises RuntimeError. Errors: ValueError for shapes that do not fit.
    """
    check_codebook(z, mean, log_std)
    if features.shape[:-1] != z.shape[:-1] or weight.shape != (mean.shape[0], features.shape[-1]):
        raise ValueError(
            "need z [..., d], features [..., E], weight [K, E], mean [K, d]; "
            f"got {tuple(z.shape)}, {tuple(features.shape)}, {tuple(weight.shape)}, {tuple(mean.shape)}"
        )
    device = autocast_device(z)
    matmul = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
    shape = z.shape[:-1]
    flat_z, flat_features = z.reshape(-1, z.shape[-1]), features.reshape(-1, features.shape[-1])
    tensors = (flat_z, mean, log_std, None, flat_features, weight, bias)
    return _apply(_Problem(matmul, relative, _needs(*tensors)), tensors, False).view(shape)


@torch.no_grad()
def most_probable_component(z: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """argmax_k N(z; mu_k, s_k^2 I), the first of equals: the mode of the decoder (docs/math.md, eq. 2).

    Shapes: z [..., d]; mean [K, d]; log_std [K]; returns [...], int64. Tile by tile. NaN in a row gives component 0.
    Errors: ValueError for shapes that do not fit.
    """
    check_codebook(z, mean, log_std)
    flat = z.reshape(-1, z.shape[-1])
    best = torch.full((len(flat),), -torch.inf, dtype=z.dtype, device=z.device)
    index = torch.zeros(len(flat), dtype=torch.int64, device=z.device)
    for rows in row_slices(len(flat), len(mean), z.device):
        for columns in column_slices(len(mean), z.device):
            log_density = log_component_densities(flat[rows], mean[columns], log_std[columns])
            place = log_density.argmax(1)
            value = log_density.gather(1, place[:, None]).squeeze(1)
            # Strictly: of equals the first stays, and what is not a number is never taken.
            larger = value > best[rows]
            index[rows] = torch.where(larger, place + columns.start, index[rows])
            best[rows] = torch.where(larger, value, best[rows])
    return index.view(z.shape[:-1])


Codebook = tuple[Tensor, Tensor, Tensor]
"""z, mean, log_std."""
Head = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]
"""log_w, features, weight, bias."""


class _Problem(NamedTuple):
    """What is not a tensor."""

    matmul: torch.dtype | None
    relative: bool
    needs: tuple[bool, ...]
    """Which of z, mean, log_std, log_w, features, weight, bias want a gradient."""

    def logits(
        self, log_w: Tensor | None, features: Tensor | None, weight: Tensor | None, bias: Tensor | None
    ) -> Logits:
        if features is None or weight is None:
            return Logits(log_w=log_w)
        return Logits(None, features.to(self.matmul), weight.to(self.matmul), bias)

    def value(self, sums: Tensor) -> Tensor:
        log_p = sums[0] - sums[1]
        return log_p - sums[2] if self.relative else log_p

    def zeros(self, factors: Factors, head: Head, dtype: torch.dtype) -> Gradients:
        of_head = (
            torch.zeros(t.shape, dtype=dtype, device=t.device) if t is not None and need else None
            for t, need in zip(head, self.needs[3:], strict=True)
        )
        return Gradients(
            torch.zeros_like(factors.points) if self.needs[0] else None,
            torch.zeros_like(factors.components) if self.needs[1] or self.needs[2] else None,
            *of_head,
        )


class _MixtureLogProb(Function):
    @staticmethod
    def forward(ctx: Any, problem: _Problem, *tensors: Tensor | None) -> Tensor:
        codebook, head = _split(tensors)
        z = codebook[0]
        with full_precision(z):
            sums = log_sums(problem.logits(*head), _factors(*codebook), z.dtype, problem.relative)
        ctx.problem = problem
        ctx.save_for_backward(*tensors, sums)
        return problem.value(sums)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return None, *first_derivatives(partial(_gradients, ctx.problem), grad.contiguous(), *ctx.saved_tensors)


def _gradients(problem: _Problem, grad: Tensor, *saved: Tensor | None) -> tuple[Tensor | None, ...]:
    codebook, head = _split(saved[:7])
    sums = saved[7]
    assert sums is not None
    with full_precision(grad):
        factors = _factors(*codebook)
        out = problem.zeros(factors, head, grad.dtype)
        accumulate_gradients(problem.logits(*head), factors, sums, grad, out, problem.relative)
        return _to_inputs(out, codebook, head)


class _EqualMixtureLogProb(Function):
    """The same value; gradients are formed in the forward, for cotangents that are all equal."""

    @staticmethod
    def forward(ctx: Any, problem: _Problem, *tensors: Tensor | None) -> Tensor:
        codebook, head = _split(tensors)
        z = codebook[0]
        with full_precision(z):
            factors = _factors(*codebook)
            out = problem.zeros(factors, head, z.dtype)
            sums = log_sums(problem.logits(*head), factors, z.dtype, problem.relative, out)
            grads = _to_inputs(out, codebook, head)
        ctx.save_for_backward(*grads)
        return problem.value(sums)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return None, *first_derivatives(scale_gradients, grad, *ctx.saved_tensors)


def _factors(z: Tensor, mean: Tensor, log_std: Tensor) -> Factors:
    return Factors(point_factors(z), component_factors(mean, log_std))


def _to_inputs(gradients: Gradients, codebook: Codebook, head: Head) -> tuple[Tensor | None, ...]:
    """From gradients of the factors to those of z, mean, log_std (wide: there they cancel), and casts."""
    z, mean, log_std = codebook
    of_points, of_components = gradients[:2]
    of_z = None if of_points is None else point_factors_backward(z, of_points).to(z.dtype)
    of_mean, of_log_std = None, None
    if of_components is not None:
        wide_mean, wide_log_std = component_factors_backward(mean, log_std, of_components)
        of_mean, of_log_std = wide_mean.to(mean.dtype), wide_log_std.to(log_std.dtype)
    of_head = (None if g is None or t is None else g.to(t.dtype) for t, g in zip(head, gradients[2:], strict=True))
    return of_z, of_mean, of_log_std, *of_head


def _split(tensors: tuple[Tensor | None, ...]) -> tuple[Codebook, Head]:
    z, mean, log_std, log_w, features, weight, bias = tensors
    assert z is not None
    assert mean is not None
    assert log_std is not None
    return (z, mean, log_std), (log_w, features, weight, bias)


def _apply(problem: _Problem, tensors: tuple[Tensor | None, ...], equal: bool) -> Tensor:
    return (_EqualMixtureLogProb if equal and any(problem.needs) else _MixtureLogProb).apply(problem, *tensors)


def _needs(*tensors: Tensor | None) -> tuple[bool, ...]:
    return tuple(torch.is_grad_enabled() and t is not None and t.requires_grad for t in tensors)
