"""Schedules, and which parameter is treated how."""

import math

import pytest
import torch

from tarflowlm.config import OptimConfig
from tarflowlm.errors import UserError
from tarflowlm.flow.transformer import TransformerConfig
from tarflowlm.model import FlowConfig, TarFlowLM, stack
from tarflowlm.training.optim import build_optimizers, schedule, set_learning_rate

TRUNK = TransformerConfig(width=8, num_heads=2, mlp_ratio=2)


def rates(num_steps: int, **fields) -> list[float]:
    config = OptimConfig(**fields)
    return [schedule(config, step, num_steps) for step in range(num_steps)]


def test_trapezoid_rises_stays_and_falls_linearly():
    assert rates(10, schedule="trapezoid", warmup=0.2, decay=0.4) == pytest.approx(
        [0.5, 1, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25]
    )


def test_cosine_rises_and_follows_half_a_cosine():
    values = rates(12, schedule="cosine", warmup=1 / 6)
    assert values[:3] == pytest.approx([0.5, 1, 1])
    expected = [0.5 * (1 + math.cos(math.pi * step / 10)) for step in range(10)]
    assert values[2:] == pytest.approx(expected)


@pytest.mark.parametrize("kind", ["cosine", "trapezoid"])
@pytest.mark.parametrize("num_steps", [1, 2, 3, 7, 100])
@pytest.mark.parametrize(("warmup", "decay"), [(0.0, 0.0), (0.03, 0.4), (1.0, 1.0), (0.5, 0.9), (0.0, 1.0)])
def test_every_step_of_a_stage_has_a_usable_rate(kind, num_steps, warmup, decay):
    values = rates(num_steps, schedule=kind, warmup=warmup, decay=decay)
    assert all(0 < value <= 1 for value in values)
    if num_steps == 100 and warmup < 1 and decay < 0.9:
        assert max(values) == 1


@pytest.fixture
def model() -> TarFlowLM:
    """All couplings, a codebook of its own in a later block, and patches."""
    config = FlowConfig(
        vocab_size=5, context=8, latent_dim=2, patch=2, trunk=TRUNK, head_hidden=4,
        blocks=stack(("mixd", "mix1", "affine", "mixd"), (1, 1, 1, 1), (0, 3, 1, 4)),
    )  # fmt: skip
    return TarFlowLM(config)


def groups_of(model: TarFlowLM, config: OptimConfig) -> dict[str, tuple[torch.optim.Optimizer, dict]]:
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
def test_every_trainable_parameter_is_in_exactly_one_group(model, optimizer):
    found = groups_of(model, OptimConfig(optimizer=optimizer))
    assert found.keys() == {name for name, _ in model.named_parameters()}


def test_muon_takes_the_matrices_of_transformers_and_of_patches_alone(model):
    found = groups_of(model, OptimConfig(optimizer="muon"))
    with_muon = {name for name, (optimizer, _) in found.items() if isinstance(optimizer, torch.optim.Muon)}
    kinds = {name.split("transformer.layers.0.")[-1].split("token_features.")[-1] for name in with_muon}
    in_patches = {"place.weight", "head.context.weight"} if model.config.patch > 1 else set()
    assert kinds == {"attention.qkv.weight", "attention.out.weight", "up.weight", "down.weight"} | in_patches
    assert len(with_muon) == 4 * model.num_blocks + len(in_patches) * [
        block.coupling for block in model.config.blocks
    ].count("mixd")
    assert not any(
        isinstance(optimizer, torch.optim.Muon)
        for optimizer, _ in groups_of(model, OptimConfig(optimizer="adamw")).values()
    )


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_weight_decay_spares_vectors_biases_and_codebooks(model, optimizer):
    found = groups_of(model, OptimConfig(optimizer=optimizer, weight_decay=0.2))
    shapes = {name: p.shape for name, p in model.named_parameters()}
    decayed = {name for name, (_, group) in found.items() if group["weight_decay"]}
    assert all(found[name][1]["weight_decay"] == 0.2 for name in decayed)
    assert all(len(shapes[name]) >= 2 for name in decayed)
    assert not [
        name for name in decayed if "bias" in name or "codebook" in name or ".own." in name or "evidence" in name
    ]
    assert "prior.blocks.0.coupling.weight_head.weight" in decayed
    assert "prior.blocks.1.coupling.head.weights.0" in decayed
    assert "prior.blocks.0.transformer.layers.0.up.weight" in decayed


def test_the_rate_of_codebooks_is_their_own(model):
    config = OptimConfig(lr=0.01, codebook_lr_scale=0.5)
    optimizers = build_optimizers(config, model)
    set_learning_rate(optimizers, 0.002)
    rate = {id(p): group["lr"] for o in optimizers for group in o.param_groups for p in group["params"]}
    named = dict(model.named_parameters())
    scaled = {name for name, p in named.items() if rate[id(p)] == pytest.approx(0.001)}
    own = "prior.blocks.3.coupling.own"
    assert scaled == {"codebook.mean", "codebook.log_std", f"{own}.mean", f"{own}.log_std"}
    assert {rate[id(p)] for name, p in named.items() if name not in scaled} == {0.002}


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_a_later_stage_trains_its_block_alone(model, stage):
    model.train_only(stage)
    found = groups_of(model, OptimConfig())
    expected = {
        name for name, _ in model.named_parameters() if stage == 0 or name.startswith(f"prior.blocks.{stage}.")
    }
    assert found.keys() == expected


@pytest.mark.parametrize(
    ("field", "value"),
    [("lr", 0.0), ("lr", math.nan), ("grad_clip", -1.0), ("warmup", 1.5), ("decay", -0.1), ("decay", math.nan),
     ("weight_decay", -0.1), ("weight_decay", math.inf), ("beta1", 1.0), ("beta2", -0.5),
     ("codebook_lr_scale", -1.0)],
)  # fmt: skip
def test_senseless_settings_are_refused_by_name(field, value):
    with pytest.raises(UserError, match=rf"optim\.{field} {value}"):
        OptimConfig(**{field: value})
