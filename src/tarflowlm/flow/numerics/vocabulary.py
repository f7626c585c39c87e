r"""Mixtures over a whole vocabulary of isotropic Gaussians (docs/math.md, eqs. 9 and 12), from logits or features.

    log p_mix(z) = log sum_k w_k N_k(z),   N_k(z) = N(z; mu_k, s_k^2 I),   w = softmax(x)
                 = logsumexp_k (x_k + log N_k(z)) - logsumexp_k x_k

N rows (tokens), K components, d channels, E features. Rows are worked on in chunks, so that no operation makes an
[N, K] tensor however large K is.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.utils.checkpoint import checkpoint

from tarflowlm.flow.numerics import layout
from tarflowlm.flow.numerics.normal import check_codebook, log_component_densities

KEPT = 2**24
"""Elements N K up to which every chunk keeps its softmaxes for the backward: at most three of 64 MiB in float32. With
more, the backward computes the chunks again, which costs one product with the head's weight."""


def mixture_log_prob(z: Tensor, log_w: Tensor | None, mean: Tensor, log_std: Tensor) -> Tensor:
    r"""log p_mix(z) = log sum_k w_k N(z; mu_k, s_k^2 I), w = softmax(log_w) (docs/math.md, eq. 9).

    Without log_w all w_k are 1: the normaliser of the decoder (eq. 2).

    Shapes: z [..., d]; log_w [..., K]; mean [K, d]; log_std [K]; returns [...], nats. Float32 or float64; distances
    do not lose precision for small s. First derivatives only: a second backward raises RuntimeError.
    Errors: ValueError for shapes that do not fit.
    """
    if log_w is None:
        check_codebook(z, mean, log_std)
        flat = z.reshape(-1, z.shape[-1])
        log_p = _by_chunks(lambda z: log_sum(log_component_densities(z, mean, log_std)), len(mean), flat)
        return log_p.view(z.shape[:-1])

    def weighted(z: Tensor, log_w: Tensor) -> Tensor:
        return log_sum(log_w + log_component_densities(z, mean, log_std)) - log_sum(log_w)

    shape, flat, log_w = layout.flatten_vectors(z, log_w, mean, log_std)
    return _by_chunks(weighted, len(mean), flat, log_w).view(shape)


def mixture_log_prob_from_features(
    z: Tensor, features: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, log_std: Tensor, relative: bool = False
) -> Tensor:
    r"""`mixture_log_prob` with log_w = features @ weight.T + bias, of which only a chunk exists at a time.

    Shapes: z [..., d]; features [..., E]; weight [K, E]; bias [K]; mean [K, d]; log_std [K]; returns [...], nats, in
    z's dtype. Under autocast the head's products run in the autocast format; densities and logsumexps keep z's.
    `relative` returns log p_mix(z) - log sum_k N(z; mu_k, s_k^2 I), which is log sum_k w_k p(k | z) under the decoder
    (docs/math.md, eq. 12): the component densities are computed once for both.
    First derivatives only: a second backward raises RuntimeError. Errors: ValueError for shapes that do not fit.
    """
    check_codebook(z, mean, log_std)

    def log_prob(z: Tensor, features: Tensor) -> Tensor:
        log_w = (features @ weight.T).to(z.dtype) + bias
        log_density = log_component_densities(z, mean, log_std)
        log_p = log_sum(log_w + log_density) - log_sum(log_w)
        return log_p - log_sum(log_density) if relative else log_p

    rows = z.reshape(-1, z.shape[-1]), features.reshape(-1, features.shape[-1])
    return _by_chunks(log_prob, len(mean), *rows).view(z.shape[:-1])


@torch.no_grad()
def most_probable_component(z: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """argmax_k N(z; mu_k, s_k^2 I), the first of equals: the mode of the decoder (docs/math.md, eq. 2).

    Shapes: z [..., d]; mean [K, d]; log_std [K]; returns [...], int64. NaN in a row gives component 0.
    Errors: ValueError for shapes that do not fit.
    """
    check_codebook(z, mean, log_std)
    flat = z.reshape(-1, z.shape[-1])
    best = _by_chunks(lambda z: log_component_densities(z, mean, log_std).argmax(-1), len(mean), flat)
    return best.view(z.shape[:-1])


def _by_chunks(function: Callable[..., Tensor], num_components: int, *rows: Tensor) -> Tensor:
    """function(*rows) [N] for tensors with N rows, chunk by chunk; a chunk has up to eight [n, K] tensors."""
    num_rows, step = len(rows[0]), max(1, layout.held_rows(num_components, rows[0].device) // 4)
    if torch.is_grad_enabled() and num_rows * num_components > KEPT:
        function = partial(checkpoint, function, use_reentrant=False, preserve_rng_state=False)
    return torch.cat([function(*(r[i : i + step] for r in rows)) for i in range(0, max(1, num_rows), step)])


def log_sum(x: Tensor) -> Tensor:
    """logsumexp over the last axis of x [n, K]: faster than torch's on a CPU, where exp is slow if it underflows."""
    return torch.logsumexp(x, -1) if torch.compiler.is_compiling() else _LogSum.apply(x)[0]


class _LogSum(Function):
    """logsumexp [n] and softmax [n, K]; the latter is an output so that a second derivative arrives here."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        top = x.amax(-1, keepdim=True)
        # -inf - -inf would be NaN
        share = (x - torch.where(torch.isneginf(top), 0.0, top)).clamp_(min=layout.LOWEST_EXPONENT[x.dtype]).exp_()
        total = share.sum(-1, keepdim=True)
        ctx.save_for_backward(share.div_(total))
        ctx.set_materialize_grads(False)
        return (top + total.log()).squeeze(-1), share

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, grad_share: Tensor | None) -> Tensor | None:
        if grad_share is not None:
            raise RuntimeError("the mixture maps of tarflowlm.flow.numerics have first derivatives only")
        return None if grad is None else ctx.saved_tensors[0] * grad[:, None]
