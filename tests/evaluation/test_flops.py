"""The formulas against PyTorch's own count on real modules, and against the paper's numbers written out."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tarflowlm.baseline import BaselineConfig
from tarflowlm.checkpoint import Model, build_model
from tarflowlm.evaluation.flops import forward_flops, generation_flops, training_flops
from tarflowlm.flow.numerics.cpu.inverse import are_few
from tarflowlm.generation import generate
from tarflowlm.model import FlowConfig
from tarflowlm.objective import negative_bound
from tarflowlm.presets import PRESETS, preset
from tarflowlm.training.run import freeze_below

VOCAB = {"text8": 27, "mini": 27, "owt": 50_257, "quickstart": 2048}


def counted(work: Callable[[], object]) -> int:
    """Of the matrix products in `work`; attention by its plain definition, forward and backward."""
    # PyTorch's table lacks the product that adds in place
    in_place = {torch.ops.aten.addmm_: lambda _, left, right, **rest: 2 * left[0] * left[1] * right[1]}
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False, custom_mapping=in_place) as counter:
        work()
    return counter.get_total_flops()


def loss_of(model: Model, tokens: torch.Tensor, frozen: int) -> torch.Tensor:
    noise = None
    if isinstance(model.config, FlowConfig):
        noise = torch.zeros(*tokens.shape, model.config.latent_dim, device=tokens.device)
    return negative_bound(model, tokens, noise=noise, frozen=frozen, equal_cotangents=True).mean()


def configured(name: str) -> FlowConfig | BaselineConfig:
    return replace(preset(name).model, vocab_size=VOCAB[name.split("-")[0]])


@pytest.mark.parametrize("name", PRESETS)
def test_training_counts_of_every_preset(name):
    """On meta tensors: the real modules and sizes, nothing allocated."""
    config, stages = configured(name), preset(name).num_stages
    for stage in range(stages):
        part = config.first_blocks(stage + 1) if stages > 1 else config
        with torch.device("meta"):
            model = build_model(part)
            tokens = torch.zeros(1, config.context, dtype=torch.long)
        if stages > 1:
            freeze_below(model, stage)
        both = counted(lambda model=model, tokens=tokens, stage=stage: loss_of(model, tokens, stage).backward())
        trained = training_flops(part, frozen=stage)
        assert trained == pytest.approx(both, rel=0.02), (stage, trained / both)
        if stage == 0:
            assert forward_flops(part).total() == counted_without_graph(model, tokens)


def counted_without_graph(model: Model, tokens: torch.Tensor) -> int:
    with torch.no_grad():
        return counted(lambda: loss_of(model, tokens, 0))


@pytest.mark.parametrize("name", ["mini-ar", "mini-affine", "mini-mix1", "mini-mixd", "mini-mixd-p2"])
def test_counts_on_a_cpu(name):
    """With numbers in the tensors the numerics take another path: the same products."""
    config = replace(configured(name), context=32)
    model, tokens = build_model(config), torch.zeros(2, 32, dtype=torch.long)
    both = counted(lambda: loss_of(model, tokens, 0).backward())
    assert 2 * training_flops(config) == pytest.approx(both, rel=0.02)


@pytest.mark.parametrize("changes", [{}, {"patch": 2}, {"patch": 2, "in_patch": "independent"}])
@pytest.mark.parametrize("couplings", [("mixd", "mix1", "affine"), ("token-affine",), None])
def test_generation_counts(couplings, changes, tiny_flow, tiny_ar):
    flow = {"couplings": couplings, "context": 12}
    model = (tiny_ar(context=12, **changes) if couplings is None else tiny_flow(**flow, **changes)).eval()
    model.requires_grad_(False)
    # enough rows for the elementwise way to invert a mixture: the other one is written as small matrix products
    num = 600
    assert not are_few(num, 3)
    done = counted(lambda: generate(model, num_tokens=12, num=num, decoder="sequential", generator=torch.Generator()))
    assert num * generation_flops(model.config) == pytest.approx(done, rel=0.02)


def test_the_papers_convention():
    """Appendix H with its own numbers: GPT-2 small on 1,024 tokens, and a Mix-1 block of K = 64, d = 16."""
    L, d, S, V = 12, 768, 1024, 50_257
    language_model = (
        4 * d * S + 6 * L * d**2 * S + 2 * L * d * S**2 + 2 * L * d**2 * S + 16 * L * d**2 * S + 2 * d * V * S
    )
    assert forward_flops(configured("owt-ar"), "paper").total() == language_model
    c, K, D_m = 16, 64, 128
    E = int(9 * D_m / (16 * (c - 1)))
    head = 6 * E * (c - 1) ** 2 + D_m * c * (d + E * (c - 1)) + D_m * c**2 * 3 * K
    blocks = sum(4 * d * S + L * (24 * d**2 * S + 2 * d * S**2) + S * head for L in (2, 2, 8))
    assert forward_flops(configured("owt-mix1"), "paper").total() == blocks
    assert generation_flops(configured("owt-mix1"), "paper") == blocks


def test_what_the_paper_leaves_out():
    """The product of attention and values, as large as the one of queries and keys."""
    full, paper = (forward_flops(configured("text8-ar"), convention) for convention in ("full", "paper"))
    assert full["values"] == full["scores"] == paper["scores"] > 0
    assert paper["values"] == 0


def test_patches_divide_the_positions():
    one, two = (forward_flops(replace(configured("owt-mixd"), patch=patch)) for patch in (1, 2))
    assert two["mlp"] == one["mlp"] / 2
    assert two["scores"] == one["scores"] / 4
