r"""Mixtures over a whole vocabulary of isotropic Gaussians (docs/math.md, eqs. 9 and 12).

    log p_mix(z) = log sum_k w_k N_k(z),   N_k(z) = N(z; mu_k, s_k^2 I),   w = softmax(x)
                 = logsumexp_k (x_k + log N_k(z)) - logsumexp_k x_k

The logits x are given, or they are a linear map of given features. The first sum is taken over the
pairs of `near_components`. Its error is below rounding unless all tokens near z are very
improbable. The sum itself shows that (eq. 20b), and such rows take all components.

Rows come in chunks, so that nothing makes an [N, K] tensor. E is the number of features.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import BackwardCFunction as Context

from tarflowlm import chunks, flow
from tarflowlm.flow import wide_dtype
from tarflowlm.flow.numerics import near
from tarflowlm.flow.numerics.mixture import first_derivatives_only, flatten_vectors
from tarflowlm.flow.numerics.near import Pairs, near_components
from tarflowlm.flow.numerics.normal import (
    LOWEST_EXPONENT,
    check_codebook,
    component_factors,
    log_component_densities,
    log_own_density,
    point_factors,
)


def mixture_log_prob(z: Tensor, log_w: Tensor | None, mean: Tensor, log_std: Tensor) -> Tensor:
    r"""log p_mix(z) = log sum_k w_k N(z; mu_k, s_k^2 I), w = softmax(log_w) (docs/math.md, eq. 9).

    Without log_w all w_k are 1: the normaliser of the decoder (eq. 2).

    Shapes: z [..., d]; log_w [..., K]; mean [K, d]; log_std [K]; returns [...], nats. Float32 or
    float64; distances do not lose precision for small s. Errors: ValueError for shapes that do not
    fit; RuntimeError for second derivatives.
    """

    def general(z: Tensor, log_w: Tensor | None = None) -> Tensor:
        log_density = log_component_densities(z, mean, log_std)
        if log_w is None:
            return log_sum(log_density)
        return log_sum(log_w + log_density) - log_sum(log_w)

    if log_w is not None:
        shape, flat, log_w = flatten_vectors(z, log_w, mean, log_std)
        return _by_chunks(general, len(mean), flat, log_w).view(shape)
    check_codebook(z, mean, log_std)
    flat = z.reshape(-1, z.shape[-1])
    pairs = near_components(flat, mean, log_std)
    if pairs is None:
        return _by_chunks(general, len(mean), flat).view(z.shape[:-1])
    log_p, _ = pairs.log_sum(_log_densities(pairs, flat, mean, log_std))
    return log_p.to(z.dtype).view(z.shape[:-1])


def mixture_log_prob_from_features(
    z: Tensor,
    features: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    log_std: Tensor,
    relative: bool = False,
) -> Tensor:
    r"""`mixture_log_prob` with log_w = features @ weight.T + bias, computed chunk by chunk.

    `relative` returns log p_mix(z) - log sum_k N(z; mu_k, s_k^2 I) = log sum_k w_k p(k | z) under
    the decoder (docs/math.md, eq. 12).

    Shapes: z [..., d]; features [..., E]; weight [K, E]; bias [K]; mean [K, d]; log_std [K];
    returns [...], nats, in z's dtype. Under autocast the head's products run in the autocast
    format; densities and logsumexps keep z's. Errors: as `mixture_log_prob`.
    """
    check_codebook(z, mean, log_std)

    def general(z: Tensor, features: Tensor) -> Tensor:
        log_w = (features @ weight.T).to(z.dtype) + bias
        log_density = log_component_densities(z, mean, log_std)
        log_p = log_sum(log_w + log_density) - log_sum(log_w)
        return log_p - log_sum(log_density) if relative else log_p

    shape = z.shape[:-1]
    z = z.reshape(-1, z.shape[-1])
    features = features.reshape(-1, features.shape[-1])
    pairs = near_components(z, mean, log_std)
    if pairs is None:
        return _by_chunks(general, len(mean), z, features).view(shape)
    total, log_w = _HeadSums.apply(features, weight, bias, pairs.rows, pairs.components)
    log_density = _log_densities(pairs, z, mean, log_std)
    joint, _ = pairs.log_sum(log_density + log_w)
    normaliser, largest = pairs.log_sum(log_density)
    log_p = (joint - total - normaliser if relative else joint - total).to(z.dtype)
    left_out = largest - near.reach(z.dtype, len(mean)) + total - joint
    # negated, so that NaN is left to the general path
    rest = (~(left_out <= near.log_rounding(z.dtype))).nonzero().squeeze(-1)
    if len(rest):
        by_all = _by_chunks(
            general, len(mean), z.index_select(0, rest), features.index_select(0, rest)
        )
        log_p = log_p.index_put((rest,), by_all)
    return log_p.view(shape)


@torch.no_grad()
def most_probable_component(z: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """argmax_k N(z; mu_k, s_k^2 I): the decoder's mode (docs/math.md, eq. 2).

    The first of equal components; any of components that differ by a rounding in float64.
    Shapes: z [..., d]; mean [K, d]; log_std [K]; returns [...], int64. NaN gives 0. ValueError if
    shapes do not fit.
    """
    check_codebook(z, mean, log_std)
    return component_finder(mean, log_std)(z)


@torch.no_grad()
def component_finder(mean: Tensor, log_std: Tensor) -> Callable[[Tensor], Tensor]:
    """`most_probable_component` for many calls, with the work on the components done once."""
    factors = None if wide_dtype(mean) == torch.float32 else component_factors(mean, log_std).T

    def best(z: Tensor) -> Tensor:
        if factors is None:
            return log_component_densities(z, mean, log_std).argmax(-1)
        return (point_factors(z) @ factors).argmax(-1)

    def find(z: Tensor) -> Tensor:
        rows = z.detach().reshape(-1, z.shape[-1])
        # a few rows at once: in sampling, chunks would cost more than the search
        if len(rows) <= 64:
            return best(rows).view(z.shape[:-1])
        return _by_chunks(best, len(mean), rows).view(z.shape[:-1])

    return find


def _log_densities(pairs: Pairs, z: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """log N_k(z_n) of all pairs, [M], in the wide format."""

    def own(rows: Tensor, components: Tensor) -> Tensor:
        means = mean.index_select(0, components)
        return log_own_density(z.index_select(0, rows), means, log_std.index_select(0, components))

    return _by_chunks(own, mean.shape[1] + 2, pairs.rows, pairs.components)


def _by_chunks(function: Callable[..., Tensor], per_row: int, *rows: Tensor) -> Tensor:
    """function(*rows) [N] of tensors with N rows, in chunks; the backward repeats large ones."""
    at_once = chunks.rows_at_once(4 * per_row, chunks.held(rows[0].device))
    keeps = len(rows[0]) * per_row <= chunks.KEPT
    return torch.cat(chunks.in_parts(function, at_once, *rows, keeps=keeps))


# --- the head


class _HeadSums(Function):
    """logsumexp [N] of logits = features @ weight.T + bias, and the logits [M] of pairs."""

    @staticmethod
    def forward(
        ctx: Context,
        features: Tensor,
        weight: Tensor,
        bias: Tensor,
        rows: Tensor,
        components: Tensor,
    ) -> tuple[Tensor, Tensor]:
        device = features.device.type
        dtype = features.dtype
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        low = [t.to(dtype) for t in (features, weight, bias)]
        keep = any(ctx.needs_input_grad) and len(features) * len(weight) <= chunks.KEPT
        sums, picked, shares = list[Tensor](), list[Tensor](), list[Tensor]()
        parts = list(chunks.row_ranges(len(features), len(weight), chunks.held(features.device)))
        stops = torch.tensor([part.stop for part in parts], device=rows.device)
        start = 0
        for part, end in zip(parts, torch.searchsorted(rows, stops).tolist(), strict=True):
            logits = torch.addmm(low[2], low[0][part], low[1].T)
            picked.append(logits[rows[start:end] - part.start, components[start:end]])
            total, share = log_sum_with_softmax(logits, softmax=keep)
            sums.append(total)
            if keep:
                shares.append(share)
            start = end
        ctx.save_for_backward(*low, rows, components, *shares)
        wide = torch.promote_types(features.dtype, torch.float32)
        return torch.cat(sums).to(wide), torch.cat(picked).to(wide)

    @staticmethod
    def backward(ctx: Context, of_sum: Tensor, of_picked: Tensor) -> tuple[Tensor | None, ...]:
        first_derivatives_only()
        saved: tuple[Tensor, ...] = ctx.saved_tensors
        features, weight, bias, rows, components, *shares = saved
        dtype = features.dtype
        scaled = features * of_sum[:, None].to(dtype)
        of_features, of_weight, of_bias = (
            torch.zeros_like(t, dtype=of_sum.dtype) for t in (features, weight, bias)
        )
        budget = chunks.held(features.device)
        for index, part in enumerate(chunks.row_ranges(len(features), len(weight), budget)):
            if shares:
                share = shares[index]
            else:
                logits = torch.addmm(bias, features[part], weight.T)
                # on an accelerator the sum would take another pass
                is_eager = flow.is_eager_cpu(logits)
                share = log_sum_with_softmax(logits)[1] if is_eager else logits.softmax(-1)
            of_features[part] = (share @ weight).to(of_sum.dtype) * of_sum[part, None]
            if dtype == of_weight.dtype:
                of_weight.addmm_(share.T, scaled[part])
            else:
                of_weight += share.T @ scaled[part]
            of_bias += share.T @ of_sum[part].to(dtype)
        for pairs in chunks.row_ranges(len(rows), 4 * features.shape[1], budget):
            row, component, of_pair = rows[pairs], components[pairs], of_picked[pairs, None]
            of_features.index_add_(0, row, of_pair * weight.index_select(0, component))
            of_weight.index_add_(0, component, of_pair * features.index_select(0, row))
        of_bias.index_add_(0, components, of_picked)
        return of_features, of_weight, of_bias, None, None


# --- sums


def log_sum_with_softmax(x: Tensor, *, softmax: bool = True) -> tuple[Tensor, Tensor]:
    """logsumexp [n] of x [n, K], in float32 or wider, and with `softmax` softmax(x) in x's dtype.

    Faster than torch's on a CPU, where an exp that underflows is slow.
    """
    dtype = x.dtype
    wide = torch.promote_types(dtype, torch.float32)
    if not flow.is_eager_cpu(x):
        if not softmax:  # logits of a head: none is far below their sum
            return x[:, 0].to(wide) - torch.log_softmax(x, -1, dtype=wide)[:, 0], x[:0]
        share = torch.softmax(x, -1, dtype=wide)
        top, at = x.max(-1, keepdim=True)
        return (top - share.gather(-1, at).log()).squeeze(-1), share.to(dtype)
    x = x.to(wide)
    top = x.amax(-1, keepdim=True)
    # -inf - -inf would be NaN
    shifted = x - torch.where(torch.isneginf(top), 0.0, top)
    share = shifted.clamp_(min=LOWEST_EXPONENT[wide]).exp_()
    total = share.sum(-1, keepdim=True)
    return (top + total.log()).squeeze(-1), share.div_(total).to(dtype) if softmax else x[:0]


class _LogSum(Function):
    """logsumexp over the last axis of x [n, K], by `log_sum_with_softmax`."""

    @staticmethod
    def forward(ctx: Context, x: Tensor) -> Tensor:
        total, share = log_sum_with_softmax(x)
        ctx.save_for_backward(share)
        return total

    @staticmethod
    def backward(ctx: Context, grad: Tensor) -> Tensor:
        first_derivatives_only()
        (share,) = ctx.saved_tensors
        return grad[:, None] * share


log_sum: Callable[[Tensor], Tensor] = _LogSum.apply
