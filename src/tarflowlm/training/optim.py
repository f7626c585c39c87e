"""Optimisers and learning-rate schedules."""

import math
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from tarflowlm.config import OptimConfig
from tarflowlm.training.muon import Muon, faster_precision

CODEBOOK = ("codebook.mean", "codebook.log_std", "coupling.own.mean", "coupling.own.log_std")
"""Name endings of the codebook parameters: the encoder's, and those of Mix-d blocks with their own codebook."""
MUON = ("transformer.layers.", "token_features.")
"""Modules whose matrices Muon optimises."""
STACKED = "attention.qkv.weight"
"""Name ending of parameters that hold three matrices of equal shape, one below the other."""


def schedule(config: OptimConfig, step: int, num_steps: int | float) -> float:
    """The learning rate over its peak, in (0, 1], at `step` (0-based) of a stage of `num_steps` steps.

    A stage with a time limit estimates `num_steps` from its present speed, so it may be fractional.
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
    matrices: list[nn.Parameter] = []
    vectors: list[nn.Parameter] = []
    biases, codebook = [], []
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
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(groups, lr=config.lr, betas=betas, eps=1e-10, fused=True)
    ]
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
