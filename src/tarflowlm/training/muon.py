"""Muon in a chosen precision, for whole matrices and for the shards of FSDP2."""

from collections.abc import Iterable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

Precision = Literal["float32", "bfloat16"]
_DTYPES: dict[Precision, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16}

LARGE = 512 * 512
"""Elements of a matrix from which on bfloat16 is worth its rounding: below, there is little to win."""


def orthogonalised(
    matrix: Tensor, *, coefficients: tuple[float, float, float], steps: int, eps: float, dtype: torch.dtype
) -> Tensor:
    r"""U S' V^T for matrix = U S V^T [m, n], the singular values S' near 1: Newton-Schulz iteration (Jordan 2024).

        X <- X / |X|_F,   then `steps` times   X <- P X,   P = a I + b A + c A^2,   A = X X^T

    Products are taken in `dtype`, which the result has. Equal to what torch.optim.Muon computes, where that is
    bfloat16: PyTorch knows no other, and emulates it at a thirtieth of the speed on CPUs without such products.
    """
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.to(dtype)
    x = x.T if tall else x
    x = x / x.norm().clamp(min=eps)
    oblong = x.shape[1] >= 2 * x.shape[0]
    iterate = _iterate_products if oblong and dtype != torch.bfloat16 else _iterate
    x = iterate(x, coefficients, steps)
    return x.T if tall else x


def _iterate(x: Tensor, coefficients: tuple[float, float, float], steps: int) -> Tensor:
    a, b, c = coefficients
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


def _iterate_products(x: Tensor, coefficients: tuple[float, float, float], steps: int) -> Tensor:
    """The same from the product of all P alone, for A becomes P A P: half the time where rows are long.

    Rounding grows to some 1e-4 in float32, a hundredth of bfloat16's own.
    """
    a, b, c = coefficients
    gram, product = x @ x.T, None
    for step in range(steps):
        p = torch.addmm(gram, gram, gram, beta=b, alpha=c)
        p.diagonal().add_(a)
        product = p if product is None else p @ product
        if step + 1 < steps:
            gram = p @ gram @ p
    return x if product is None else product @ x


class Muon(torch.optim.Muon):
    """torch.optim.Muon (Jordan et al. 2024) that orthogonalises in `precision`, over whole matrices or DTensors.

    Orthogonalisation needs whole matrices. Of parameters that FSDP2 has cut into shards, momentum stays cut; each
    matrix is gathered, one process (they take turns) orthogonalises it, and the result is cut again: the update that
    one process would make, to rounding. PyTorch's own step on DTensors would communicate inside every iteration.
    Updates have the root mean square of AdamW's (`match_rms_adamw`), so that one learning rate serves both.

    `stacked` are parameters of which each third of the rows is a matrix of its own: queries, keys and values.
    """

    found_inf: Tensor | None = None
    """A scalar; where it is 1 the step changes nothing, and the host need not know. As in torch.amp."""

    def __init__(
        self, params: Iterable[Any], *, precision: Precision, stacked: Iterable[Tensor] = (), **options: Any
    ) -> None:
        super().__init__(params, adjust_lr_fn="match_rms_adamw", **options)
        self.precision = precision
        self._stacked = {id(p) for p in stacked}

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        taken = None if self.found_inf is None else 1 - self.found_inf
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            self._move_momentum(params, group["momentum"], taken)
            lr, decay = group["lr"], group["lr"] * group["weight_decay"]
            for p, change in zip(params, self._changes(params, group), strict=True):
                if taken is not None:
                    change = change * taken
                p.mul_(1 - decay if taken is None else 1 - decay * taken)
                p.add_(change, alpha=-lr)

    def _move_momentum(self, params: list[Tensor], momentum: float, taken: Tensor | None) -> None:
        for p in params:
            if "momentum_buffer" not in self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        buffers = [self.state[p]["momentum_buffer"] for p in params]
        grads = [p.grad for p in params if p.grad is not None]
        if taken is None:
            torch._foreach_lerp_(buffers, grads, 1 - momentum)
            return
        for buffer, grad in zip(buffers, grads, strict=True):
            # nothing times infinity would be NaN; a step that is left out has no other use for its gradients
            grad.nan_to_num_(0.0, 0.0, 0.0)
            buffer.add_((grad - buffer) * taken, alpha=1 - momentum)

    def _update(self, p: Tensor, group: dict[str, Any]) -> Tensor:
        """What is to be orthogonalised."""
        buffer: Tensor = self.state[p]["momentum_buffer"]
        assert p.grad is not None
        return p.grad.lerp(buffer, group["momentum"]) if group["nesterov"] else buffer

    def _changes(self, params: list[Tensor], group: dict[str, Any]) -> Iterator[Tensor]:
        """What the learning rate multiplies, for every parameter in turn."""
        if not isinstance(params[0], DTensor):
            for p in params:
                yield self._change(p, self._update(p, group), group)
            return
        mesh, own = params[0].device_mesh, {}
        turns = [index % mesh.size() for index in range(len(params))]
        for index, p in enumerate(params):
            whole = self._update(p, group).full_tensor()  # type: ignore[attr-defined]
            if turns[index] == mesh.get_rank():
                own[index] = self._change(p, whole, group)
        for index, p in enumerate(params):
            change = own.pop(index, None)
            change = torch.empty(p.shape, dtype=p.dtype, device=p.device) if change is None else change
            yield distribute_tensor(change, mesh, p.placements, src_data_rank=turns[index])  # type: ignore[attr-defined]

    def _change(self, p: Tensor, update: Tensor, group: dict[str, Any]) -> Tensor:
        """The orthogonalised update of a whole parameter, at a root mean square of 0.2."""
        dtype = torch.float64 if update.dtype == torch.float64 else _DTYPES[self.precision]
        parts = []
        for matrix in update.chunk(3 if id(p) in self._stacked else 1):
            found = orthogonalised(
                matrix, coefficients=group["ns_coefficients"], steps=group["ns_steps"], eps=group["eps"], dtype=dtype
            )
            parts.append(found.to(update.dtype).mul_(0.2 * max(matrix.shape) ** 0.5))
        return torch.cat(parts) if len(parts) > 1 else parts[0]


def quicker_precision(shapes: Iterable[torch.Size], device: torch.device) -> Precision:
    """What to orthogonalise matrices of these shapes in. A rule and not a trial, so that a seed has one result.

    bfloat16 on accelerators that have it, and on CPUs with tiles for it (AMX) where matrices are large. CPUs without
    such tiles take longer in bfloat16 than in float32, those without any such product thirty times as long.
    """
    if device.type != "cpu":
        native = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        return "bfloat16" if native else "float32"
    tiles = torch.cpu._is_amx_tile_supported() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    largest = max((shape.numel() for shape in shapes), default=0)
    return "bfloat16" if tiles and largest >= LARGE else "float32"
