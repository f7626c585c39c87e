"""What the large presets ask for, from their shapes alone: the real modules on meta tensors, which hold nothing."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from tarflowlm.checkpoint import Model, build_model
from tarflowlm.evaluation.flops import forward_flops, training_flops
from tarflowlm.flow.transformer import TransformerConfig
from tarflowlm.model import FlowConfig
from tarflowlm.presets import PAPER_PRESETS, preset
from tarflowlm.training.config import RunConfig
from tarflowlm.training.optim import build_optimizers
from tarflowlm.training.parallel import Engine
from tarflowlm.training.progressive import freeze_below

VOCABULARY = {"text8": 27, "owt": 50_257}
XL_TRUNK = TransformerConfig(width=1600, num_heads=25)
"""The body of GPT-2 XL, which has 48 layers: four times those of the presets."""


def sizes() -> list[dict[str, Any]]:
    """A row for every paper preset, and for those of OpenWebText with a body of 1.5 B parameters."""
    return [size(run) for run in _runs()]


def _runs() -> Iterator[RunConfig]:
    for name in PAPER_PRESETS:
        run = preset(name)
        yield replace(run, model=replace(run.model, vocab_size=VOCABULARY[name.split("-")[0]]))
    for name in PAPER_PRESETS:
        if not name.startswith("owt-"):
            continue
        run = preset(name)
        model: Any = run.model
        layers = model.layers
        more = 4 * layers if isinstance(layers, int) else tuple(4 * n for n in layers)
        model = replace(model, vocab_size=VOCABULARY["owt"], trunk=XL_TRUNK, layers=more)
        yield replace(run, name=f"{name} 1.5 B", model=model)


def size(run: RunConfig) -> dict[str, Any]:
    """Parameters; GB (1e9 bytes) of float32 for the stage that needs most; FLOPs per token of that stage.

    Activations are what autograd keeps of one sequence, less what was there before.
    """
    stages = [_stage(run, stage) for stage in range(run.num_stages)]
    largest = max(stages, key=lambda row: row["weights_gb"] + row["gradients_gb"] + row["optimizer_gb"])
    with torch.device("meta"):
        whole = build_model(run.model)
    trunk = sum(p.numel() for name, p in whole.named_parameters() if "transformer." in name)
    paper = forward_flops(run.model, "paper").total() / run.model.context
    counts = {"parameters": sum(p.numel() for p in whole.parameters()), "trunk_parameters": trunk}
    return {"name": run.name, **counts, **largest, "paper_flops": paper, "stages": stages}


def _stage(run: RunConfig, stage: int) -> dict[str, float]:
    config = run.model_of_stage(stage)
    with torch.device("meta"):
        model = build_model(config)
    freeze_below(model, stage)
    trained = [p for p in model.parameters() if p.requires_grad]
    moments = 0
    for optimizer in build_optimizers(run.optim, model):
        count = sum(p.numel() for group in optimizer.param_groups for p in group["params"])
        moments += count * (1 if isinstance(optimizer, torch.optim.Muon) else 2)
    gigabyte = 4 / 1e9
    return {
        "weights_gb": sum(p.numel() for p in model.parameters()) * gigabyte,
        "gradients_gb": sum(p.numel() for p in trained) * gigabyte,
        "optimizer_gb": moments * gigabyte,
        "activations_gb": kept_bytes(model, run, stage, checkpointed=False) / 1e9,
        "checkpointed_gb": kept_bytes(model, run, stage, checkpointed=True) / 1e9,
        "training_flops": training_flops(config, frozen=stage) / config.context,
    }


def kept_bytes(model: Model, run: RunConfig, frozen: int, *, checkpointed: bool) -> int:
    """What autograd keeps of the forward pass of one sequence, parameters aside; every storage once.

    Meta tensors fall back to plain attention, which keeps its probabilities. Real kernels do not, so they are left
    out; heads as wide as the sequence is long cannot be told from them, and there they count.
    """
    run = replace(run, train=replace(run.train, checkpoint_activations=checkpointed, parallel="ddp"))
    engine = Engine(model, run, frozen=frozen)
    known = {p.untyped_storage()._cdata for p in model.parameters()}
    kept: dict[int, tuple[torch.UntypedStorage, int]] = {}
    positions = model.config.context // model.config.patch
    head_width = model.config.trunk.width // model.config.trunk.num_heads

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in known:
            probabilities = tensor.shape[-2:] == (positions, positions) and positions != head_width
            # with the storage, whose address could be used again
            kept[storage._cdata] = (storage, 0 if probabilities else storage.nbytes())
        return tensor

    device = next(model.parameters()).device
    tokens = torch.zeros(1, model.config.context, dtype=torch.long, device=device)
    config = model.config
    noise = torch.zeros(*tokens.shape, config.latent_dim, device=device) if isinstance(config, FlowConfig) else None
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        # what is kept is counted while its graph is alive
        bound = engine.module(tokens, noise)
    assert bound.requires_grad
    return sum(size for _, size in kept.values())
