"""Shared parts of the closed-form backwards.

N rows, K components. The maps here can be differentiated once, and say so. A plain `once_differentiable` stays silent
unless the *cotangent* requires a gradient: with create_graph=True the terms that depend on z or the parameters would
just be missing from a second derivative. A Function sees them, and raises.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

Compute = Callable[..., tuple[Tensor | None, ...]]
"""Gradients from tensors: what a backward computes in closed form."""


def first_derivatives(compute: Compute, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """compute(*tensors) without recording it; differentiating the result raises RuntimeError."""
    if torch.compiler.is_compiling():
        # A compiler does not trace a Function inside a backward.
        with torch.no_grad():
            return compute(*tensors)
    return _FirstDerivatives.apply(compute, *tensors)


class _FirstDerivatives(Function):
    @staticmethod
    def forward(compute: Compute, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
        with torch.no_grad():
            return compute(*tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor | None, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        raise RuntimeError("the mixture maps of tarflowlm.flow.numerics have first derivatives only")


def sum_to_shared(grads: Sequence[Tensor], params: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Gradients [N, K] in the shapes of their parameters: a parameter [1, K] shared by all rows gets the sum."""
    return tuple(
        g if p.shape[0] == g.shape[0] else g.sum(0, keepdim=True) for g, p in zip(grads, params, strict=True)
    )
