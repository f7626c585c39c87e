"""Schedules, and how each parameter is optimised."""

import pytest
import torch

from helpers import stack
from tarflowlm.config import OptimConfig
from tarflowlm.errors import UserError
from tarflowlm.model import TarFlowLM
from tarflowlm.model_config import FlowConfig, TransformerConfig
from tarflowlm.training.optim import build_optimizers, schedule, take_step


def rates(num_steps: int, **fields) -> list[float]:
    return [schedule(OptimConfig(**fields), step, num_steps) for step in range(num_steps)]


def test_rate_rises_is_constant_and_falls():
    assert rates(10, warmup=0.2, decay=0.4) == pytest.approx(
        [0.5, 1, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25]
    )


@pytest.fixture
def model() -> TarFlowLM:
    """All couplings, a codebook of its own in a later block, and patches."""
    config = FlowConfig(
        vocab_size=5,
        context=8,
        latent_dim=2,
        patch=2,
        head_hidden=4,
        trunk=TransformerConfig(width=8, num_heads=2, mlp_ratio=2),
        blocks=stack(("mixd", "mix1", "affine", "mixd"), (1, 1, 1, 1), (0, 3, 1, 4)),
    )
    return TarFlowLM(config)


def groups_of(
    model: TarFlowLM, config: OptimConfig
) -> dict[str, tuple[torch.optim.Optimizer, dict]]:
    """Name -> (optimiser, group); fails where a parameter is in two groups."""
    names = {id(p): name for name, p in model.named_parameters()}
    found: dict[str, tuple[torch.optim.Optimizer, dict]] = {}
    for optimizer in build_optimizers(config, model):
        for group in optimizer.param_groups:
            for p in group["params"]:
                assert names[id(p)] not in found
                found[names[id(p)]] = (optimizer, group)
    return found


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
@pytest.mark.parametrize("stage", [0, 1, 3])
def test_every_trainable_parameter_is_in_exactly_one_group(model, optimizer, stage):
    model.train_only(stage)
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    assert groups_of(model, OptimConfig(optimizer=optimizer)).keys() == names
    assert all(name.startswith(f"prior.blocks.{stage}.") for name in names) or stage == 0


def test_muon_optimises_the_matrices_of_transformers_and_patches(model):
    found = groups_of(model, OptimConfig(optimizer="muon"))
    with_muon = {
        name for name, (optimizer, _) in found.items() if isinstance(optimizer, torch.optim.Muon)
    }
    kinds = {
        name.split("transformer.layers.0.")[-1].split("token_features.")[-1] for name in with_muon
    }
    of_layers = {"attention.qkv.weight", "attention.out.weight", "up.weight", "down.weight"}
    assert kinds == of_layers | {"place.weight", "head.context.weight"}
    assert (
        len(with_muon) == 4 * model.num_blocks + 2 * 2
    )  # two Mix-d blocks have features inside a patch
    without = groups_of(model, OptimConfig(optimizer="adamw")).values()
    assert not any(isinstance(optimizer, torch.optim.Muon) for optimizer, _ in without)


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_weight_decay_spares_vectors_biases_and_codebooks(model, optimizer):
    found = groups_of(model, OptimConfig(optimizer=optimizer, weight_decay=0.2))
    shapes = {name: p.shape for name, p in model.named_parameters()}
    decayed = {name for name, (_, group) in found.items() if group["weight_decay"]}
    assert all(found[name][1]["weight_decay"] == 0.2 and len(shapes[name]) >= 2 for name in decayed)
    assert not [
        name
        for name in decayed
        if any(x in name for x in ("bias", "codebook", ".own.", "evidence"))
    ]
    assert decayed >= {
        "prior.blocks.0.coupling.weight_head.weight",
        "prior.blocks.1.coupling.head.weights.0",
        "prior.blocks.0.transformer.layers.0.up.weight",
    }


def test_codebooks_have_a_learning_rate_of_their_own(model):
    optimizers = build_optimizers(OptimConfig(lr=0.01, codebook_lr_scale=0.5), model)
    named = dict(model.named_parameters())
    for p in named.values():
        p.grad = torch.zeros_like(p)
    take_step(optimizers, named, torch.tensor(1.0), lr=0.002, grad_clip=1.0)
    rate = {
        id(p): group["lr"] for o in optimizers for group in o.param_groups for p in group["params"]
    }
    scaled = {name for name, p in named.items() if rate[id(p)] == pytest.approx(0.001)}
    own = "prior.blocks.3.coupling.own"
    assert scaled == {"codebook.mean", "codebook.log_std", f"{own}.mean", f"{own}.log_std"}
    assert {rate[id(p)] for name, p in named.items() if name not in scaled} == {0.002}


def test_muon_cuts_no_matrix_that_is_not_three_squares(model):
    attention = model.prior.block(0).transformer.layers[0].attention
    attention.qkv = torch.nn.Linear(8, 12, bias=False)  # as of heads that share keys
    with pytest.raises(UserError, match=r"0.attention.qkv.weight of shape \[12, 8\]: .*adamw"):
        build_optimizers(OptimConfig(), model)
    build_optimizers(OptimConfig(optimizer="adamw"), model)
