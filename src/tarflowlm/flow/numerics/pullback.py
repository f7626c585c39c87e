"""How the backwards here call their closed-form gradients: once differentiable, and said so.

A plain `once_differentiable` stays silent unless the *cotangent* requires a gradient: with create_graph=True the
terms that depend on z or the parameters would just be missing from a second derivative. A Function sees them.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

Compute = Callable[..., tuple[Tensor | None, ...]]


def pull(compute: Compute, rows: int, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """`Pullback.apply`; under torch.compile, which does not trace a Function inside a backward, the plain call."""
    if torch.compiler.is_compiling():
        with torch.no_grad():
            return compute(*tensors)
    return Pullback.apply(compute, rows, *tensors)


class Pullback(Function):
    """Pullback.apply(compute, rows, *tensors) = compute(*tensors); its own backward raises RuntimeError.

    For `vmap`, of mixture problems only: the first `rows` tensors are [N], the other three the parameters,
    [N or 1, K], and `compute` returns the gradients of the first tensor and of the three parameters.
    """

    @staticmethod
    def forward(compute: Compute, rows: int, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
        with torch.no_grad():
            return compute(*tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor | None, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        raise RuntimeError("the mixture maps of tarflowlm.flow.numerics have first derivatives only")

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
        compute, rows, *tensors = args
        if rows == 0:
            raise NotImplementedError("vmap over the backward of a shared-codebook map")
        size = info.batch_size
        moved = [
            t.expand(size, *t.shape) if d is None else t.movedim(d, 0)
            for t, d in zip(tensors, in_dims[2:], strict=True)
        ]
        num_rows = moved[0].shape[1]
        flat = [t.reshape(-1) for t in moved[:rows]]
        # A parameter shared by the rows of one batch element still has a gradient of its own in every element.
        flat += [t.expand(size, num_rows, t.shape[-1]).reshape(-1, t.shape[-1]) for t in moved[rows:]]
        of_z, *of_params = Pullback.apply(compute, rows, *flat)
        shaped = [g.view(size, num_rows, -1) for g in of_params]
        summed = [
            g if p.shape[1] == num_rows else g.sum(1, keepdim=True) for g, p in zip(shaped, moved[rows:], strict=True)
        ]
        return (of_z.view(size, num_rows), *summed), (0,) * 4
