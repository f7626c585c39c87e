r"""The Mix-d log-likelihood log p_mix(z) = log sum_k w_k N(z; mu_k, sigma_k^2 I), from logits or from features.

Paper: sec. 3.2.2 (eq. 8) and the first term of eq. 9. Gradients are recomputed tile by tile (see `tiles`).
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from tarflowlm.flow.numerics.codebook import check_codebook, component_factors, point_factors
from tarflowlm.flow.numerics.tiles import Factors, Gradients, Logits, log_sums, pull_back


def _logits(log_w: Tensor | None, features: Tensor | None, weight: Tensor | None, bias: Tensor | None,
            matmul: torch.dtype | None) -> Logits:
    if features is None or weight is None:
        return Logits(log_w=log_w)
    return Logits(None, features.to(matmul), weight.to(matmul), bias)


class _MixtureLogProb(Function):
    """Flat rows: z [N, d]; the weights from log_w [N, K], or from features [N, E], weight [K, E], bias [K]."""

    @staticmethod
    def forward(
        ctx: Any,
        z: Tensor,
        mean: Tensor,
        log_std: Tensor,
        log_w: Tensor | None,
        features: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        matmul: torch.dtype | None,
        chunk: int | None,
    ) -> Tensor:
        with torch.autocast(z.device.type, enabled=False):
            factors = Factors(point_factors(z), component_factors(mean, log_std))
            logits = _logits(log_w, features, weight, bias, matmul)
            log_joint, log_prior = log_sums(logits, factors, z.dtype, chunk)
        ctx.save_for_backward(z, mean, log_std, log_w, features, weight, bias, log_joint, log_prior)
        ctx.matmul, ctx.chunk = matmul, chunk
        return log_joint - log_prior

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        z, mean, log_std, log_w, features, weight, bias, log_joint, log_prior = ctx.saved_tensors
        needs = ctx.needs_input_grad
        with torch.autocast(z.device.type, enabled=False), torch.enable_grad():
            leaves = [t.detach().requires_grad_() for t in (z, mean, log_std)]
            points, components = point_factors(leaves[0]), component_factors(*leaves[1:])
        accumulators = Gradients(
            torch.zeros_like(points) if needs[0] else None,
            torch.zeros_like(components) if needs[1] or needs[2] else None,
            torch.empty_like(log_w) if needs[3] else None,
            *(torch.zeros_like(t, dtype=z.dtype) if n else None for t, n in
              zip((features, weight, bias), needs[4:7], strict=True)),
        )
        with torch.autocast(z.device.type, enabled=False), torch.no_grad():
            factors = Factors(points.detach(), components.detach())
            logits = _logits(log_w, features, weight, bias, ctx.matmul)
            pull_back(logits, factors, log_joint, log_prior, grad.contiguous(), accumulators, ctx.chunk)
        outputs = [(t, g) for t, g in zip((points, components), accumulators[:2], strict=True) if g is not None]
        grads: list[Tensor | None] = [None, None, None]
        if outputs:
            grads = list(
                torch.autograd.grad([t for t, _ in outputs], leaves, [g for _, g in outputs], allow_unused=True)
            )
        heads = (
            None if g is None else g.to(t.dtype)
            for t, g in zip((log_w, features, weight, bias), accumulators[2:], strict=True)
        )
        return *grads, *heads, None, None


def mixture_log_prob(
    z: Tensor, log_w: Tensor | None, mean: Tensor, log_std: Tensor, *, chunk: int | None = None
) -> Tensor:
    r"""log p_mix(z) = log sum_k w_k N(z; mu_k, s_k^2 I_d), w = softmax(log_w); with log_w None, w_k = 1 (not normalised).

    Shapes: z [..., d]; log_w [..., K]; mean [K, d]; log_std [K]; returns [...], nats. Float32 or float64; distances
    do not lose precision for small s. Memory: a tile of about 256 x 1024 elements on a CPU, however large K is;
    `chunk` overrides its rows. First derivatives only. Errors: ValueError for shapes that do not fit.
    """
    check_codebook(z, mean, log_std)
    d, num_components = mean.shape[1], mean.shape[0]
    shape = z.shape[:-1]
    if log_w is not None:
        if log_w.shape[-1] != num_components:
            raise ValueError(f"log_w has {log_w.shape[-1]} components, the codebook {num_components}")
        shape = torch.broadcast_shapes(shape, log_w.shape[:-1])
        log_w = log_w.expand(*shape, num_components).reshape(-1, num_components)
    flat = z.expand(*shape, d).reshape(-1, d)
    return _MixtureLogProb.apply(flat, mean, log_std, log_w, None, None, None, None, chunk).view(shape)


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
    r"""`mixture_log_prob` with log_w = features @ weight.T + bias, which is never materialised beyond a tile.

    Shapes: z [..., d]; features [..., E]; weight [K, E]; bias [K] or None; mean [K, d]; log_std [K]; returns [...],
    nats, in z's dtype. Under autocast the head's products run in the autocast format; densities and logsumexps keep
    z's. Backward recomputes the tiles: one product more than a head that keeps its logits, and no [tokens, K] tensor.
    First derivatives only. Errors: ValueError for shapes that do not fit.
    """
    check_codebook(z, mean, log_std)
    if features.shape[:-1] != z.shape[:-1] or weight.shape != (mean.shape[0], features.shape[-1]):
        raise ValueError(
            "need z [..., d], features [..., E], weight [K, E], mean [K, d]; "
            f"got {tuple(z.shape)}, {tuple(features.shape)}, {tuple(weight.shape)}, {tuple(mean.shape)}"
        )
    device = z.device.type
    matmul = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
    shape = z.shape[:-1]
    flat = z.reshape(-1, z.shape[-1]), features.reshape(-1, features.shape[-1])
    return _MixtureLogProb.apply(flat[0], mean, log_std, None, flat[1], weight, bias, matmul, chunk).view(shape)
