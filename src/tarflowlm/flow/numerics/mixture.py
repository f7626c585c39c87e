r"""Scalar mixtures: u = Phi^-1(F(z)) with its log-derivative, the inverse, and log F'.

    F(z) = sum_k w_k Phi((z - m_k) / s_k),   w = softmax(log_w),   s = exp(log_std)

The public functions have closed-form derivatives and choose a path: the linear space of
`cpu_forward` and `cpu_inverse`, or the log space of `reference` on accelerators, there `compiled`
on request.
"""

from functools import cache, partial
from types import ModuleType, SimpleNamespace

import torch
from torch import Tensor

from tarflowlm.flow.numerics import cpu_forward, cpu_inverse, layout, reference
from tarflowlm.flow.numerics.derivatives import differentiable


def mixture_cdf(
    z: Tensor, log_w: Tensor, mean: Tensor, log_std: Tensor, *, compiled: bool = False
) -> tuple[Tensor, Tensor]:
    r"""Mixture-CDF map, elementwise (docs/math.md, eq. 8).

        u = Phi^-1(F(z)),   log_det = log du/dz = log F'(z) - log N(u; 0, 1)

    Shapes: z [...]; log_w (unnormalised), mean, log_std [..., K], broadcast against z; u, log_det
    [...], nats. Float32 or float64, all alike. Exact in both tails: |u| is limited by the range of
    z only. NaN gives NaN; z = +-inf gives u = +-inf. Errors: ValueError for mixed dtypes or
    differing K; RuntimeError for second derivatives.
    """
    shape, flat_z, params = layout.flatten(z, log_w, mean, log_std)
    path = _path(z, compiled)
    u, log_det = differentiable(path.mixture_cdf, partial(_cdf_gradients, path), flat_z, *params)
    return u.view(shape), log_det.view(shape)


def mixture_cdf_inverse(
    u: Tensor, log_w: Tensor, mean: Tensor, log_std: Tensor, *, compiled: bool = False
) -> Tensor:
    r"""Inverse of `mixture_cdf`, elementwise: z = F^-1(Phi(u)) (docs/math.md, eq. 20).

    Shapes, formats and errors: as `mixture_cdf`. Gradients are implicit (eq. 20a). The number of
    steps is fixed, and nothing is clamped. NaN gives NaN, u = +-inf gives z = +-inf.
    """
    shape, flat_u, params = layout.flatten(u, log_w, mean, log_std)
    path = _path(u, compiled)
    inverse = (cpu_inverse if path is cpu_forward else path).mixture_cdf_inverse
    if torch.is_grad_enabled():
        (z,) = differentiable(inverse, partial(_inverse_gradients, path), flat_u, *params)
    else:  # an autograd function takes as long as the work for a few rows
        z = inverse(flat_u, *params)
    return z.view(shape)


def mixture_log_density(
    z: Tensor, log_w: Tensor, mean: Tensor, log_std: Tensor, *, compiled: bool = False
) -> Tensor:
    r"""log p(z) = log F'(z) = log sum_k w_k N(z; m_k, s_k^2) of scalar mixtures, elementwise.

    Equals log_det + log N(u; 0, 1) of `mixture_cdf` (docs/math.md, eq. 6), without the cost of u.
    Shapes, formats and errors: as there.
    """
    shape, flat_z, params = layout.flatten(z, log_w, mean, log_std)
    path = _path(z, compiled)
    gradients = partial(_density_gradients, path)
    (log_p,) = differentiable(path.mixture_log_density, gradients, flat_z, *params)
    return log_p.view(shape)


Path = ModuleType | SimpleNamespace


def _path(z: Tensor, compiled: bool) -> Path:
    if layout.use_eager_cpu(z):
        return cpu_forward
    return _compiled() if compiled else reference


@cache
def _compiled() -> SimpleNamespace:
    """The maps of `reference`, each by torch.compile."""
    return SimpleNamespace(
        mixture_cdf=layout.fused(reference.mixture_cdf),
        mixture_backward=layout.fused(reference.mixture_backward),
        mixture_log_density=layout.fused(reference.mixture_log_density),
        mixture_cdf_inverse=layout.fused(reference.mixture_cdf_inverse),
    )


def _gradients(
    path: Path, z: Tensor, params: reference.Params, grad_log_p: Tensor, *noise: Tensor
) -> tuple[Tensor, ...]:
    """`mixture_backward`, with gradients of shared parameters [1, K] summed over rows."""
    of_z, *of_params = path.mixture_backward(z, params, grad_log_p, noise)
    return of_z, *(g.sum_to_size(p.shape) for g, p in zip(of_params, params, strict=True))


def _cdf_gradients(path: Path, z: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
    *params, u, log_det, grad_u, grad_log_det = rest
    # log_det = log p - log N(u; 0, 1): the second term depends on u alone
    of_u = grad_u + grad_log_det * u
    return _gradients(path, z, tuple(params), grad_log_det, u, log_det, of_u)


def _density_gradients(path: Path, z: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
    *params, _log_p, grad = rest
    return _gradients(path, z, tuple(params), grad)


def _inverse_gradients(path: Path, _u: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
    """Implicit: dz = (du - du/dparams dparams) / (du/dz)."""
    *params, z, grad_z = rest
    u, log_det = path.mixture_cdf(z, *params)
    grad_u = grad_z * torch.exp(-log_det)
    nothing = torch.zeros_like(u)
    _, *of_params = _gradients(path, z, tuple(params), nothing, u, log_det, -grad_u)
    return grad_u, *of_params
