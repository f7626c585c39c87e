"""The KV cache: positions in parts, revised or selected, are those of the plain pass."""

import pytest
import torch

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
