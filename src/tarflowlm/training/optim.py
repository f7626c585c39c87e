"""Muon in a precision of its choice, which optimiser each parameter gets, and the learning-rate schedules.

The guards of a step are here, too: what is not finite in a step that was skipped, and spikes of the loss.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from tarflowlm.config import OptimConfig, Precision
from tarflowlm.language_model import LanguageModel
from tarflowlm.model import TarFlowLM

LARGE = 512 * 512
"""Smallest matrix, in elements, for which bfloat16 is worth its rounding on a CPU."""


def orthogonalise(
    matrix: Tensor, *, coefficients: tuple[float, float, float], steps: int, eps: float, dtype: torch.dtype
) -> Tensor:
    r"""The matrix with all its singular values moved close to 1, by Newton-Schulz iteration (Jordan et al. 2024).

        X <- X / |X|_F,   then `steps` times   X <- (a I + b Y + c Y^2) X   with   Y = X X^T

    a, b, c are the `coefficients`. Products are taken in `dtype`, the dtype of the result. With bfloat16 this is what
    torch.optim.Muon computes; it has no other precision, and CPUs without bfloat16 products emulate it about thirty
    times slower.
    """
    tall, (a, b, c) = matrix.shape[0] > matrix.shape[1], coefficients
    x = matrix.to(dtype)
    x = x.T if tall else x
    x = x / x.norm().clamp(min=eps)
    if x.shape[1] >= 2 * x.shape[0] and dtype != torch.bfloat16:
        x = _iterate_products(x, a, b, c, steps)
    else:
        for _ in range(steps):
            gram = x @ x.T
            x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x


def _iterate_products(x: Tensor, a: float, b: float, c: float, steps: int) -> Tensor:
    """The same by multiplying the factors F of X alone, which turn Y into F Y F: half the time for long rows.
    Rounding errors grow to about 1e-4 in float32, a hundredth of those of bfloat16."""
    gram, product = x @ x.T, None
    for step in range(steps):
        factor = torch.addmm(gram, gram, gram, beta=b, alpha=c)
        factor.diagonal().add_(a)
        product = factor if product is None else factor @ product
        if step + 1 < steps:
            gram = factor @ gram @ factor
    return x if product is None else product @ x


class Muon(torch.optim.Muon):
    """torch.optim.Muon (Jordan et al. 2024) that orthogonalises in `precision`, for whole matrices or DTensors.

    Orthogonalisation needs whole matrices. For parameters that FSDP2 has sharded, the momentum stays sharded; each
    matrix is gathered, one process (they take turns) orthogonalises it, and the result is sharded again. Up to
    rounding that is the update of a single process. PyTorch's own step on DTensors would communicate in every
    iteration. Updates have the root mean square of AdamW's (`match_rms_adamw`), so both use one learning rate.

    `stacked` lists parameters that hold three matrices one below the other: queries, keys and values.
    """

    found_inf: Tensor | None = None
    """A scalar on the device, as in torch.amp; if it is 1, `step` changes nothing."""

    def __init__(
        self, params: Iterable[Any], *, precision: Precision, stacked: Iterable[Tensor] = (), **options: Any
    ) -> None:
        super().__init__(params, adjust_lr_fn="match_rms_adamw", **options)
        self.precision = precision
        self._stacked = {id(p) for p in stacked}

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Take one step, unless `found_inf` is 1. `closure` is ignored."""
        taken = None if self.found_inf is None else 1 - self.found_inf
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            self._update_momentum(params, group["momentum"], taken)
            decay = group["lr"] * group["weight_decay"]
            for p, update in zip(params, self._updates(params, group), strict=True):
                p.mul_(1 - decay if taken is None else 1 - decay * taken)
                p.add_(update if taken is None else update * taken, alpha=-group["lr"])

    def _update_momentum(self, params: list[Tensor], momentum: float, taken: Tensor | None) -> None:
        for p in params:
            if "momentum_buffer" not in self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        buffers = [self.state[p]["momentum_buffer"] for p in params]
        grads = [p.grad for p in params if p.grad is not None]
        if taken is None:
            torch._foreach_lerp_(buffers, grads, 1 - momentum)
            return
        for buffer, grad in zip(buffers, grads, strict=True):
            # 0 times infinity would be NaN; the gradients of a skipped step are not needed afterwards
            grad.nan_to_num_(0.0, 0.0, 0.0)
            buffer.add_((grad - buffer) * taken, alpha=1 - momentum)

    def _averaged_gradient(self, p: Tensor, group: dict[str, Any]) -> Tensor:
        buffer: Tensor = self.state[p]["momentum_buffer"]
        assert p.grad is not None
        return p.grad.lerp(buffer, group["momentum"]) if group["nesterov"] else buffer

    def _updates(self, params: list[Tensor], group: dict[str, Any]) -> Iterator[Tensor]:
        if not isinstance(params[0], DTensor):
            for p in params:
                yield self._orthogonalise(p, self._averaged_gradient(p, group), group)
            return
        mesh, own = params[0].device_mesh, {}
        turns = [index % mesh.size() for index in range(len(params))]
        for index, p in enumerate(params):
            whole = self._averaged_gradient(p, group).full_tensor()  # type: ignore[attr-defined]
            if turns[index] == mesh.get_rank():
                own[index] = self._orthogonalise(p, whole, group)
        for index, p in enumerate(params):
            update = own.pop(index) if index in own else torch.empty(p.shape, dtype=p.dtype, device=p.device)
            yield distribute_tensor(update, mesh, p.placements, src_data_rank=turns[index])  # type: ignore[attr-defined]

    def _orthogonalise(self, p: Tensor, gradient: Tensor, group: dict[str, Any]) -> Tensor:
        """The orthogonalised gradient of a whole parameter, scaled to a root mean square of 0.2."""
        dtype = torch.float64 if gradient.dtype == torch.float64 else getattr(torch, self.precision)
        options = {"coefficients": group["ns_coefficients"], "steps": group["ns_steps"], "eps": group["eps"]}
        parts = []
        for matrix in gradient.chunk(3 if id(p) in self._stacked else 1):
            found = orthogonalise(matrix, dtype=dtype, **options)
            parts.append(found.to(gradient.dtype).mul_(0.2 * max(matrix.shape) ** 0.5))
        return torch.cat(parts) if len(parts) > 1 else parts[0]


def faster_precision(shapes: Iterable[torch.Size], device: torch.device) -> Precision:
    """The faster precision for matrices of these shapes, by a fixed rule, so that results are reproducible: bfloat16
    on GPUs that support it, and for large matrices on CPUs with AMX tiles (others are slower in it); else float32."""
    if device.type != "cpu":
        native = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        return "bfloat16" if native else "float32"
    tiles = torch.cpu._is_amx_tile_supported() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    largest = max((shape.numel() for shape in shapes), default=0)
    return "bfloat16" if tiles and largest >= LARGE else "float32"


CODEBOOK = ("codebook.mean", "codebook.log_std", "coupling.own.mean", "coupling.own.log_std")
"""Name endings of the codebook parameters: the encoder's, and those of Mix-d blocks with their own codebook."""
MUON = ("transformer.layers.", "token_features.")
"""Modules whose matrices Muon optimises."""
STACKED = "attention.qkv.weight"
"""Name ending of parameters that hold three matrices of equal shape, one below the other."""


def schedule(config: OptimConfig, step: int, num_steps: int | float) -> float:
    """The learning rate over its peak, in (0, 1], at `step` (0-based) of `num_steps`, which may be an estimate."""
    warmup = max(1, round(config.warmup * num_steps))
    if step < warmup:
        return (step + 1) / warmup
    if config.schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, num_steps - warmup)))
    decay = max(1, round(config.decay * num_steps))
    return min(1.0, (num_steps - step) / decay)


def muon_matrices(config: OptimConfig, model: nn.Module) -> dict[str, nn.Parameter]:
    """The trainable parameters of `model` that Muon optimises, by name; empty with AdamW alone."""
    if config.optimizer == "adamw":
        return {}
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad and p.ndim == 2]
    return {name: p for name, p in named if name.endswith(".weight") and any(part in name for part in MUON)}


def with_precision(config: OptimConfig, model: nn.Module, device: torch.device) -> OptimConfig:
    """`config` with a `muon_precision` of auto replaced by the faster one for `model` on `device`."""
    if config.muon_precision != "auto":
        return config
    shapes = [p.shape for p in muon_matrices(config, model).values()]
    return replace(config, muon_precision=faster_precision(shapes, device))


def build_optimizers(config: OptimConfig, model: nn.Module) -> list[torch.optim.Optimizer]:
    """The optimisers of the trainable parameters of `model`: AdamW, and Muon if it has matrices to optimise.

    Weight decay acts on matrices only. Muon (Jordan et al. 2024) optimises the matrices of the Transformers and of
    the features inside a patch, AdamW the input maps, heads, codebooks, vectors and block-diagonal tensors.
    """
    muon = muon_matrices(config, model)
    matrices, vectors, biases, codebook = (list[nn.Parameter]() for _ in range(4))
    for name, p in model.named_parameters():
        if not p.requires_grad or name in muon:
            continue
        if name.endswith(CODEBOOK):
            codebook.append(p)
        elif ".biases." in name or name.endswith(".evidence"):
            # of a head: biases are stacked over its groups, and its evidence starts nonzero
            biases.append(p)
        else:
            (matrices if p.ndim >= 2 else vectors).append(p)
    groups: list[dict[str, Any]] = [
        {"params": matrices, "weight_decay": config.weight_decay, "lr_scale": 1.0},
        {"params": vectors + biases, "weight_decay": 0.0, "lr_scale": 1.0},
        {"params": codebook, "weight_decay": 0.0, "lr_scale": config.codebook_lr_scale},
    ]
    groups, betas = [g for g in groups if g["params"]], (config.beta1, config.beta2)
    adamw = torch.optim.AdamW(groups, lr=config.lr, betas=betas, eps=1e-10, fused=True)
    optimizers: list[torch.optim.Optimizer] = [adamw]
    if muon:
        precision = with_precision(config, model, next(iter(muon.values())).device).muon_precision
        assert precision != "auto"
        stacked = [p for name, p in muon.items() if name.endswith(STACKED)] if config.muon_qkv == "apart" else []
        groups = [{"params": list(muon.values()), "lr_scale": 1.0}]
        options: dict[str, Any] = {"lr": config.lr, "weight_decay": config.weight_decay, "momentum": 0.95}
        optimizers.append(Muon(groups, precision=precision, stacked=stacked, **options))
    return optimizers


def set_learning_rate(optimizers: list[torch.optim.Optimizer], lr: float) -> None:
    """Set the learning rate of every parameter group to `lr` times its `lr_scale`."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]


NAMED = 8
"""Parameters listed by name in a record or message."""
MEMORY = 100
"""Steps that the running loss averages over; spikes are detected once it has seen half as many."""


@torch.no_grad()
def norms(tensors: Iterable[Tensor]) -> Tensor:
    """The norm of every tensor, of the whole one where it is sharded. Collective under FSDP2."""
    each = torch.stack(torch._foreach_norm([*tensors]))
    return each.full_tensor() if isinstance(each, DTensor) else each


def not_finite(names: Iterable[str], norms: Tensor) -> list[str]:
    """Those of the names whose norm is not finite."""
    return [name for name, norm in zip(names, norms.tolist(), strict=True) if not math.isfinite(norm)]


def terms_of(model: LanguageModel, tokens: Tensor, noise: Tensor) -> dict[str, Tensor]:
    """The terms of the loss on `tokens` [B, T], by the names that messages use, [B]."""
    if isinstance(model, TarFlowLM):
        return model.elbo(tokens, noise)[0].by_name()
    return {"log_prob": model.bound(tokens, noise)}


@dataclass
class RunningLoss:
    """Exponentially weighted mean and variance of the loss, in nats per token; saved with the run."""

    mean: float = 0.0
    variance: float = 0.0
    count: int = 0

    def update(self, loss: float) -> float:
        """Add `loss`; returns how many standard deviations it lies above the earlier mean, or 0 for the first 50."""
        deviation, sigmas = loss - self.mean, 0.0
        if self.count >= MEMORY // 2 and self.variance > 0:
            sigmas = deviation / math.sqrt(self.variance)
        # a plain average for the first MEMORY losses
        weight = max(1 / (self.count + 1), 1 / MEMORY)
        self.mean += weight * deviation
        self.variance = (1 - weight) * (self.variance + weight * deviation**2)
        self.count += 1
        return sigmas
