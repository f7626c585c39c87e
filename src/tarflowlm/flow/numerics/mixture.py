r"""Scalar mixtures: u = Phi^-1(F(z)) with its log-derivative, the inverse, and log F'.

    F(z) = sum_k w_k Phi((z - m_k) / s_k),   w = softmax(log_w),   s = exp(log_std)

The public functions have closed-form derivatives and choose a path: the linear space of
`cpu_forward` and `cpu_inverse`, or the log space of `reference` on accelerators.
"""

from types import ModuleType

import torch
from torch import Tensor

from tarflowlm.flow.numerics import cpu_forward, cpu_inverse, layout, reference
from tarflowlm.flow.numerics.derivatives import differentiable


def mixture_cdf(z: Tensor, log_w: Tensor, mean: Tensor, log_std: Tensor) -> tuple[Tensor, Tensor]:
    r"""Mixture-CDF map, elementwise (docs/math.md, eq. 8).

        u = Phi^-1(F(z)),   log_det = log du/dz = log F'(z) - log N(u; 0, 1)

    Shapes: z [...]; log_w (unnormalised), mean, log_std [..., K], broadcast against z; u, log_det
    [...], nats. Float32 or float64, all alike. Exact in both tails: |u| is limited by the range of
    z only. NaN gives NaN; z = +-inf gives u = +-inf. Errors: ValueError for mixed dtypes or
    differing K; RuntimeError for second derivatives.
    """
    shape, flat_z, params = layout.flatten(z, log_w, mean, log_std)
    cdf = _path(z).mixture_cdf
    u, log_det = differentiable(cdf, _cdf_gradients, flat_z, *params)
    return u.view(shape), log_det.view(shape)


def mixture_cdf_inverse(u: Tensor, log_w: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    r"""Inverse of `mixture_cdf`, elementwise: z = F^-1(Phi(u)) (docs/math.md, eq. 20).

    Shapes, formats and errors: as `mixture_cdf`. Gradients are implicit (eq. 20a). The number of
    steps is fixed, and nothing is clamped. NaN gives NaN, u = +-inf gives z = +-inf.
    """
    shape, flat_u, params = layout.flatten(u, log_w, mean, log_std)
    if torch.is_grad_enabled():
        (z,) = differentiable(_inverse, _inverse_gradients, flat_u, *params)
    else:  # an autograd function takes as long as the work for a few rows
        z = _inverse(flat_u, *params)
    return z.view(shape)


def mixture_log_density(z: Tensor, log_w: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    r"""log p(z) = log F'(z) = log sum_k w_k N(z; m_k, s_k^2) of scalar mixtures, elementwise.

    Equals log_det + log N(u; 0, 1) of `mixture_cdf` (docs/math.md, eq. 6), without the cost of u.
    Shapes, formats and errors: as there.
    """
    shape, flat_z, params = layout.flatten(z, log_w, mean, log_std)
    density = _path(z).mixture_log_density
    (log_p,) = differentiable(density, _density_gradients, flat_z, *params)
    return log_p.view(shape)


def _path(z: Tensor) -> ModuleType:
    return cpu_forward if layout.use_eager_cpu(z) else reference


def _inverse(u: Tensor, *params: Tensor) -> Tensor:
    path = cpu_inverse if layout.use_eager_cpu(u) else reference
    return path.mixture_cdf_inverse(u, *params)


def _gradients(
    z: Tensor, params: tuple[Tensor, ...], grad_log_p: Tensor, noise: tuple[Tensor, ...] = ()
) -> tuple[Tensor, ...]:
    """`mixture_backward`, with gradients of shared parameters [1, K] summed over rows."""
    of_z, *of_params = _path(z).mixture_backward(z, params, grad_log_p, noise)
    return of_z, *(g.sum_to_size(p.shape) for g, p in zip(of_params, params, strict=True))


def _cdf_gradients(
    z: Tensor,
    log_w: Tensor,
    mean: Tensor,
    log_std: Tensor,
    u: Tensor,
    log_det: Tensor,
    grad_u: Tensor,
    grad_log_det: Tensor,
) -> tuple[Tensor, ...]:
    # log_det = log p - log N(u; 0, 1): the second term depends on u alone
    noise = u, log_det, grad_u + grad_log_det * u
    return _gradients(z, (log_w, mean, log_std), grad_log_det, noise)


def _density_gradients(
    z: Tensor, log_w: Tensor, mean: Tensor, log_std: Tensor, _log_p: Tensor, grad: Tensor
) -> tuple[Tensor, ...]:
    return _gradients(z, (log_w, mean, log_std), grad)


def _inverse_gradients(
    _u: Tensor, log_w: Tensor, mean: Tensor, log_std: Tensor, z: Tensor, grad_z: Tensor
) -> tuple[Tensor, ...]:
    """Implicit: dz = (du - du/dparams dparams) / (du/dz)."""
    params = log_w, mean, log_std
    u, log_det = _path(z).mixture_cdf(z, *params)
    grad_u = grad_z * torch.exp(-log_det)
    _, *of_params = _gradients(z, params, torch.zeros_like(u), (u, log_det, -grad_u))
    return grad_u, *of_params
