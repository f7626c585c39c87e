r"""Mixtures over a whole vocabulary of isotropic Gaussians (docs/math.md, eqs. 9 and 12), from
logits or features.

    log p_mix(z) = log sum_k w_k N_k(z),   N_k(z) = N(z; mu_k, s_k^2 I),   w = softmax(x)
                 = logsumexp_k (x_k + log N_k(z)) - logsumexp_k x_k

The second sum is that of a cross-entropy. To the first one only components near z contribute,
usually a single one. With b the nearest component, leave out every k with log N_k(z) < log N_b(z) -
R. The parts left out are

    of sum_k w_k N_k(z)    at most  N_b(z) exp(-R)          of sum_k N_k(z)    at most  K N_b(z)
    exp(-R)

With R = `reach` the second one vanishes in rounding, and so does the first one, unless all tokens
near z are very improbable (eq. 20b). That is seen from the sum itself, and such rows take the
general path, over all components. A product in float32 with a bound on its rounding finds the near
components (`near_components`).

N rows (tokens), K components, d channels, E features. Rows come in chunks, so that nothing makes an
[N, K] tensor.
"""

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.utils.checkpoint import checkpoint

from tarflowlm import chunks
from tarflowlm.flow.numerics import layout, normal, reference
from tarflowlm.flow.numerics.mixture import first_derivatives
from tarflowlm.flow.numerics.normal import check_codebook, log_component_densities, reach

LARGEST_SHARE = 1 / 32
"""All components are taken where more than this share is near: a pair costs as much as thirty
elements of all.
"""


def mixture_log_prob(z: Tensor, log_w: Tensor | None, mean: Tensor, log_std: Tensor) -> Tensor:
    r"""log p_mix(z) = log sum_k w_k N(z; mu_k, s_k^2 I), w = softmax(log_w) (docs/math.md, eq. 9).

    Without log_w all w_k are 1: the normaliser of the decoder (eq. 2).

    Shapes: z [..., d]; log_w [..., K]; mean [K, d]; log_std [K]; returns [...], nats. Float32 or
    float64; distances do not lose precision for small s. First derivatives only: a second backward
    raises RuntimeError. Errors: ValueError for shapes that do not fit.
    """
    if log_w is None:
        check_codebook(z, mean, log_std)
        flat = z.reshape(-1, z.shape[-1])
        if (near := near_components(flat, mean, log_std)) is None:
            log_p = _by_chunks(
                lambda z: log_sum(log_component_densities(z, mean, log_std)), len(mean), flat
            )
        else:
            log_p = near.log_sum(near.log_densities(flat, mean, log_std))[0].to(z.dtype)
        return log_p.view(z.shape[:-1])

    def weighted(z: Tensor, log_w: Tensor) -> Tensor:
        return log_sum(log_w + log_component_densities(z, mean, log_std)) - log_sum(log_w)

    shape, flat, log_w = layout.flatten_vectors(z, log_w, mean, log_std)
    return _by_chunks(weighted, len(mean), flat, log_w).view(shape)


def mixture_log_prob_from_features(
    z: Tensor,
    features: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    log_std: Tensor,
    relative: bool = False,
) -> Tensor:
    r"""`mixture_log_prob` with log_w = features @ weight.T + bias, of which only a chunk exists at
    a time.

    Shapes: z [..., d]; features [..., E]; weight [K, E]; bias [K]; mean [K, d]; log_std [K];
    returns [...], nats, in z's dtype. Under autocast the head's products run in the autocast
    format; densities and logsumexps keep z's. `relative` returns log p_mix(z) - log sum_k N(z;
    mu_k, s_k^2 I), which is log sum_k w_k p(k | z) under the decoder (docs/math.md, eq. 12): the
    component densities are computed once for both. First derivatives only: a second backward raises
    RuntimeError. Errors: ValueError for shapes that do not fit.
    """
    check_codebook(z, mean, log_std)

    def general(z: Tensor, features: Tensor) -> Tensor:
        log_w = (features @ weight.T).to(z.dtype) + bias
        log_density = log_component_densities(z, mean, log_std)
        log_p = log_sum(log_w + log_density) - log_sum(log_w)
        return log_p - log_sum(log_density) if relative else log_p

    flat = z.reshape(-1, z.shape[-1]), features.reshape(-1, features.shape[-1])
    if (near := near_components(flat[0], mean, log_std)) is None:
        return _by_chunks(general, len(mean), *flat).view(z.shape[:-1])
    total, log_w = _HeadSums.apply(flat[1], weight, bias, near.rows, near.components)
    log_density = near.log_densities(flat[0], mean, log_std)
    joint, _ = near.log_sum(log_density + log_w)
    normaliser, largest = near.log_sum(log_density)
    log_p = (joint - total - normaliser if relative else joint - total).to(z.dtype)
    # negated, so that NaN is left to the general path
    fine = largest - reach(z.dtype, len(mean)) + total - joint <= normal.log_rounding(z.dtype)
    if len(rest := (~fine).nonzero().squeeze(-1)):
        log_p = log_p.index_put(
            (rest,), _by_chunks(general, len(mean), *(t.index_select(0, rest) for t in flat))
        )
    return log_p.view(z.shape[:-1])


@torch.no_grad()
def most_probable_component(z: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """argmax_k N(z; mu_k, s_k^2 I), the first of equals: the mode of the decoder (docs/math.md, eq.
    2).

    Shapes: z [..., d]; mean [K, d]; log_std [K]; returns [...], int64. NaN gives 0. ValueError if
    shapes do not fit.
    """
    check_codebook(z, mean, log_std)
    flat = z.reshape(-1, z.shape[-1])
    best = _by_chunks(
        lambda z: log_component_densities(z, mean, log_std).argmax(-1), len(mean), flat
    )
    return best.view(z.shape[:-1])


class Near(NamedTuple):
    """The components near z, as pairs of a row and a component, in the order of the rows; each row
    has one.
    """

    rows: Tensor
    components: Tensor
    num_rows: int

    def log_densities(self, z: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
        """log N_k(z_n) of every pair, in the wide format."""
        own = mean.index_select(0, self.components), log_std.index_select(0, self.components)
        return normal.log_own_density(z.index_select(0, self.rows), *own)

    def log_sum(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """logsumexp and maximum over the pairs of every row, [N]; no gradients of the latter."""
        largest = x.new_full((self.num_rows,), -math.inf).scatter_reduce(
            0, self.rows, x.detach(), "amax"
        )
        share = torch.exp(x - largest.index_select(0, self.rows))
        return largest + x.new_zeros(self.num_rows).index_add(0, self.rows, share).log(), largest


@torch.no_grad()
def near_components(z: Tensor, mean: Tensor, log_std: Tensor) -> Near | None:
    """All pairs with log N_k(z_n) >= max_j log N_j(z_n) - `reach`, and some that are just below; z
    [N, d].

    None where components are few, many of them near, or values not finite. The product of the
    factors of log N cancels, so the threshold is lowered by a bound on its rounding error, gamma_(d
    + 2) sum_i |A_i| |B_i|.
    """
    num_components, dim = mean.shape
    if num_components < reference.FEWEST or not len(z) or z.is_meta:
        return None
    points, components = (
        normal.point_factors(z).float(),
        normal.component_factors(mean, log_std).float(),
    )
    slack = points.abs() @ components.abs().amax(0)
    least = 2 * (dim + 8) * torch.finfo(torch.float32).eps * slack + reach(z.dtype, num_components)
    found, components, left = (
        list[Tensor](),
        components.T.contiguous(),
        LARGEST_SHARE * len(z) * num_components,
    )
    for rows in _chunks(len(z), num_components, z.device):
        log_density = points[rows] @ components
        lowest = log_density.amax(-1) - least[rows]
        pairs = (log_density >= lowest[:, None]).nonzero()
        if (left := left - len(pairs)) < 0 or not lowest.isfinite().all():
            return None
        pairs[:, 0] += rows.start
        found.append(pairs)
    rows, indices = torch.cat(found).T.contiguous()
    return Near(rows, indices, len(z))


class _HeadSums(Function):
    """logsumexp [N] of logits = features @ weight.T + bias, and the logits [M] of M pairs in the
    order of their rows.

    The gradient of the first is softmax(logits) [N, K] times a number per row, applied to the other
    factor, [N, E].
    """

    @staticmethod
    def forward(
        ctx: Any, features: Tensor, weight: Tensor, bias: Tensor, rows: Tensor, components: Tensor
    ) -> tuple[Tensor, Tensor]:
        device, num_components = features.device.type, len(weight)
        half = (
            torch.get_autocast_dtype(device)
            if torch.is_autocast_enabled(device)
            else features.dtype
        )
        low = [t.to(half) for t in (features, weight, bias)]
        keep = any(ctx.needs_input_grad) and len(features) * num_components <= chunks.KEPT
        sums, picked, shares = list[Tensor](), list[Tensor](), list[Tensor]()
        parts = list(_chunks(len(features), num_components, features.device, tensors=1))
        ends = torch.searchsorted(
            rows, torch.tensor([part.stop for part in parts], device=rows.device)
        ).tolist()
        for part, start, end in zip(parts, [0, *ends], ends, strict=False):
            logits = torch.addmm(low[2], low[0][part], low[1].T)
            picked.append(logits[rows[start:end] - part.start, components[start:end]])
            total, share = log_sum_with_softmax(logits, softmax=keep)
            sums.append(total)
            shares += [share] if keep else []
        ctx.save_for_backward(*low, rows, components, *shares)
        ctx.dtypes = [t.dtype for t in (features, weight, bias)]
        wide = torch.promote_types(features.dtype, torch.float32)
        return torch.cat(sums).to(wide), torch.cat(picked).to(wide)

    @staticmethod
    def backward(ctx: Any, of_sum: Tensor, of_picked: Tensor) -> tuple[Tensor | None, ...]:
        saved, shares = ctx.saved_tensors[:5], ctx.saved_tensors[5:]
        gradients = first_derivatives(_head_gradients, *saved, of_sum, of_picked, *shares)
        return *(g.to(t) for g, t in zip(gradients, ctx.dtypes, strict=True)), None, None  # type: ignore[union-attr]


def _head_gradients(
    features: Tensor,
    weight: Tensor,
    bias: Tensor,
    rows: Tensor,
    components: Tensor,
    of_sum: Tensor,
    of_picked: Tensor,
    *shares: Tensor,
) -> tuple[Tensor, ...]:
    """Gradients of features [N, E], weight [K, E] and bias [K], which come in the dtype of the
    products.
    """
    half = features.dtype
    scaled = features * of_sum[:, None].to(half)
    of_features, of_weight, of_bias = (
        t.new_zeros(t.shape, dtype=of_sum.dtype) for t in (features, weight, bias)
    )
    for index, part in enumerate(_chunks(len(features), len(weight), features.device, tensors=1)):
        if shares:
            share = shares[index]
        else:
            logits = torch.addmm(bias, features[part], weight.T)
            share = (
                log_sum_with_softmax(logits)[1]
                if layout.use_eager_cpu(logits)
                else torch.softmax(logits, -1)
            )
        of_features[part] = (share @ weight).to(of_sum.dtype) * of_sum[part, None]
        if half == of_weight.dtype:
            of_weight.addmm_(share.T, scaled[part])
        else:
            of_weight += share.T @ scaled[part]
        of_bias += share.T @ of_sum[part].to(half)
    of_pair = of_picked[:, None]
    of_features.index_add_(0, rows, of_pair * weight.index_select(0, components))
    of_weight.index_add_(0, components, of_pair * features.index_select(0, rows))
    of_bias.index_add_(0, components, of_picked)
    return of_features, of_weight, of_bias


def _chunks(
    rows: int, num_components: int, device: torch.device, *, tensors: int = 4
) -> Iterator[slice]:
    """Row ranges so short that this many [n, K] tensors have the size of one that may be held."""
    return chunks.row_ranges(rows, tensors * num_components, chunks.held(device))


def _by_chunks(function: Callable[..., Tensor], num_components: int, *rows: Tensor) -> Tensor:
    """function(*rows) [N] for tensors with N rows, chunk by chunk; a chunk has up to eight [n, K]
    tensors.
    """
    if torch.is_grad_enabled() and len(rows[0]) * num_components > chunks.KEPT:
        function = partial(checkpoint, function, use_reentrant=False, preserve_rng_state=False)
    parts = list(_chunks(len(rows[0]), num_components, rows[0].device)) or [slice(0, 0)]
    return torch.cat([function(*(r[part] for r in rows)) for part in parts])


def log_sum_with_softmax(x: Tensor, *, softmax: bool = True) -> tuple[Tensor, Tensor]:
    """logsumexp [n] of x [n, K], in at least float32, and softmax(x) in its dtype, empty unless
    `softmax`. Faster than torch's on a CPU, where an exp that underflows is slow.
    """
    if not layout.use_eager_cpu(x):
        log_share = torch.log_softmax(x, -1, dtype=torch.promote_types(x.dtype, torch.float32))
        return x[:, 0].to(log_share.dtype) - log_share[:, 0], torch.softmax(
            x, -1
        ) if softmax else x[:0]
    x, dtype = x.to(torch.promote_types(x.dtype, torch.float32)), x.dtype
    top = x.amax(-1, keepdim=True)
    # -inf - -inf would be NaN
    share = (
        (x - torch.where(torch.isneginf(top), 0.0, top))
        .clamp_(min=layout.LOWEST_EXPONENT[x.dtype])
        .exp_()
    )
    total = share.sum(-1, keepdim=True)
    return (top + total.log()).squeeze(-1), share.div_(total).to(dtype) if softmax else x[:0]


def log_sum(x: Tensor) -> Tensor:
    """logsumexp over the last axis of x [n, K], by `log_sum_with_softmax`."""
    return _LogSum.apply(x)[0]


class _LogSum(Function):
    """logsumexp [n] and softmax [n, K]; the latter is an output so that a second derivative arrives
    here.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        total, share = log_sum_with_softmax(x)
        ctx.save_for_backward(share)
        ctx.set_materialize_grads(False)
        return total, share

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, grad_share: Tensor | None) -> Tensor | None:
        if grad_share is not None:
            raise RuntimeError(
                "the mixture maps of tarflowlm.flow.numerics have first derivatives only"
            )
        return None if grad is None else ctx.saved_tensors[0] * grad[:, None]
