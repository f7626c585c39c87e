"""Muon (Jordan et al. 2024) in float32 or bfloat16."""

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from tarflowlm.config import Precision

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""a, b, c of the iteration, as in torch.optim.Muon."""
STEPS = 5
BUCKET = 64
"""Matrices that an accelerator orthogonalises together; more would need more memory."""


def orthogonalise(matrix: Tensor) -> Tensor:
    """The matrix with all its singular values moved close to 1 (Newton-Schulz; Jordan et al. 2024).

        X <- X / |X|_F,   then five times   X <- (a I + b Y + c Y^2) X   with   Y = X X^T

    torch.optim.Muon does this in bfloat16 only, which some CPUs emulate thirty times slower.
    Several matrices of one shape may be stacked, [n, rows, columns].
    """
    a, b, c = COEFFICIENTS
    is_tall = matrix.shape[-2] > matrix.shape[-1]
    add_product = torch.addmm if matrix.ndim == 2 else torch.baddbmm
    x = matrix.mT if is_tall else matrix
    x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp(min=1e-7)
    gram = x @ x.mT
    product: Tensor | None = None
    # For long rows, multiplying only the factors F of X, which turn Y into F Y F, takes half the
    # time. Rounding errors grow to about 1e-4 in float32, a hundredth of bfloat16's.
    apart = x.shape[-1] >= 2 * x.shape[-2] and x.dtype != torch.bfloat16
    for step in range(STEPS):
        factor = add_product(gram, gram, gram, beta=b, alpha=c)
        if apart:
            factor.diagonal(dim1=-2, dim2=-1).add_(a)
            product = factor if product is None else factor @ product
        else:
            x = add_product(x, factor, x, beta=a)
        if step + 1 < STEPS:
            gram = factor @ gram @ factor if apart else x @ x.mT
    x = x if product is None else product @ x
    return x.mT if is_tall else x


class Muon(torch.optim.Muon):
    """torch.optim.Muon that orthogonalises in the given `precision`.

    Updates have the root mean square of AdamW's (`match_rms_adamw`), so both use one learning rate.
    `stacked` lists parameters that hold three matrices one below the other. Parameters must be
    whole matrices: FSDP2 takes AdamW.
    """

    def __init__(
        self,
        params: ParamsT,
        *,
        precision: Precision,
        stacked: Iterable[Tensor] = (),
        lr: float,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
    ) -> None:
        super().__init__(
            params,
            lr=lr,
            weight_decay=weight_decay,
            momentum=momentum,
            adjust_lr_fn="match_rms_adamw",
        )
        self.dtype = getattr(torch, precision)
        self.heights = {id(p): 3 for p in stacked}  # 1 for other parameters

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Take one step on the parameters that have a gradient."""
        for group in self.param_groups:
            alike = defaultdict[tuple[torch.Size, int], list[Tensor]](list)
            for p in group["params"]:
                if p.grad is not None:
                    alike[p.shape, self.heights.get(id(p), 1)].append(p)
            for (_, height), params in alike.items():
                # on a CPU, one matrix after the other stays in the cache
                size = 1 if params[0].is_cpu else BUCKET
                for start in range(0, len(params), size):
                    bucket = params[start : start + size]
                    updates = self.updates(bucket, height, group["momentum"])
                    torch._foreach_mul_(bucket, 1 - group["lr"] * group["weight_decay"])
                    torch._foreach_add_(bucket, updates, alpha=-group["lr"])

    def updates(self, params: list[Tensor], height: int, momentum: float) -> tuple[Tensor, ...]:
        """Nesterov's look-ahead orthogonalised, with a root mean square of 0.2.

        For parameters of one shape, each of `height` matrices.
        """
        for p in params:
            if "momentum_buffer" not in self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        buffers = [self.state[p]["momentum_buffer"] for p in params]
        gradients = [p.grad for p in params if p.grad is not None]
        torch._foreach_lerp_(buffers, gradients, 1 - momentum)
        ahead = torch.stack(torch._foreach_lerp(gradients, buffers, momentum))
        dtype = ahead.dtype if ahead.dtype == torch.float64 else self.dtype
        matrices = ahead.to(dtype).unflatten(1, (height, -1)).flatten(0, 1)
        found = orthogonalise(matrices).view(ahead.shape).to(ahead.dtype)
        return found.mul_(0.2 * max(matrices.shape[1:]) ** 0.5).unbind()
