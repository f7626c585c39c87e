"""One autograd function for all maps whose gradients have a closed form."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import BackwardCFunction as Context

Tensors = tuple[Tensor, ...]


def differentiable(
    compute: Callable[..., Tensor | Tensors], gradients: Callable[..., Tensors], *inputs: Tensor
) -> Tensors:
    """compute(*inputs) as a tuple; its backward is gradients(*inputs, *outputs, *cotangents).

    Inputs and outputs are all that is saved.
    """
    return _Differentiable.apply(compute, gradients, *inputs)


def first_derivatives_only() -> None:
    """RuntimeError in a backward with create_graph=True.

    PyTorch's `once_differentiable` stays silent unless the *cotangent* requires a gradient: a
    second derivative would lack the terms that depend on z or the parameters.
    """
    if torch.is_grad_enabled():
        raise RuntimeError(
            "the mixture maps of tarflowlm.flow.numerics have first derivatives only"
        )


class _Differentiable(Function):
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
        gradients = ctx.gradients  # type: ignore[attr-defined]
        return None, None, *gradients(*ctx.saved_tensors, *cotangents)
