r"""Mixtures over a whole vocabulary of isotropic Gaussians (docs/math.md, eqs. 9 and 12).

    log p_mix(z) = log sum_k w_k N_k(z),   N_k(z) = N(z; mu_k, s_k^2 I),   w = softmax(x)
                 = logsumexp_k (x_k + log N_k(z)) - logsumexp_k x_k

The logits x are given, or they are a linear map of given features. The first sum is taken over the
pairs of `near_components`. Its error is below rounding unless all tokens near z are very
improbable. The sum itself shows that (eq. 20b), and such rows take all components.

Rows come in chunks, so that nothing makes an [N, K] tensor. E is the number of features.
"""

import math
from collections.abc import Callable
from itertools import product

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import BackwardCFunction as Context
from torch.nn.functional import pad

from tarflowlm import chunks, flow
from tarflowlm.flow import wide_dtype
from tarflowlm.flow.numerics import mixture, nearby
from tarflowlm.flow.numerics.mixture import (
    COMPILED,
    REFERENCE,
    Maps,
    first_derivatives_only,
    flatten_vectors,
    maps_for,
)
from tarflowlm.flow.numerics.nearby import Pairs, near_components
from tarflowlm.flow.numerics.normal import (
    LOWEST_EXPONENT,
    check_codebook,
    component_factors,
    log_component_densities,
    log_own_density,
    point_factors,
)


def mixture_log_prob(z: Tensor, log_w: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    r"""log p_mix(z) = log sum_k w_k N(z; mu_k, s_k^2 I), w = softmax(log_w) (docs/math.md, eq. 9).

    Shapes: z [..., d]; log_w [..., K]; mean [K, d]; log_std [K]; returns [...], nats. Float32 or
    float64; distances do not lose precision for small s. Errors: ValueError for shapes that do not
    fit; RuntimeError for second derivatives.
    """

    def general(z: Tensor, log_w: Tensor) -> Tensor:
        log_density = log_component_densities(z, mean, log_std)
        return log_sum(log_w + log_density) - log_sum(log_w)

    shape, flat, log_w = flatten_vectors(z, log_w, mean, log_std)
    return _by_chunks(general, len(mean), flat, log_w).view(shape)


def log_normaliser(z: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    r"""log sum_k N(z; mu_k, s_k^2 I): the normaliser of the decoder (docs/math.md, eq. 2).

    Shapes, formats and errors are those of `mixture_log_prob`.
    """

    def general(z: Tensor) -> Tensor:
        return log_sum(log_component_densities(z, mean, log_std))

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
    maps: Maps = REFERENCE,
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
    total, log_w = head_sums(features, weight, bias, pairs.rows, pairs.components, maps=maps)
    log_density = _log_densities(pairs, z, mean, log_std)
    joint, _ = pairs.log_sum(log_density + log_w)
    normaliser, largest = pairs.log_sum(log_density)
    log_p = (joint - total - normaliser if relative else joint - total).to(z.dtype)
    left_out = largest - nearby.reach(z.dtype, len(mean)) + total - joint
    # negated, so that NaN is left to the general path
    rest = (~(left_out <= nearby.log_rounding(z.dtype))).nonzero().squeeze(-1)
    if len(rest):
        by_all = _by_chunks(
            general, len(mean), z.index_select(0, rest), features.index_select(0, rest)
        )
        log_p = log_p.index_put((rest,), by_all)
    return log_p.view(shape)


def component_finder(mean: Tensor, log_std: Tensor) -> Callable[[Tensor], Tensor]:
    """Finds argmax_k N(z; mu_k, s_k^2 I), the decoder's mode (docs/math.md, eq. 2).

    The first of equal components; any of components that differ by a rounding in float64.
    Shapes: z [..., d]; mean [K, d]; log_std [K]; returns [...], int64. NaN gives 0.
    """
    mean, log_std = mean.detach(), log_std.detach()
    factors = None if wide_dtype(mean) == torch.float32 else component_factors(mean, log_std).T

    def find(z: Tensor) -> Tensor:
        rows = z.detach().reshape(-1, z.shape[-1])
        # a few rows at once: in sampling, chunks would cost more than the search
        at_once = len(rows)
        if at_once > 64:
            at_once = chunks.rows_at_once(4 * len(mean), chunks.held(z.device))
        best = list[Tensor]()
        for part in rows.split(max(1, at_once)):
            if factors is None:
                density = log_component_densities(part, mean, log_std)
            else:
                density = point_factors(part) @ factors
            best.append(density.argmax(-1))
        return torch.cat(best).view(z.shape[:-1])

    return find


def _log_densities(pairs: Pairs, z: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """log N_k(z_n) of all pairs, [M], in the wide format."""

    def of_pairs(rows: Tensor, components: Tensor) -> Tensor:
        own_mean, own_log_std = (x.index_select(0, components) for x in (mean, log_std))
        return log_own_density(z.index_select(0, rows), own_mean, own_log_std)

    return _by_chunks(of_pairs, mean.shape[1] + 2, pairs.rows, pairs.components)


def _by_chunks(function: Callable[..., Tensor], per_row: int, *rows: Tensor) -> Tensor:
    """function(*rows) [N] of tensors with N rows, in chunks; the backward repeats large ones."""
    at_once = chunks.rows_at_once(4 * per_row, chunks.held(rows[0].device))
    keeps = len(rows[0]) * per_row <= chunks.KEPT
    return torch.cat(chunks.in_parts(function, at_once, *rows, keeps=keeps))


# --- the head


def head_sums(
    features: Tensor,
    weight: Tensor,
    bias: Tensor,
    rows: Tensor,
    components: Tensor,
    *,
    maps: Maps = REFERENCE,
) -> tuple[Tensor, Tensor]:
    """logsumexp [N] of logits = features @ weight.T + bias, and the logits [M] of given pairs.

    The difference of the two, with a pair for every row, is a cross-entropy.

    Shapes: features [N, E]; weight [K, E]; bias [K]; rows, components [M], int64. Returns float32
    or wider. Under autocast the products run in the autocast format. No tensor is larger than
    weight or a tile. RuntimeError for second derivatives.
    """
    keeps = torch.is_grad_enabled() and len(features) * len(weight) <= chunks.LOGITS
    fuses = maps_for(features, maps) is COMPILED
    found: tuple[Tensor, Tensor] = _HeadSums.apply(
        keeps, fuses, features, weight, bias, rows, components
    )
    return found


class _HeadSums(Function):
    """`head_sums`, in tiles of rows and components that fit the cache of a CPU.

    Tiles are square, so that adding their products into the gradients moves the fewest bytes. The
    backward pass computes the logits again, unless the forward pass `keeps` their softmax.
    """

    ALIGNED = 64
    """An accelerator's products are fast where the number of logits in a row is a multiple."""

    @staticmethod
    def forward(
        ctx: Context,
        keeps: bool,
        fuses: bool,
        features: Tensor,
        weight: Tensor,
        bias: Tensor,
        rows: Tensor,
        components: Tensor,
    ) -> tuple[Tensor, Tensor]:
        device = "cpu" if features.is_meta else features.device.type
        dtype = features.dtype
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        wide = torch.promote_types(features.dtype, torch.float32)
        features, weight, bias = (t.to(dtype) for t in (features, weight, bias))
        num_components, aligned = len(weight), _HeadSums.ALIGNED
        held = budget = chunks.held(features.device)
        if flow.is_eager_cpu(features):
            budget = held // 4
        elif num_components % aligned and not features.is_meta:
            missing = -num_components % aligned  # with shares of 0
            weight = pad(weight, (0, 0, 0, missing))
            bias = pad(bias, (0, missing), value=-math.inf)
        side = min(len(weight), max(aligned, math.isqrt(budget) // aligned * aligned))
        parts = list(chunks.row_ranges(len(features), side, budget))
        columns = list(chunks.row_ranges(len(weight), 1, side))
        sum_of_tile = mixture.compiled(log_sum_with_softmax) if fuses else log_sum_with_softmax
        sums, shares = list[Tensor](), list[Tensor]()
        for part in parts:
            found = list[Tensor]()
            for column in columns:
                logits = torch.addmm(bias[column], features[part], weight[column].T)
                total, share = sum_of_tile(logits, keeps)
                found.append(total)
                shares += [share] if keeps else []
            sums.append(found[0] if len(found) == 1 else torch.stack(found).logsumexp(0))
            if keeps and len(found) > 1:
                for share, total in zip(shares[-len(found) :], found, strict=True):
                    share *= torch.exp(total - sums[-1])[:, None]
        picked = list[Tensor]()
        for pairs in chunks.row_ranges(len(rows), 4 * features.shape[1], held):
            ours = features.index_select(0, rows[pairs]).to(wide)
            logits = ours.mul_(weight.index_select(0, components[pairs])).sum(-1)
            picked.append(logits.add_(bias[components[pairs]]).to(dtype))  # rounded as the others
        every = torch.cat(sums)
        ctx.how = fuses, num_components, list(product(parts, columns))  # type: ignore[attr-defined]
        ctx.save_for_backward(features, weight, bias, rows, components, every, *shares)
        return every, torch.cat(picked).to(wide)

    @staticmethod
    def backward(ctx: Context, of_sum: Tensor, of_picked: Tensor) -> tuple[Tensor | None, ...]:
        first_derivatives_only()
        saved: tuple[Tensor, ...] = ctx.saved_tensors
        features, weight, bias, rows, components, sums, *shares = saved
        fuses, num_components, tiles = ctx.how  # type: ignore[attr-defined]
        share_of_sum = mixture.compiled(_softmax) if fuses else _softmax
        dtype = features.dtype
        scaled = features * of_sum[:, None].to(dtype)
        of_features, of_weight, of_bias = (
            torch.zeros_like(t, dtype=of_sum.dtype) for t in (features, weight, bias)
        )
        for index, (part, column) in enumerate(tiles):
            if shares:
                share = shares[index]
            else:
                logits = torch.addmm(bias[column], features[part], weight[column].T)
                share = share_of_sum(logits, sums[part])
            if dtype == of_sum.dtype:
                of_features[part].addmm_(share, weight[column])
                of_weight[column].addmm_(share.T, scaled[part])
            else:
                of_features[part] += share @ weight[column]
                of_weight[column] += share.T @ scaled[part]
            of_bias[column] += share.T @ of_sum[part].to(dtype)
        of_features *= of_sum[:, None]
        budget = chunks.held(features.device)
        for pairs in chunks.row_ranges(len(rows), 4 * features.shape[1], budget):
            row, component, of_pair = rows[pairs], components[pairs], of_picked[pairs, None]
            of_features.index_add_(0, row, of_pair * weight.index_select(0, component))
            of_weight.index_add_(0, component, of_pair * features.index_select(0, row))
        of_bias.index_add_(0, components, of_picked)
        of_head = of_weight[:num_components], of_bias[:num_components]
        return None, None, of_features, *of_head, None, None


# --- sums


def log_sum_with_softmax(x: Tensor, softmax: bool = True) -> tuple[Tensor, Tensor]:
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


def _softmax(logits: Tensor, total: Tensor) -> Tensor:
    """softmax(logits) [n, K] in their dtype, of a known logsumexp [n]; a CPU may overwrite them."""
    if not flow.is_eager_cpu(logits):
        return torch.exp(logits - total[:, None]).to(logits.dtype)
    shifted = logits.to(total.dtype).sub_(total[:, None])
    return shifted.clamp_(min=LOWEST_EXPONENT[total.dtype]).exp_().to(logits.dtype)


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
