"""How weights change: optimisers, the learning rate, and averages of weights."""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_

from tarflowlm.config import OPTIMIZERS, SCHEDULES, OptimConfig, Precision
from tarflowlm.errors import UserError
from tarflowlm.schema import NotNegative, check_type, checked
from tarflowlm.training.muon import Muon

CODEBOOK = ("codebook.mean", "codebook.log_std", "coupling.own.mean", "coupling.own.log_std")
"""Name endings of codebook parameters: the encoder's, and the own codebooks of Mix-d blocks."""
TAPS_SCALE = 3.0
"""Learning rate of a convolution's weights, as a multiple of the rest."""
MUON = ("transformer.layers.", "token_features.")
"""Modules whose matrices Muon optimises."""

QKV = "attention.qkv.weight"
"""The end of the name of queries, keys and values, one below the other."""


def schedule(config: OptimConfig, step: int, num_steps: int | float) -> float:
    """The learning rate as a share of its peak, in (0, 1], at `step` (0-based) of `num_steps`.

    It rises linearly, is constant, and falls linearly to zero, or is one of a user's own. UserError
    for a number of that which is no rate.
    """
    if (own := SCHEDULES[config.schedule]) is not None:
        return checked(own(config, step, num_steps), NotNegative, f"schedule {config.schedule!r}")
    warmup = max(1, round(config.warmup * num_steps))
    if step < warmup:
        return (step + 1) / warmup
    decay = max(1, round(config.decay * num_steps))
    return min(1.0, (num_steps - step) / decay)


def build_optimizers(
    config: OptimConfig, model: nn.Module, precision: Precision = "float32"
) -> list[torch.optim.Optimizer]:
    """AdamW for the trainable parameters of `model`, and Muon if it has matrices to optimise.

    Weight decay acts on matrices only. Muon (Jordan et al. 2024), in this `precision`, optimises
    the matrices of the Transformers and of the features inside a patch; AdamW the input maps,
    heads, codebooks, vectors and block-diagonal tensors. UserError for queries, keys and values of
    a shape that Muon does not know, and for an optimiser of a user's own that is none.
    """
    if (own := OPTIMIZERS[config.optimizer]) is not None:
        made = own(config, trained_parameters(model))
        found = list(made) if isinstance(made, list | tuple) else [made]
        for one in found:
            wanted = "give a torch.optim.Optimizer, or a list of them"
            check_type(one, f"optimizer {config.optimizer!r}", torch.optim.Optimizer, wanted)
            for group in one.param_groups:
                group.setdefault("lr_scale", 1.0)
        return found
    muon = muon_matrices(config, model)
    stacked = {name: p for name, p in muon.items() if name.endswith(QKV)}
    for name, p in stacked.items():
        if p.shape[0] != 3 * p.shape[1]:
            what = f"{name} of shape {list(p.shape)}"
            rule = "Muon cuts qkv in three squares: give it another name, or optim.optimizer adamw"
            raise UserError(f"{what}: {rule}")
    parameters = trained_parameters(model)
    others = {name: p for name, p in parameters.items() if name not in muon}
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(
            parameter_groups(config, others),
            lr=config.lr,
            betas=(0.9, config.beta2),
            eps=config.eps,
            fused=True,
        )
    ]
    if muon:
        optimizers.append(
            Muon(
                [{"params": [*muon.values()], "lr_scale": 1.0}],
                precision=precision,
                stacked=stacked.values(),
                lr=config.lr,
                weight_decay=config.weight_decay,
            )
        )
    return optimizers


def parameter_groups(config: OptimConfig, parameters: Mapping[str, Tensor]) -> list[dict[str, Any]]:
    """Parameters, by name, in groups for an optimiser, with `weight_decay` and `lr_scale`."""
    groups = defaultdict[tuple[float, float], list[Tensor]](list)
    for name, p in parameters.items():
        decay, scale = 0.0, 1.0
        if name.endswith(CODEBOOK):
            scale = config.codebook_lr_scale
        elif name.endswith("transformer.input_taps"):
            scale = TAPS_SCALE
        # a head stacks the biases of its groups, and its evidence starts nonzero
        elif p.ndim >= 2 and ".biases." not in name and not name.endswith(".evidence"):
            decay = config.weight_decay
        groups[decay, scale].append(p)
    return [
        {"params": params, "weight_decay": decay, "lr_scale": scale}
        for (decay, scale), params in groups.items()
    ]


def muon_matrices(config: OptimConfig, model: nn.Module) -> dict[str, Tensor]:
    """The trainable parameters of `model` that Muon optimises, by name; empty with AdamW alone."""
    if config.optimizer == "adamw":
        return {}
    return {
        name: p
        for name, p in trained_parameters(model).items()
        if p.ndim == 2 and name.endswith(".weight") and any(part in name for part in MUON)
    }


@torch.no_grad()
def norms(tensors: dict[str, Tensor]) -> Tensor:
    """The norm of every tensor; of a sharded one, the norm of the whole. Collective under FSDP2."""
    each = torch.stack(torch._foreach_norm([*tensors.values()]))
    return each.full_tensor() if isinstance(each, DTensor) else each


def take_step(
    optimizers: list[torch.optim.Optimizer],
    parameters: dict[str, nn.Parameter],
    norm: Tensor,
    *,
    lr: float,
    grad_clip: float,
) -> None:
    """Change the `parameters` by their gradients, and clear these.

    `norm` is the norm of all gradients together; it is clipped to `grad_clip`. The learning rate of
    a group is `lr` times its `lr_scale`.
    """
    clip_grads_with_norm_(parameters.values(), grad_clip, norm)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        optimizer.step()
    for parameter in parameters.values():
        parameter.grad = None  # also of those that no optimiser has
    # a fused step does not count as a change, by which `flow.packing` knows that weights are new
    torch.autograd.graph.increment_version(parameters.values())


# copies of weights


def trained_parameters(model: nn.Module) -> dict[str, Tensor]:
    """The parameters that train, by name. Only they are sharded."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def copy_of(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def assign(targets: dict[str, Tensor], values: dict[str, Tensor]) -> None:
    """Copy `values` into `targets`, unless one of them is empty."""
    if targets and values:
        torch._foreach_copy_(_local(targets), _local(values))


def update_average(
    copies: dict[str, dict[str, Tensor]], model: nn.Module, step: int, decay: float
) -> None:
    """Move the averaged weights, if there are any, towards the present ones.

    1 - d of the way, with d = min(decay, (1 + n) / (10 + n)) after step n of a stage.
    """
    if average := copies.get("average"):
        kept = min(decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(_local(average), _local(trained_parameters(model)), 1 - kept)


@contextmanager
def averaged(copies: dict[str, dict[str, Tensor]], model: nn.Module) -> Iterator[None]:
    """A context in which the model has its averaged weights, if there are any."""
    weights = trained_parameters(model)
    average = copies.get("average", {})
    held = copy_of(weights) if average else {}
    assign(weights, average)
    try:
        yield
    finally:
        assign(weights, held)


def _local(tensors: dict[str, Tensor]) -> list[Tensor]:
    """The data of tensors, or of this process's shards of them, without a graph."""
    return [(t.to_local() if isinstance(t, DTensor) else t).detach() for t in tensors.values()]
