"""What the autograd functions of this folder share: gradients that refuse to be differentiated."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import BackwardCFunction as Context

__all__ = ["Context", "first_derivatives", "saved"]

Compute = Callable[..., tuple[Tensor, ...]]


def saved(ctx: Context) -> tuple[Tensor, ...]:
    """What the forward saved; PyTorch's own type says that it is one tensor."""
    return ctx.saved_tensors


def first_derivatives(compute: Compute, *tensors: Tensor) -> tuple[Tensor, ...]:
    """compute(*tensors), the gradients of a backward, without recording it.

    Differentiating them raises RuntimeError. PyTorch's `once_differentiable` stays silent unless
    the *cotangent* requires a gradient: with create_graph=True a second derivative would lack the
    terms that depend on z or the parameters. A Function sees them.
    """
    return _FirstDerivatives.apply(compute, *tensors)


class _FirstDerivatives(Function):
    @staticmethod
    def forward(compute: Compute, *tensors: Tensor) -> tuple[Tensor, ...]:
        with torch.no_grad():
            return compute(*tensors)

    @staticmethod
    def setup_context(ctx: Context, inputs: tuple[object, ...], output: tuple[Tensor, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Context, *grads: Tensor | None) -> None:
        raise RuntimeError(
            "the mixture maps of tarflowlm.flow.numerics have first derivatives only"
        )
