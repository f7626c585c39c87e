"""Optimisers and learning-rate schedules."""

import math
from dataclasses import replace

import torch
from torch import nn

from tarflowlm.runs.config import OptimConfig
from tarflowlm.training.muon import Muon, quicker_precision


def schedule(config: OptimConfig, step: int | float, num_steps: int | float) -> float:
    """Learning rate over the peak at `step` (0-based) of a stage of `num_steps` steps, in (0, 1].

    A stage that is given time instead of steps counts in steps of its present speed, which need not be whole.
    """
    warmup = max(1, round(config.warmup * num_steps))
    if step < warmup:
        return (step + 1) / warmup
    if config.schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, num_steps - warmup)))
    decay = max(1, round(config.decay * num_steps))
    return min(1.0, (num_steps - step) / decay)


# of the encoder, and of a mixd block with components of its own
CODEBOOK = ("codebook.mean", "codebook.log_std", "coupling.own.mean", "coupling.own.log_std")


MUON = ("transformer.layers.", "token_features.")
"""Parts of a model whose matrices Muon takes."""
STACKED = "attention.qkv.weight"
"""Three matrices of the same shape, one below the other."""


def muon_matrices(config: OptimConfig, model: nn.Module) -> list[nn.Parameter]:
    """The trainable parameters of `model` that Muon takes."""
    parts = MUON if config.optimizer == "muon" else ()
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    return [p for name, p in named if p.ndim == 2 and name.endswith(".weight") and any(x in name for x in parts)]


def with_precision(config: OptimConfig, model: nn.Module, device: torch.device) -> OptimConfig:
    """The configuration with `auto` replaced by what suits the matrices of `model` on `device`."""
    if config.muon_precision != "auto":
        return config
    shapes = [p.shape for p in muon_matrices(config, model)]
    return replace(config, muon_precision=quicker_precision(shapes, device))


def build_optimizers(config: OptimConfig, model: nn.Module) -> list[torch.optim.Optimizer]:
    """Optimisers over the trainable parameters of `model`.

    Weight decay acts on matrices only. Muon (Jordan et al. 2024) takes the 2-D matrices of the Transformers and of
    the features inside a patch; inputs, heads, codebook, vectors and block-diagonal tensors stay with AdamW.
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    muon = muon_matrices(config, model)
    taken = {id(p) for p in muon}
    rest = [(name, p) for name, p in named if id(p) not in taken]
    codebook = [p for name, p in rest if name.endswith(CODEBOOK)]
    # biases of a head, stacked over its groups, and its evidence, which starts far from zero: not for decay
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
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
