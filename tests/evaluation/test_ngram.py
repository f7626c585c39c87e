"""n-gram entropies and the bigram model against values computed by hand."""

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tarflowlm.evaluation.quality import bigram_cross_entropy, compressed_bits, ngram_entropy


def plain(text: str, order: int) -> float:
    """The formula of the docstring, one n-gram at a time."""
    ngrams = [text[i : i + order] for i in range(len(text) - order + 1)]
    contexts = Counter(ngram[:-1] for ngram in ngrams)
    counts = Counter(ngrams)
    return -sum(c * math.log2(c / contexts[ngram[:-1]]) for ngram, c in counts.items()) / len(ngrams)


@settings(derandomize=True, max_examples=100, deadline=None)
@given(st.text(st.sampled_from("abcé\U0001f600"), min_size=6, max_size=60), st.integers(1, 6))
def test_entropy_equals_the_formula(text, order):
    assert ngram_entropy(text, order) == pytest.approx(plain(text, order), abs=1e-9)


def test_bigram_probabilities_sum_to_one():
    """Its probabilities of the token after w, read from texts (0, w, a), sum to one, whether w was seen or not."""
    rng = np.random.default_rng(3)
    train = rng.integers(0, 5, 60)

    def bits(*test: int) -> float:
        return len(test) * bigram_cross_entropy(train, np.array(test), 7)

    for w in range(7):
        assert sum(2 ** -(bits(0, w, a) - bits(0, w)) for a in range(7)) == pytest.approx(1)


def test_bigram_model_learns_a_markov_chain():
    rng = np.random.default_rng(4)
    chain, ids = rng.dirichlet(np.full(6, 0.5), size=6), [0]
    for _ in range(20_000):
        ids.append(int(rng.choice(6, p=chain[ids[-1]])))
    train, test = np.array(ids[:15_000]), np.array(ids[15_000:])
    assert ngram_entropy(test, 2) < bigram_cross_entropy(train, test, 6) < ngram_entropy(test, 2) + 0.02


def test_compressors():
    noise = "".join(np.random.default_rng(5).choice(list("abcd"), 20_000))
    for name in ("bz2", "lzma"):
        assert compressed_bits("all work and no play " * 1000)[name] < 0.2
        assert 2.0 < compressed_bits(noise)[name] < 2.6
