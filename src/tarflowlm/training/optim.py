"""Muon in a precision of its choice, which optimiser each parameter gets, and the learning-rate
schedules.

What is not finite in a step that was skipped is found here, too.
"""

import math
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from tarflowlm.config import OptimConfig, Precision, RunConfig

LARGE = 512 * 512
"""Smallest matrix, in elements, for which bfloat16 is worth its rounding on a CPU."""
BUCKET = 64
"""Matrices that are exchanged, and orthogonalised, together; more take more memory."""


def orthogonalise(
    matrix: Tensor, *, coefficients: tuple[float, float, float], steps: int, eps: float
) -> Tensor:
    r"""The matrix with all its singular values moved close to 1, by Newton-Schulz iteration (Jordan
    et al. 2024).

        X <- X / |X|_F,   then `steps` times   X <- (a I + b Y + c Y^2) X   with   Y = X X^T

    a, b, c are the `coefficients`. With a matrix in bfloat16 this is what torch.optim.Muon
    computes; it has no other precision, and CPUs without bfloat16 products emulate it about thirty
    times slower. Several matrices of one shape may be stacked, [n, rows, columns].
    """
    tall, (a, b, c) = matrix.shape[-2] > matrix.shape[-1], coefficients
    add_product = torch.addmm if matrix.ndim == 2 else torch.baddbmm
    x = matrix.mT if tall else matrix
    x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp(min=eps)
    gram, product = x @ x.mT, None
    # Multiply the factors F of X alone, which turn Y into F Y F, where that takes half the time:
    # for long rows. Rounding errors grow to about 1e-4 in float32, a hundredth of those of
    # bfloat16.
    apart = x.shape[-1] >= 2 * x.shape[-2] and x.dtype != torch.bfloat16
    for step in range(steps):
        factor = add_product(gram, gram, gram, beta=b, alpha=c)
        if apart:
            factor.diagonal(dim1=-2, dim2=-1).add_(a)
            product = factor if product is None else factor @ product
        else:
            x = add_product(x, factor, x, beta=a)
        if step + 1 < steps:
            gram = factor @ gram @ factor if apart else x @ x.mT
    x = x if product is None else product @ x
    return x.mT if tall else x


def orthogonalise_all(stacks: list[Tensor], *, batched: bool, **options: Any) -> list[Tensor]:
    """`orthogonalise` stacks [n, rows, columns] of matrices: if `batched`, all of one shape in the
    same kernels.
    """
    if not batched:
        each = [[orthogonalise(matrix, **options) for matrix in stack] for stack in stacks]
        return [torch.stack(x) if len(x) > 1 else x[0][None] for x in each]
    wide, found = [x.mT if x.shape[1] > x.shape[2] else x for x in stacks], [*stacks]
    for shape in {x.shape[1:] for x in wide}:
        places = [i for i, x in enumerate(wide) if x.shape[1:] == shape]
        together = orthogonalise(torch.cat([wide[i] for i in places]), **options)
        for i, x in zip(places, together.split([len(wide[i]) for i in places]), strict=True):
            found[i] = x if wide[i] is stacks[i] else x.mT
    return found


def exchange(
    parts: list[list[Tensor]], shapes: list[list[Any]], like: Tensor, group: Any
) -> list[Tensor]:
    """Send the tensors `parts[r]` to every process r, and receive those of `shapes[r]` from it, in
    one collective.
    """
    sent = torch.cat([like.new_empty(0), *(t.flatten() for some in parts for t in some)])
    sizes = [[math.prod(shape) for shape in some] for some in shapes]
    received = sent.new_empty(sum(map(sum, sizes)))
    dist.all_to_all_single(
        received, sent, [*map(sum, sizes)], [sum(t.numel() for t in p) for p in parts], group
    )
    flat = received.split([size for some in sizes for size in some])
    return [
        t.view(shape)
        for t, shape in zip(flat, (shape for some in shapes for shape in some), strict=True)
    ]


class Muon(torch.optim.Muon):
    """torch.optim.Muon (Jordan et al. 2024) that orthogonalises in `precision`, for whole matrices
    or DTensors.

    Orthogonalisation needs whole matrices. If FSDP2 has sharded them, the momentum stays sharded,
    and every matrix has an owner: one collective takes the shards of a bucket of matrices to the
    owners, another one returns theirs of the results. Up to rounding that is the update of a single
    process. Updates have the root mean square of AdamW's (`match_rms_adamw`), so both use one
    learning rate.

    `stacked` lists parameters that hold three matrices one below the other: queries, keys and
    values.
    """

    found_inf: Tensor | None = None
    """A scalar on the device, as in torch.amp; if it is 1, `step` changes nothing."""

    def __init__(
        self,
        params: Iterable[Any],
        *,
        precision: Precision,
        stacked: Iterable[Tensor] = (),
        **options: Any,
    ) -> None:
        super().__init__(params, adjust_lr_fn="match_rms_adamw", **options)
        self.precision = precision
        self._heights = {id(p): 3 for p in stacked}  # 1 for other parameters

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Take one step, unless `found_inf` is 1. `closure` is ignored."""
        taken = None if self.found_inf is None else 1 - self.found_inf
        for group in self.param_groups:
            params, decay = (
                [p for p in group["params"] if p.grad is not None],
                group["lr"] * group["weight_decay"],
            )
            # on a CPU, one matrix after the other stays in the cache
            alone = all(p.device.type == "cpu" and not isinstance(p, DTensor) for p in params)
            for start in range(0, len(params), size := 1 if alone else BUCKET):
                bucket = params[start : start + size]
                updates = self._updates(
                    bucket, self._averaged_gradients(bucket, group, taken), group
                )
                shards = [_local(p) for p in bucket]
                torch._foreach_mul_(shards, 1 - decay if taken is None else 1 - decay * taken)
                if taken is not None:
                    torch._foreach_mul_(updates, taken)
                torch._foreach_add_(shards, updates, alpha=-group["lr"])

    def _averaged_gradients(
        self, params: list[Tensor], group: dict[str, Any], taken: Tensor | None
    ) -> list[Tensor]:
        """Update the momentum; returns what is orthogonalised, or this process's shards of it."""
        for p in params:
            if "momentum_buffer" not in self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        buffers = [_local(self.state[p]["momentum_buffer"]) for p in params]
        grads = [_local(p.grad) for p in params if p.grad is not None]
        if taken is not None:
            finite = (
                taken > 0
            )  # 0 times infinity would be NaN; a mean of the momentum with itself changes nothing
            grads = [torch.where(finite, *pair) for pair in zip(grads, buffers, strict=True)]
        torch._foreach_lerp_(buffers, grads, 1 - group["momentum"])
        return (
            list(torch._foreach_lerp(grads, buffers, group["momentum"]))
            if group["nesterov"]
            else buffers
        )

    def _updates(
        self, params: list[Tensor], gradients: list[Tensor], group: dict[str, Any]
    ) -> list[Tensor]:
        """The gradients orthogonalised, with a root mean square of 0.2, or this process's shards of
        that.
        """
        first, update = (
            params[0],
            self._updates_by_owners if isinstance(params[0], DTensor) else self._orthogonalise,
        )
        dtype = torch.float64 if first.dtype == torch.float64 else getattr(torch, self.precision)
        updates = [
            x.to(first.dtype) for x in update(params, [g.to(dtype) for g in gradients], group)
        ]
        sides = [max(len(p) // self._heights.get(id(p), 1), p.shape[1]) for p in params]
        torch._foreach_mul_(updates, [0.2 * side**0.5 for side in sides])
        return updates

    def _orthogonalise(
        self, params: list[Tensor], matrices: list[Tensor], group: dict[str, Any]
    ) -> list[Tensor]:
        """`orthogonalise_all` for the gradients of whole parameters."""
        options = {
            "coefficients": group["ns_coefficients"],
            "steps": group["ns_steps"],
            "eps": group["eps"],
        }
        stacks = [
            x.unflatten(0, (self._heights.get(id(p), 1), -1))
            for p, x in zip(params, matrices, strict=True)
        ]
        batched = any(p.device.type != "cpu" for p in params)
        return [x.flatten(0, 1) for x in orthogonalise_all(stacks, batched=batched, **options)]

    def _updates_by_owners(
        self, params: list[Any], shards: list[Tensor], group: dict[str, Any]
    ) -> list[Tensor]:
        """The same for shards: every matrix goes to its owner, and its result comes back, in two
        collectives.
        """
        mesh, sizes = params[0].device_mesh, [p.numel() * min(p.shape) for p in params]
        world, channel = mesh.size(), mesh.get_group()
        # in turns by size; FSDP2 cuts rows as `torch.chunk` does
        order = sorted(range(len(params)), key=sizes.__getitem__, reverse=True)
        owned, own = [order[r::world] for r in range(world)], order[mesh.get_local_rank() :: world]
        rows = [
            [max(0, min(n := -(-len(p) // world), len(p) - r * n)) for r in range(world)]
            for p in params
        ]
        shapes: list[list[Any]] = [
            [(rows[i][r], params[i].shape[1]) for i in own] for r in range(world)
        ]
        parts = exchange([[shards[i] for i in some] for some in owned], shapes, shards[0], channel)
        whole = [torch.cat(parts[k :: len(own)]) for k in range(len(own))]
        found = self._orthogonalise([params[i] for i in own], whole, group)
        cut = [x.split(rows[i]) for i, x in zip(own, found, strict=True)]
        shapes = [[shards[i].shape for i in some] for some in owned]
        parts = exchange([[x[r] for x in cut] for r in range(world)], shapes, shards[0], channel)
        updates = dict(zip((i for some in owned for i in some), parts, strict=True))
        return [updates[i] for i in range(len(params))]


def _local(p: Tensor) -> Tensor:
    return p.to_local() if isinstance(p, DTensor) else p


def has_bfloat16(device: torch.device) -> bool:
    """Whether the device multiplies matrices in bfloat16 by instructions of its own; others emulate
    that slowly.
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    instructions = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return device.type == "cpu" and instructions and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def faster_precision(shapes: Iterable[torch.Size], device: torch.device) -> Precision:
    """The faster precision for Muon's matrices of these shapes, by a fixed rule, so that results
    are reproducible: bfloat16 on GPUs that support it, and for large matrices on CPUs with AMX
    tiles; else float32.
    """
    large = (
        max((shape.numel() for shape in shapes), default=0) >= LARGE
        and torch.cpu._is_amx_tile_supported()
    )
    return "bfloat16" if has_bfloat16(device) and (large or device.type == "cuda") else "float32"


CODEBOOK = ("codebook.mean", "codebook.log_std", "coupling.own.mean", "coupling.own.log_std")
"""Name endings of the codebook parameters: the encoder's, and those of Mix-d blocks with their own
codebook.
"""
TAPS, TAPS_SCALE = "transformer.input_taps", 3.0
"""Name ending of a convolution's weights, and their learning rate over the rest."""
MUON = ("transformer.layers.", "token_features.")
"""Modules whose matrices Muon optimises."""
STACKED = "attention.qkv.weight"
"""Name ending of parameters that hold three matrices of equal shape, one below the other."""


def schedule(config: OptimConfig, step: int, num_steps: int | float) -> float:
    """The learning rate over its peak, in (0, 1], at `step` (0-based) of `num_steps`, which may be
    an estimate.
    """
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
    return {
        name: p
        for name, p in named
        if name.endswith(".weight") and any(part in name for part in MUON)
    }


def muon_precision(
    config: OptimConfig, muon: dict[str, nn.Parameter], device: torch.device
) -> Precision:
    """The precision of Muon for these matrices: that of `config`, or the faster one if it is
    auto.
    """
    if config.muon_precision != "auto":
        return config.muon_precision
    return faster_precision([p.shape for p in muon.values()], device)


def with_precision(run: RunConfig, model: nn.Module, device: torch.device) -> RunConfig:
    """`run` with the precisions that are auto replaced by the faster ones for `model` on
    `device`.
    """
    train, muon = run.train, muon_precision(run.optim, muon_matrices(run.optim, model), device)
    if train.precision == "auto":
        train = replace(train, precision="bfloat16" if has_bfloat16(device) else "float32")
    return replace(run, optim=replace(run.optim, muon_precision=muon), train=train)


def build_optimizers(config: OptimConfig, model: nn.Module) -> list[torch.optim.Optimizer]:
    """The optimisers of the trainable parameters of `model`: AdamW, and Muon if it has matrices to
    optimise.

    Weight decay acts on matrices only. Muon (Jordan et al. 2024) optimises the matrices of the
    Transformers and of the features inside a patch, AdamW the input maps, heads, codebooks, vectors
    and block-diagonal tensors.
    """
    muon = muon_matrices(config, model)
    matrices, vectors, biases, codebook, taps = (list[nn.Parameter]() for _ in range(5))
    for name, p in model.named_parameters():
        if not p.requires_grad or name in muon:
            continue
        if name.endswith(CODEBOOK):
            codebook.append(p)
        elif name.endswith(TAPS):
            taps.append(p)
        elif ".biases." in name or name.endswith(".evidence"):
            # of a head: biases are stacked over its groups, and its evidence starts nonzero
            biases.append(p)
        else:
            (matrices if p.ndim >= 2 else vectors).append(p)
    groups: list[dict[str, Any]] = [
        {"params": matrices, "weight_decay": config.weight_decay, "lr_scale": 1.0},
        {"params": vectors + biases, "weight_decay": 0.0, "lr_scale": 1.0},
        {"params": codebook, "weight_decay": 0.0, "lr_scale": config.codebook_lr_scale},
        {"params": taps, "weight_decay": 0.0, "lr_scale": TAPS_SCALE},
    ]
    groups, betas = [g for g in groups if g["params"]], (config.beta1, config.beta2)
    adamw = torch.optim.AdamW(groups, lr=config.lr, betas=betas, eps=1e-10, fused=True)
    optimizers: list[torch.optim.Optimizer] = [adamw]
    if muon:
        precision = muon_precision(config, muon, next(iter(muon.values())).device)
        stacked = (
            [p for name, p in muon.items() if name.endswith(STACKED)]
            if config.muon_qkv == "apart"
            else []
        )
        groups = [{"params": list(muon.values()), "lr_scale": 1.0}]
        options: dict[str, Any] = {
            "lr": config.lr,
            "weight_decay": config.weight_decay,
            "momentum": 0.95,
        }
        optimizers.append(Muon(groups, precision=precision, stacked=stacked, **options))
    return optimizers


def set_learning_rate(optimizers: list[torch.optim.Optimizer], lr: float) -> None:
    """Set the learning rate of every parameter group to `lr` times its `lr_scale`."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]


NAMED = 8
"""Parameters listed by name in a record or message."""


@torch.no_grad()
def norms(tensors: Iterable[Tensor]) -> Tensor:
    """The norm of every tensor, of the whole one where it is sharded. Collective under FSDP2."""
    each = torch.stack(torch._foreach_norm([*tensors]))
    return each.full_tensor() if isinstance(each, DTensor) else each


def not_finite(names: Iterable[str], norms: Tensor) -> list[str]:
    """Those of the names whose norm is not finite."""
    return [
        name for name, norm in zip(names, norms.tolist(), strict=True) if not math.isfinite(norm)
    ]
