r"""Scalar mixtures: u = Phi^-1(F(z)) with its log-derivative, the inverse, and log F'.

    F(z) = sum_k w_k Phi((z - m_k) / s_k),   w = softmax(log_w),   s = exp(log_std)

The public functions take any leading shape, have closed-form derivatives, and choose a path: the
linear space of `cpu_forward` and `cpu_inverse`, or the log space of `reference` on accelerators.
"""

from types import ModuleType

import torch
from torch import Tensor
from torch.autograd import Function

from tarflowlm.flow.numerics import cpu_forward, cpu_inverse, layout, reference
from tarflowlm.flow.numerics.derivatives import Context, first_derivatives, saved


def mixture_cdf(z: Tensor, log_w: Tensor, mean: Tensor, log_std: Tensor) -> tuple[Tensor, Tensor]:
    r"""Mixture-CDF map, elementwise (docs/math.md, eq. 8).

        u = Phi^-1(F(z)),   log_det = log du/dz = log F'(z) - log N(u; 0, 1)

    Shapes: z [...]; log_w (unnormalised), mean, log_std [..., K], broadcast against z; u, log_det
    [...], nats. Float32 or float64, all alike. Exact in both tails: |u| is limited by the range of
    z only. NaN gives NaN; z = +-inf gives u = +-inf. Errors: ValueError for mixed dtypes or
    differing K; RuntimeError for second derivatives.
    """
    shape, flat_z, params = layout.flatten(z, log_w, mean, log_std)
    u, log_det = _MixtureCdf.apply(flat_z, *params)
    return u.view(shape), log_det.view(shape)


def mixture_cdf_inverse(u: Tensor, log_w: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    r"""Inverse of `mixture_cdf`, elementwise: z = F^-1(Phi(u)) (docs/math.md, eq. 20).

    Shapes: u [...]; log_w (unnormalised), mean, log_std [..., K], broadcast against u; z [...].
    Float32 or float64. Gradients are implicit (eq. 20a). The number of steps is fixed, nothing is
    clamped and, on an accelerator, nothing is copied to the host. NaN gives NaN, u = +-inf gives
    z = +-inf. Errors: as `mixture_cdf`.
    """
    shape, flat_u, params = layout.flatten(u, log_w, mean, log_std)
    # without a graph as it is: a Function takes as long as the work for a few rows
    inverse = _MixtureCdfInverse.apply if torch.is_grad_enabled() else _MixtureCdfInverse.forward
    return inverse(flat_u, *params).view(shape)


def mixture_log_density(z: Tensor, log_w: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    r"""log p(z) = log F'(z) = log sum_k w_k N(z; m_k, s_k^2) of scalar mixtures, elementwise.

    Equals log_det + log N(u; 0, 1) of `mixture_cdf` (docs/math.md, eq. 6), without the cost of u.

    Shapes: z [...]; log_w (unnormalised), mean, log_std [..., K], broadcast against z; returns
    [...], nats. Float32 or float64, any range. Errors: as `mixture_cdf`.
    """
    shape, flat_z, params = layout.flatten(z, log_w, mean, log_std)
    return _MixtureLogDensity.apply(flat_z, *params).view(shape)


def _path(z: Tensor) -> ModuleType:
    return cpu_forward if layout.use_eager_cpu(z) else reference


def _cdf_gradients(
    z: Tensor, u: Tensor, log_det: Tensor, grad_u: Tensor, grad_log_p: Tensor, *params: Tensor
) -> tuple[Tensor, ...]:
    of_z, *of_params = _path(z).mixture_backward(z, params, grad_log_p, (u, log_det, grad_u))
    return of_z, *layout.sum_to_shared(of_params, params)


def _density_gradients(z: Tensor, grad: Tensor, *params: Tensor) -> tuple[Tensor, ...]:
    of_z, *of_params = _path(z).mixture_backward(z, params, grad)
    return of_z, *layout.sum_to_shared(of_params, params)


class _MixtureCdf(Function):
    """Saves inputs and outputs only; the backward computes the rest again, chunk by chunk."""

    @staticmethod
    def forward(z: Tensor, log_w: Tensor, mean: Tensor, log_std: Tensor) -> tuple[Tensor, Tensor]:
        return _path(z).mixture_cdf(z, log_w, mean, log_std)

    @staticmethod
    def setup_context(
        ctx: Context, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]
    ) -> None:
        ctx.save_for_backward(*inputs, *output)

    @staticmethod
    def backward(ctx: Context, grad_u: Tensor, grad_log_det: Tensor) -> tuple[Tensor, ...]:
        z, log_w, mean, log_std, u, log_det = saved(ctx)
        # log_det = log p - log N(u; 0, 1): the second term depends on u alone
        grad_u = grad_u + grad_log_det * u
        return first_derivatives(
            _cdf_gradients, z, u, log_det, grad_u, grad_log_det, log_w, mean, log_std
        )


class _MixtureCdfInverse(Function):
    """Implicit gradients: dz = (du - du/dparams dparams) / (du/dz)."""

    @staticmethod
    def forward(u: Tensor, log_w: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
        path = cpu_inverse if layout.use_eager_cpu(u) else reference
        return path.mixture_cdf_inverse(u, log_w, mean, log_std)

    @staticmethod
    def setup_context(ctx: Context, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[1:], output)

    @staticmethod
    def backward(ctx: Context, grad_z: Tensor) -> tuple[Tensor, ...]:
        *params, z = saved(ctx)
        u, log_det = _MixtureCdf.apply(z, *params)
        grad_u = grad_z * torch.exp(-log_det)
        _, *grads = first_derivatives(
            _cdf_gradients, z, u, log_det, -grad_u, torch.zeros_like(grad_u), *params
        )
        return grad_u, *grads


class _MixtureLogDensity(Function):
    @staticmethod
    def forward(z: Tensor, log_w: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
        return _path(z).mixture_log_density(z, log_w, mean, log_std)

    @staticmethod
    def setup_context(ctx: Context, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Context, grad: Tensor) -> tuple[Tensor, ...]:
        z, *params = saved(ctx)
        return first_derivatives(_density_gradients, z, grad, *params)
