"""Counts on meta tensors against those of real steps."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tarflowlm.evaluation.flops import peak_flops, training_flops
from tarflowlm.model import LanguageModel
from tarflowlm.model_config import BaselineConfig, FlowConfig
from tarflowlm.presets import preset

VOCAB = {"text8": 27, "mini": 27, "owt": 50_257, "quickstart": 2048, "english": 2048}


def counted(work: Callable[[], object]) -> int:
    """Operations of the matrix products in `work`, forward and backward; attention by its
    definition.
    """
    # PyTorch's table lacks the product that adds in place
    in_place = {
        torch.ops.aten.addmm_: lambda _, left, right, **rest: 2 * left[0] * left[1] * right[1]
    }
    with (
        sdpa_kernel(SDPBackend.MATH),
        FlopCounterMode(display=False, custom_mapping=in_place) as counter,
    ):
        work()
    return counter.get_total_flops()


def loss_of(model: LanguageModel, tokens: torch.Tensor, frozen: int) -> torch.Tensor:
    dim = model.config.latent_dim if isinstance(model.config, FlowConfig) else 0
    return model.bound(
        tokens, torch.zeros(*tokens.shape, dim, device=tokens.device), frozen=frozen
    ).mean()


def configured(name: str) -> FlowConfig | BaselineConfig:
    return replace(preset(name).model, vocab_size=VOCAB[name.split("-")[0]])


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "mini-ar",
        "mini-affine",
        "owt-mix1",
        *(pytest.param(name, marks=pytest.mark.nightly) for name in ("mini-mixd-p2", "owt-mixd")),
    ],
)
def test_training_count_equals_a_real_step(name):
    """On meta tensors: the real modules and sizes, nothing allocated."""
    config, stages = configured(name), preset(name).num_stages
    for stage in range(stages):
        part = config.first_blocks(stage + 1) if stages > 1 else config
        with torch.device("meta"):
            model = part.build()
            tokens = torch.zeros(1, config.context, dtype=torch.long)
        if stages > 1:
            model.train_only(stage)
        both = counted(
            lambda model=model, tokens=tokens, stage=stage: loss_of(model, tokens, stage).backward()
        )
        trained = training_flops(part, frozen=stage)
        # a large vocabulary's logits are computed again in the backward pass, which does not count
        assert trained == pytest.approx(both, rel=0.12 if name == "owt-mixd" else 0.02), (
            stage,
            trained / both,
        )


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["mini-ar", "mini-affine", "mini-mix1", "mini-mixd", "mini-mixd-p2"]
)
def test_count_equals_a_real_step_on_a_cpu(name):
    """With real tensors the numerics take another path with the same products."""
    config = replace(configured(name), context=32)
    model, tokens = config.build(), torch.zeros(2, 32, dtype=torch.long)
    both = counted(lambda: loss_of(model, tokens, 0).backward())
    assert 2 * training_flops(config) == pytest.approx(both, rel=0.02)


@pytest.mark.parametrize(
    ("name", "tera"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA L40", 181),
        ("NVIDIA L40S", 362),
        ("NVIDIA L4", 121),
        ("cpu", None),
    ],
)
def test_peak_is_that_of_the_longest_name(name, tera):
    assert peak_flops(name) == (tera and 1e12 * tera)
