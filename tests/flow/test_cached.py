"""The KV cache: positions in parts, revised or of different rows at different places, are those of the plain pass."""

import subprocess
import sys

import pytest
import torch
from tarflowlm.flow.compiled import CompiledKVCache, allocate, compiled_steps, static_step

from tarflowlm.device import missing_for_compilation
from tarflowlm.flow.cached import KVCache
from tarflowlm.flow.transformer import Transformer
from tarflowlm.language_model import seeded

T = 7
CLOSE = {"rtol": 1e-12, "atol": 1e-12}


@pytest.fixture(scope="module")
def transformer(randomise, tiny_trunk) -> Transformer:
    with seeded(0):
        return randomise(Transformer(tiny_trunk, 2))


@pytest.mark.parametrize("chunks", [[1] * T, [3, 4], [1, 5, 1], [T], [4, 1, 1, 1]], ids=str)
def test_cached_equals_uncached(transformer, normal, chunks):
    x = normal(3, T, 8)
    cache = KVCache(transformer, 3, T, x)
    steps = [cache.extend(part) for part in x.split(chunks, dim=1)]
    assert cache.length == cache.capacity == T
    torch.testing.assert_close(torch.cat(steps, 1), transformer(x), **CLOSE)


def test_a_rewound_cache_forgets(transformer, normal):
    x, wrong = normal(2, T, 8), normal(2, 4, 8, seed=1)
    cache = KVCache(transformer, 2, T, x)
    cache.extend(x[:, :3])
    cache.extend(wrong)
    cache.rewind(3)
    assert cache.length == 3
    rest = torch.cat((cache.extend(x[:, 3:5]), cache.extend(x[:, 5:])), 1)
    torch.testing.assert_close(rest, transformer(x)[:, 3:], **CLOSE)
    cache.rewind(0)
    torch.testing.assert_close(cache.extend(x), transformer(x), **CLOSE)


@pytest.mark.parametrize("N", [1, 3])
def test_rows_stand_at_places_of_their_own(transformer, normal, N):
    x, starts = normal(3, T, 8), torch.tensor([0, 4, 2])
    cache = KVCache(transformer, 3, T, x)
    cache.extend(normal(3, T, 8, seed=1))  # what `starts` leaves out must not be read
    cache.extend(x[:, :4], torch.zeros(3, dtype=torch.long))
    part = torch.stack([x[b, start : start + N] for b, start in enumerate(starts)])
    expected = torch.stack([transformer(x)[b, start : start + N] for b, start in enumerate(starts)])
    torch.testing.assert_close(cache.extend(part, starts), expected, **CLOSE)


def test_selected_rows_are_copies(transformer, normal):
    x = normal(3, T, 8)
    cache = KVCache(transformer, 3, T, x)
    cache.extend(x[:, :4])
    rows = torch.tensor([2, 2, 0])
    cache.select(rows)
    torch.testing.assert_close(cache.extend(x[rows, 4:]), transformer(x)[rows, 4:], **CLOSE)


def test_features_may_go_where_a_graph_is_built(transformer, normal):
    weight = normal(8).requires_grad_()
    (KVCache(transformer, 1, T, weight).extend(normal(1, 2, 8)) * weight).sum().backward()
    assert weight.grad is not None


@pytest.mark.parametrize("length", [-1, 4])
def test_a_cache_rewinds_to_its_past_only(transformer, normal, length):
    cache = KVCache(transformer, 1, T, normal(1))
    cache.extend(normal(1, 3, 8))
    with pytest.raises(ValueError, match=f"cannot rewind a cache of 3 positions to {length}"):
        cache.rewind(length)


def test_a_full_cache_says_so(transformer, normal):
    cache = KVCache(transformer, 1, 3, normal(1))
    cache.extend(normal(1, 2, 8))
    with pytest.raises(ValueError, match="cache of 3 positions is full: 2 used, 2 more requested"):
        cache.extend(normal(1, 2, 8))
    assert cache.length == 2
    cache.extend(normal(1, 1, 8))
    with pytest.raises(ValueError, match="cache of 3 positions is full: 2 requested up to position 4"):
        cache.extend(normal(1, 2, 8), torch.tensor([2]))


def test_the_static_step_equals_the_cached_one(transformer, normal):
    x = normal(3, T, 8)
    cache, static = (KVCache(transformer, 3, T, x) for _ in range(2))
    for n in range(T):
        found = static_step(
            x[:, n : n + 1], torch.full((3,), n), static.positions, static.cos, static.sin, static.weights,
            static.stored, static.norm,
        )  # fmt: skip
        torch.testing.assert_close(found, cache.extend(x[:, n : n + 1]), **CLOSE)


COMPILED = """
import torch
from tarflowlm.flow.compiled import CompiledKVCache, allocate, compiled_steps
from tarflowlm.flow.transformer import Transformer, TransformerConfig

torch.manual_seed(0)
transformer = Transformer(TransformerConfig(width=8, num_heads=2, mlp_ratio=2), 2).double()
for parameter in transformer.parameters():
    torch.nn.init.normal_(parameter)
x = torch.randn(2, 7, 8, dtype=torch.float64)
with compiled_steps(transformer):
    cache = allocate(transformer, 2, 7, x)
assert isinstance(cache, CompiledKVCache)
parts = [cache.extend(part) for part in x.split([3, 1, 1, 1, 1], dim=1)]
torch.testing.assert_close(torch.cat(parts, 1), transformer(x), rtol=1e-10, atol=1e-10)
assert not isinstance(allocate(transformer, 2, 7, x), CompiledKVCache)
"""


@pytest.mark.skipif(missing_for_compilation(torch.device("cpu")) is not None, reason="needs a C++ compiler")
def test_compiled_steps_equal_others():
    """In a process of its own, without the type checks of the tests, which a compiler cannot follow."""
    subprocess.run([sys.executable, "-c", COMPILED], check=True, timeout=300)


def test_without_a_compiler_sampling_goes_on_and_says_so(transformer, normal, monkeypatch):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr("shutil.which", lambda _: None)
    with (
        pytest.warns(UserWarning, match="compiling needs a C\\+\\+ compiler, which is not installed"),
        compiled_steps(transformer),
    ):
        assert not isinstance(allocate(transformer, 2, T, normal(1)), CompiledKVCache)
