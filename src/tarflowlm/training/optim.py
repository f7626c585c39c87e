"""Optimisers and learning-rate schedules."""

import math
from dataclasses import replace

import torch
from torch import nn

from tarflowlm.config import OptimConfig
from tarflowlm.training.muon import Muon, quicker_precision


def schedule(config: OptimConfig, step: int | float, num_steps: int | float) -> float:
    """The learning rate over its peak, in (0, 1], at `step` (0-based) of a stage of `num_steps` steps.

    Both may be fractional: a stage with a time limit estimates `num_steps` from its present speed.
    """
    warmup = max(1, round(config.warmup * num_steps))
    if step < warmup:
        return (step + 1) / warmup
    if config.schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, num_steps - warmup)))
    decay = max(1, round(config.decay * num_steps))
    return min(1.0, (num_steps - step) / decay)


CODEBOOK = ("codebook.mean", "codebook.log_std", "coupling.own.mean", "coupling.own.log_std")
"""Name endings of the codebook parameters: the encoder's, and those of Mix-d blocks with their own codebook."""
MUON = ("transformer.layers.", "token_features.")
"""Modules whose matrices Muon optimises."""
STACKED = "attention.qkv.weight"
"""Parameters that hold three matrices of equal shape, one below the other."""


def muon_matrices(config: OptimConfig, model: nn.Module) -> list[nn.Parameter]:
    """The trainable parameters of `model` that Muon optimises; empty with AdamW alone."""
    parts = MUON if config.optimizer == "muon" else ()
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    return [p for name, p in named if p.ndim == 2 and name.endswith(".weight") and any(x in name for x in parts)]


def with_precision(config: OptimConfig, model: nn.Module, device: torch.device) -> OptimConfig:
    """`config` with a `muon_precision` of auto replaced by the faster one for `model` on `device`."""
    if config.muon_precision != "auto":
        return config
    shapes = [p.shape for p in muon_matrices(config, model)]
    return replace(config, muon_precision=quicker_precision(shapes, device))


def build_optimizers(config: OptimConfig, model: nn.Module) -> list[torch.optim.Optimizer]:
    """The optimisers of the trainable parameters of `model`: AdamW, and Muon if it has matrices to optimise.

    Weight decay acts on matrices only. Muon (Jordan et al. 2024) optimises the matrices of the Transformers and of
    the features inside a patch, AdamW the input maps, heads, codebooks, vectors and block-diagonal tensors.
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    muon = muon_matrices(config, model)
    taken = {id(p) for p in muon}
    rest = [(name, p) for name, p in named if id(p) not in taken]
    codebook = [p for name, p in rest if name.endswith(CODEBOOK)]
    # no decay for the biases of a head, which are stacked over its groups, or for its evidence, which starts nonzero
    stacked = [p for name, p in rest if ".biases." in name or name.endswith(".evidence")]
    special = {id(p) for p in codebook + stacked}
    matrices = [p for _, p in rest if p.ndim >= 2 and id(p) not in special]
    vectors = [p for _, p in rest if p.ndim < 2 and id(p) not in special]
    groups = [
        {"params": matrices, "weight_decay": config.weight_decay, "lr_scale": 1.0},
        {"params": vectors + stacked, "weight_decay": 0.0, "lr_scale": 1.0},
        {"params": codebook, "weight_decay": 0.0, "lr_scale": config.codebook_lr_scale},
    ]
    adamw = torch.optim.AdamW(
        [g for g in groups if g["params"]],
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=1e-10,
        fused=True,
    )
    optimizers: list[torch.optim.Optimizer] = [adamw]
    if muon:
        precision = with_precision(config, model, muon[0].device).muon_precision
        assert precision != "auto"
        groups = [{"params": muon, "lr_scale": 1.0}]
        stacked = [p for name, p in named if name.endswith(STACKED)] if config.muon_qkv == "apart" else []
        options = {"lr": config.lr, "weight_decay": config.weight_decay, "momentum": 0.95}
        optimizers.append(Muon(groups, precision=precision, stacked=stacked, **options))
    return optimizers


def set_learning_rate(optimizers: list[torch.optim.Optimizer], lr: float) -> None:
    """Set the learning rate of every parameter group to `lr` times its `lr_scale`."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
