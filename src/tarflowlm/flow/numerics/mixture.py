"""The public maps of mixtures: any leading shape, closed-form derivatives.

A CPU takes the implementations in `CPU`, in linear space. An accelerator takes the given `maps`:
`REFERENCE` in log space, or `COMPILED`, which are the same by torch.compile.
"""

from collections.abc import Callable
from functools import cache, partial
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import BackwardCFunction as Context

from tarflowlm import chunks, flow
from tarflowlm.flow.numerics import cpu, reference
from tarflowlm.flow.numerics import vocabulary_rosenblatt as vocabulary
from tarflowlm.flow.numerics.normal import check_codebook
from tarflowlm.flow.numerics.reference import Gradients

Result = TypeVar("Result")
Tensors = tuple[Tensor, ...]


# --- implementations


class Maps(NamedTuple):
    """One implementation of every map, on rows and without autograd, as `reference` defines it."""

    mixture_cdf: Callable[..., tuple[Tensor, Tensor]]
    mixture_cdf_inverse: Callable[..., Tensor]
    mixture_log_density: Callable[..., Tensor]
    mixture_backward: Callable[..., Gradients]
    rosenblatt: Callable[..., tuple[Tensor, Tensor]]
    rosenblatt_inverse: Callable[..., Tensor]


@cache
def compiled(function: Callable[..., Result]) -> Callable[..., Result]:
    """`function` by torch.compile, which keeps intermediate results out of memory."""
    return torch.compile(function)


def fused(function: Callable[..., Result], *tensors: Tensor) -> Result:
    """function(*tensors), `compiled` at the first call, for any number of rows."""
    for tensor in tensors:
        if len(tensor) == len(tensors[0]):
            torch._dynamo.maybe_mark_dynamic(tensor, 0)
    result: Result = compiled(function)(*tensors)
    return result


CPU = Maps(
    cpu.mixture_cdf,
    cpu.mixture_cdf_inverse,
    cpu.mixture_log_density,
    cpu.mixture_backward,
    vocabulary.rosenblatt,
    cpu.rosenblatt_inverse,
)
REFERENCE = Maps(
    reference.mixture_cdf,
    reference.mixture_cdf_inverse,
    reference.mixture_log_density,
    reference.mixture_backward,
    vocabulary.rosenblatt,
    vocabulary.rosenblatt_inverse,
)
COMPILED = Maps(
    partial(fused, reference.mixture_cdf),
    partial(fused, reference.mixture_cdf_inverse),
    partial(fused, reference.mixture_log_density),
    partial(fused, reference.mixture_backward),
    partial(vocabulary.rosenblatt, of_channel=partial(fused, vocabulary.channel)),
    partial(
        vocabulary.rosenblatt_inverse,
        scalar=partial(fused, reference.mixture_cdf_inverse),
    ),
)


def choose_maps(model: nn.Module, *, compiled: bool) -> None:
    """Give all parts of a model that have maps those for accelerators, `compiled` or not."""
    for module in model.modules():
        if isinstance(getattr(module, "maps", None), Maps):
            module.maps = COMPILED if compiled else REFERENCE  # type: ignore[assignment]


def maps_for(like: Tensor, on_accelerators: Maps) -> Maps:
    """The maps of tensors `like` this one."""
    return CPU if flow.is_eager_cpu(like) else on_accelerators


# --- the maps


def mixture_cdf(
    z: Tensor, log_w: Tensor, mean: Tensor, log_std: Tensor, *, maps: Maps = REFERENCE
) -> tuple[Tensor, Tensor]:
    r"""Mixture-CDF map, elementwise (docs/math.md, eq. 8).

        u = Phi^-1(F(z)),   log_det = log du/dz = log F'(z) - log N(u; 0, 1)
        F(z) = sum_k w_k Phi((z - m_k) / s_k),   w = softmax(log_w),   s = exp(log_std)

    Shapes: z [...]; log_w (unnormalised), mean, log_std [..., K], broadcast against z; u, log_det
    [...], nats. All float32, or all float64. Exact in both tails: |u| is limited by the range of
    z only. NaN gives NaN; z = +-inf gives u = +-inf. Errors: ValueError for mixed dtypes or
    differing K; RuntimeError for second derivatives.
    """
    shape, flat_z, params = flatten(z, log_w, mean, log_std)
    maps = maps_for(z, maps)
    gradients = partial(_cdf_gradients, maps)
    u, log_det = differentiable(maps.mixture_cdf, gradients, flat_z, *params)
    return u.view(shape), log_det.view(shape)


def mixture_cdf_inverse(
    u: Tensor, log_w: Tensor, mean: Tensor, log_std: Tensor, *, maps: Maps = REFERENCE
) -> Tensor:
    r"""Inverse of `mixture_cdf`, elementwise: z = F^-1(Phi(u)) (docs/math.md, eq. 20).

    Shapes, formats and errors: as `mixture_cdf`. Gradients are implicit (eq. 20a). Nothing is
    clamped. NaN gives NaN, u = +-inf gives z = +-inf.
    """
    shape, flat_u, params = flatten(u, log_w, mean, log_std)
    maps = maps_for(u, maps)
    if torch.is_grad_enabled():
        gradients = partial(_inverse_gradients, maps)
        (z,) = differentiable(maps.mixture_cdf_inverse, gradients, flat_u, *params)
    else:  # an autograd function takes as long as the work for a few rows
        z = maps.mixture_cdf_inverse(flat_u, *params)
    return z.view(shape)


def mixture_log_density(
    z: Tensor, log_w: Tensor, mean: Tensor, log_std: Tensor, *, maps: Maps = REFERENCE
) -> Tensor:
    r"""log p(z) = log F'(z) = log sum_k w_k N(z; m_k, s_k^2) of scalar mixtures, elementwise.

    Equals log_det + log N(u; 0, 1) of `mixture_cdf` (docs/math.md, eq. 6), without the cost of u.
    Shapes, formats and errors: as `mixture_cdf`.
    """
    shape, flat_z, params = flatten(z, log_w, mean, log_std)
    maps = maps_for(z, maps)

    def gradients(*saved: Tensor) -> Gradients:
        # the inputs, log p itself, which is not needed, and its gradient
        return maps.mixture_backward(*saved[:4], saved[-1])

    (log_p,) = differentiable(maps.mixture_log_density, gradients, flat_z, *params)
    return log_p.view(shape)


def rosenblatt(
    z: Tensor,
    log_w: Tensor | vocabulary.LogWeights,
    mean: Tensor,
    log_std: Tensor,
    *,
    maps: Maps = REFERENCE,
) -> tuple[Tensor, Tensor]:
    r"""Mixture-Rosenblatt map, channel by channel with Bayes' rule (docs/math.md, eq. 9).

        alpha^(1) = w,   u_i = Phi^-1( sum_k alpha_k^(i) Phi((z_i - mu_ki) / s_k) )
        alpha_k^(i+1) ~ alpha_k^(i) N(z_i; mu_ki, s_k^2),   log_det = log p_mix(z) - log N(u; 0, I)

    u ~ N(0, I) if and only if z ~ p_mix = sum_k w_k N(mu_k, s_k^2 I). Differs from the paper's
    algorithm 1: the weights are logarithms.

    Shapes: z [..., d]; log_w [..., K], unnormalised; mean [K, d]; log_std [K]; u [..., d], log_det
    [...], nats. Float32 or float64; exact in both tails of every channel. NaN in a row gives NaN
    there. Memory: some tensors of a chunk x K, whatever the number of rows; the backward computes
    the map again. Errors: ValueError for shapes that do not fit; RuntimeError for second
    derivatives.

    For z [N, d] log_w may be a function from rows (a slice or indices) to their log-weights
    [n, K]: without gradients it is called chunk by chunk.
    """
    maps = maps_for(z, maps)
    if not isinstance(log_w, Tensor):
        if not torch.is_grad_enabled():
            check_codebook(z, mean, log_std)
            return maps.rosenblatt(z, log_w, mean, log_std)
        log_w = log_w(slice(None))
    shape, flat, weights = flatten_vectors(z, log_w, mean, log_std)
    gradients = partial(_rosenblatt_gradients, maps)
    with flow.full_precision(z):
        u, log_det = differentiable(maps.rosenblatt, gradients, flat, weights, mean, log_std)
    return u.view(*shape, flat.shape[-1]), log_det.view(shape)


def rosenblatt_inverse(
    u: Tensor, log_w: Tensor, mean: Tensor, log_std: Tensor, *, maps: Maps = REFERENCE
) -> Tensor:
    r"""Inverse of `rosenblatt`: one scalar mixture is solved per channel (docs/math.md, eq. 9).

    Shapes, formats and errors: as `rosenblatt`. Gradients are implicit, channel by channel, and
    hold d tensors [..., K]; without gradients, memory is as in `rosenblatt`.
    """
    shape, flat, weights = flatten_vectors(u, log_w, mean, log_std)
    if torch.is_grad_enabled() and any(t.requires_grad for t in (u, log_w, mean, log_std)):
        z = reference.rosenblatt_inverse(flat, weights, mean, log_std, mixture_cdf_inverse)
    else:
        z = maps_for(u, maps).rosenblatt_inverse(flat, weights, mean, log_std)
    return z.view(*shape, u.shape[-1])


# --- derivatives


def first_derivatives_only() -> None:
    """RuntimeError in a backward with create_graph=True.

    PyTorch's `once_differentiable` stays silent unless the *cotangent* requires a gradient: a
    second derivative would lack the terms that depend on z or the parameters.
    """
    if torch.is_grad_enabled():
        who = "attention in training and the mixture maps of tarflowlm.flow.numerics"
        raise RuntimeError(f"{who} have first derivatives only")


class _Differentiable(Function):
    """compute(*inputs) as a tuple; its backward is gradients(*inputs, *outputs, *cotangents).

    Only inputs and outputs are saved. Gradients of an input that rows share, [1, K], are summed
    over the rows.
    """

    @staticmethod
    def forward(
        compute: Callable[..., Tensor | Tensors],
        gradients: Callable[..., Tensors],
        *inputs: Tensor,
    ) -> Tensors:
        found = compute(*inputs)
        return found if isinstance(found, tuple) else (found,)

    # apart from `forward`, for torch.func
    @staticmethod
    def setup_context(ctx: Context, inputs: tuple[object, ...], output: Tensors) -> None:
        ctx.gradients = inputs[1]  # type: ignore[attr-defined]
        ctx.save_for_backward(*(t for t in inputs if isinstance(t, Tensor)), *output)

    @staticmethod
    def backward(ctx: Context, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        first_derivatives_only()
        saved: Tensors = ctx.saved_tensors
        found: Tensors = ctx.gradients(*saved, *cotangents)  # type: ignore[attr-defined]
        # inputs come first
        summed = (g.sum_to_size(t.shape) for g, t in zip(found, saved, strict=False))
        return None, None, *summed


differentiable: Callable[..., Tensors] = _Differentiable.apply


def _cdf_gradients(maps: Maps, *saved: Tensor) -> Tensors:
    *inputs, u, log_det, grad_u, grad_log_det = saved
    # log_det = log p - log N(u; 0, 1): the second term depends on u alone
    of_u = grad_u + grad_log_det * u
    return maps.mixture_backward(*inputs, grad_log_det, u, log_det, of_u)


def _inverse_gradients(maps: Maps, _u: Tensor, *rest: Tensor) -> Tensors:
    """Implicit: dz = (du - du/dparams dparams) / (du/dz)."""
    *params, z, grad_z = rest
    u, log_det = maps.mixture_cdf(z, *params)
    grad_u = grad_z * torch.exp(-log_det)
    nothing = torch.zeros_like(u)
    _, *of_params = maps.mixture_backward(z, *params, nothing, u, log_det, -grad_u)
    return grad_u, *of_params


def _rosenblatt_gradients(
    maps: Maps, z: Tensor, log_w: Tensor, mean: Tensor, log_std: Tensor, *rest: Tensor
) -> Tensors:
    _u, _log_det, grad_u, grad_log_det = rest
    of_z, of_log_w, *of_book = (torch.zeros_like(t) for t in (z, log_w, mean, log_std))
    per_row = 4 * len(mean)  # as some 16 tensors are recorded per channel
    budget = cpu.budget(per_row) if maps is CPU else chunks.held(z.device)
    for rows in chunks.row_ranges(len(z), per_row, budget):
        leaves = [t.detach().requires_grad_() for t in (z[rows], log_w[rows], mean, log_std)]
        with torch.enable_grad():
            outputs = reference.rosenblatt(leaves[0], leaves[1], leaves[2], leaves[3], mixture_cdf)
        cotangents = grad_u[rows], grad_log_det[rows]
        of_z[rows], of_log_w[rows], *of_part = torch.autograd.grad(outputs, leaves, cotangents)
        for total, part in zip(of_book, of_part, strict=True):
            total.add_(part)
    return of_z, of_log_w, *of_book


# --- shapes


def flatten(z: Tensor, *params: Tensor) -> tuple[torch.Size, Tensor, list[Tensor]]:
    """The broadcast leading shape, z [...] as [N], and parameters [..., K] as [N, K] or [1, K].

    ValueError if the component counts or dtypes differ, or the dtype is neither of these two.
    """
    if any(p.dtype != z.dtype for p in params) or z.dtype not in (torch.float32, torch.float64):
        found = [t.dtype for t in (z, *params)]
        raise ValueError(f"z and parameters must all be float32, or float64, got {found}")
    counts = {p.shape[-1] if p.ndim else 0 for p in params}
    num_components = max(counts)
    if num_components == 0 or len(counts) > 1:
        raise ValueError(f"components {sorted(counts)}: give all parameters as many, at least 1")
    if z.ndim == 1 and all(p.shape == (len(z), num_components) for p in params):
        # unchanged: a sampler's step has few rows, so every view would cost time
        return z.shape, z, list(params)
    shape = torch.broadcast_shapes(z.shape, *(p.shape[:-1] for p in params))
    rows = shape.numel()
    flat = []
    for p in params:
        if p.numel() == p.shape[-1] and rows != 1:
            flat.append(p.reshape(1, -1))
        else:
            flat.append(p.expand(*shape, num_components).reshape(rows, num_components))
    return shape, z.expand(shape).reshape(rows), flat


def flatten_vectors(
    z: Tensor, log_w: Tensor, mean: Tensor, log_std: Tensor
) -> tuple[torch.Size, Tensor, Tensor]:
    """The broadcast leading shape, z [..., d] as [N, d], and log_w [..., K] as [N, K].

    ValueError unless mean [K, d] and log_std [K] fit.
    """
    check_codebook(z, mean, log_std)
    if log_w.shape[-1] != mean.shape[0] or log_w.dtype != mean.dtype:
        found = f"log_w of {log_w.shape[-1]} components and {log_w.dtype}"
        raise ValueError(f"{found}: the codebook has {mean.shape[0]} and {mean.dtype}")
    if z.ndim == 2 and log_w.shape[:-1] == z.shape[:-1]:
        return z.shape[:1], z, log_w  # unchanged
    shape = torch.broadcast_shapes(z.shape[:-1], log_w.shape[:-1])
    z, log_w = (t.expand(*shape, t.shape[-1]).reshape(-1, t.shape[-1]) for t in (z, log_w))
    return shape, z, log_w
