"""The Transformer: causality, rotary positions, and its cache: positions in parts are those of the
plain pass.
"""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.functional import jacobian
from torch.fx.experimental.proxy_tensor import make_fx

import tarflowlm
from docs_cases import blocks
from helpers import TRUNK, normal, randomise
from tarflowlm.errors import UserError
from tarflowlm.flow.attention import rotations
from tarflowlm.flow.cache import KVCache
from tarflowlm.flow.transformer import PreNormLayer, Transformer, convolve
from tarflowlm.generation import generate
from tarflowlm.model import seeded
from tarflowlm.model_config import FlowConfig, MixD

ROOT = Path(__file__).parents[2]
LAYER = 2
"""The place of the layer among the blocks of docs/flow.md."""
T = 7
CLOSE = {"rtol": 1e-12, "atol": 1e-12}


exec(blocks(ROOT / "docs" / "flow.md", "python")[LAYER], {"__name__": "my_layers"})
SHAPES = {
    **{f"{taps} taps": replace(TRUNK, input_taps=taps) for taps in (0, 1, 3, 9)},
    "qwen3": replace(TRUNK, layer="qwen3"),
    "of docs/flow.md": replace(TRUNK, layer="grouped"),
}


@pytest.fixture(scope="module", params=SHAPES.values(), ids=SHAPES)
def transformer(request) -> Transformer:
    with seeded(0):
        return randomise(Transformer(request.param, 2))


def by_hand(x: Tensor, layer: PreNormLayer) -> Tensor:
    """The layer on one sequence [N, D], in PyTorch's own words."""
    D = x.shape[-1]
    weights, E = layer.attention, len(layer.attention.key_scale)
    normal = F.layer_norm(x, (D,), layer.attention_norm.weight)
    q, k, v = (part.unflatten(-1, (-1, E)) for part in weights.qkv(normal).chunk(3, -1))
    q, k = F.layer_norm(q, (E,), weights.query_scale), F.layer_norm(k, (E,), weights.key_scale)
    angle = torch.arange(len(x))[:, None] / 10_000 ** (torch.arange(0, E, 2) / E)
    cos, sin = angle.cos()[:, None], angle.sin()[:, None]

    def rotated(part: Tensor) -> Tensor:
        a, b = part.chunk(2, -1)
        return torch.cat((a * cos - b * sin, a * sin + b * cos), -1)

    scores = torch.einsum("nhe,mhe->hnm", rotated(q), rotated(k)) / E**0.5
    future = torch.ones(len(x), len(x), dtype=torch.bool).triu(1)
    share = scores.masked_fill(future, -torch.inf).softmax(-1)
    x = x + weights.out(torch.einsum("hnm,mhe->nhe", share, v).flatten(1))
    normal = F.layer_norm(x, (D,), layer.mlp_norm.weight)
    up = layer.up(normal)
    return x + layer.down(F.gelu(up) if layer.gate is None else F.silu(layer.gate(normal)) * up)


@pytest.mark.parametrize("layer", ["gpt", "qwen3"])
def test_a_layer_is_the_formula(layer):
    with seeded(0):
        layer = randomise(PreNormLayer(replace(TRUNK, num_heads=2, layer=layer)))
    x = normal(T, 8)
    turns = rotations(torch.arange(T), 4)
    torch.testing.assert_close(layer(x, turns, T), by_hand(x, layer), rtol=1e-6, atol=1e-6)


def test_convolution_is_that_of_torch():
    x, taps = normal(2, T, 8), normal(3, 8, seed=1)
    padded = torch.nn.functional.pad(x.mT, (2, 0))
    expected = torch.nn.functional.conv1d(padded, taps.flip(0).T[:, None], groups=8).mT
    torch.testing.assert_close(convolve(x, taps), expected, **CLOSE)


def test_output_t_sees_inputs_up_to_t(transformer):
    by_input = jacobian(lambda x: transformer(x[None])[0], normal(T, 8))  # [T, D, T, D]
    depends = by_input.abs().amax((1, 3)) > 0
    assert torch.equal(depends, torch.ones(T, T, dtype=torch.bool).tril())


def test_a_new_trunk_passes_its_input_through():
    with seeded(0):
        new = Transformer(TRUNK, 3).double()
    x = normal(2, T, 8)
    torch.testing.assert_close(new(x), torch.nn.functional.layer_norm(x, (8,)))


@pytest.fixture(params=[False, True], ids=["cpu", "accelerator"])
def allocate(request):
    """Caches as on a CPU and as on an accelerator, where steps attend to a power of two."""

    def build(*args) -> KVCache:
        cache = KVCache(*args)
        cache.has_sizes = request.param
        return cache

    return build


@pytest.mark.parametrize("chunks", [[1] * T, [3, 4], [1, 5, 1], [T], [4, 1, 1, 1]], ids=str)
def test_cached_equals_uncached(transformer, chunks, allocate):
    x = normal(3, T, 8)
    cache = allocate(transformer, 3, T, x)
    steps = [cache.extend(part) for part in x.split(chunks, dim=1)]
    assert cache.length == T
    torch.testing.assert_close(torch.cat(steps, 1), transformer(x), **CLOSE)


def test_on_an_accelerator_steps_differ_by_numbers_alone(transformer):
    x = normal(3, 150, 8)
    cache = KVCache(transformer, 3, 150, x)
    cache.has_sizes = True

    def program(places: Tensor, seen: int) -> str:
        def step(x: Tensor, places: Tensor) -> Tensor:
            return cache.pass_on(x, places, seen, is_first=False)

        with torch.no_grad():
            return make_fx(step)(x[:, places], places.clone()).code

    before = cache.extend(x[:, :60])
    steps = torch.cat([before, *(cache.extend(part) for part in x[:, 60:].split(1, 1))], 1)
    torch.testing.assert_close(steps, transformer(x), **CLOSE)
    first, *others = (program(torch.tensor([place]), 64) for place in (3, 7, 63))
    assert others == [first, first]
    assert program(torch.tensor([7]), 128) != first


def test_a_rewound_cache_forgets(transformer, allocate):
    x, wrong = normal(2, T, 8), normal(2, 4, 8, seed=1)
    cache = allocate(transformer, 2, T, x)
    cache.extend(x[:, :3])
    cache.extend(wrong)
    cache.rewind(3)
    assert cache.length == 3
    rest = torch.cat((cache.extend(x[:, 3:5]), cache.extend(x[:, 5:])), 1)
    torch.testing.assert_close(rest, transformer(x)[:, 3:], **CLOSE)
    cache.rewind(0)
    torch.testing.assert_close(cache.extend(x), transformer(x), **CLOSE)


def test_selected_rows_are_copies(transformer, allocate):
    x = normal(3, T, 8)
    cache = allocate(transformer, 3, T, x)
    cache.extend(x[:, :4])
    rows = torch.tensor([2, 2, 0])
    cache.take(cache, rows)
    torch.testing.assert_close(cache.extend(x[rows, 4:]), transformer(x)[rows, 4:], **CLOSE)


def test_features_may_go_where_a_graph_is_built(transformer):
    weight = normal(8).requires_grad_()
    (KVCache(transformer, 1, T, weight).extend(normal(1, 2, 8)) * weight).sum().backward()
    assert weight.grad is not None


def test_a_cache_in_half_precision_returns_wide_features(transformer):
    x = normal(3, T, 8)
    cache = KVCache(transformer, 3, T, x.bfloat16())
    steps = torch.cat([cache.extend(part) for part in x.split(1, dim=1)], 1)
    assert steps.dtype == x.dtype
    assert {stored.dtype for stored in cache.stored} == {torch.bfloat16}
    torch.testing.assert_close(steps, transformer(x), rtol=0.1, atol=0.1)


def test_what_a_rewound_cache_forgot_does_not_come_back(transformer, allocate):
    x = normal(3, T, 8)
    cache = allocate(transformer, 3, T, x)
    cache.extend(x[:, :2])
    cache.extend(torch.full_like(x[:, 2:], torch.nan))
    cache.rewind(2)
    rest = [cache.extend(part) for part in x[:, 2:].split(1, dim=1)]
    torch.testing.assert_close(torch.cat(rest, 1), transformer(x)[:, 2:], **CLOSE)


def test_autocast_does_not_reach_the_cache(transformer):
    x = normal(3, T, 8)
    cache = KVCache(transformer, 3, T, x)
    with torch.autocast("cpu", torch.bfloat16):
        parts = [cache.extend(part) for part in x.split([4, 2, 1], dim=1)]
    torch.testing.assert_close(torch.cat(parts, 1), transformer(x), **CLOSE)


def test_a_model_of_own_layers_trains_and_writes():
    trunk = SHAPES["of docs/flow.md"]
    with seeded(0):
        model = FlowConfig(vocab_size=5, context=8, trunk=trunk, blocks=(MixD(layers=2),)).build()
    model(torch.zeros(2, 8, dtype=torch.long)).sum().backward()
    assert all(p.grad is not None for p in model.prior.block(0).transformer.parameters())
    half = model.prior.block(0).allocate_cache(1, 8, half=True)
    assert half.extend(torch.zeros(1, 2, 8)).shape == (1, 2, 8)
    assert generate(model, num_tokens=8).tokens.shape == (1, 8)


def test_a_name_of_a_layer_is_taken_once():
    with pytest.raises(UserError, match="layer 'gpt' exists already"):
        tarflowlm.layer("gpt")(PreNormLayer)
    with pytest.raises(UserError, match="layer 'none': choose one of gpt, qwen3"):
        replace(TRUNK, layer="none")
