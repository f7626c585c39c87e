"""The bigram model is a distribution, and learns one; entropies of n-grams."""

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reproduction.ngrams import bigram_cross_entropy
from tarflowlm.cli.quickstart import ngram_entropy


def test_bigram_probabilities_sum_to_one():
    """Read from texts (0, w, a) for the token a after w, whether w was seen or not."""
    train = np.random.default_rng(3).integers(0, 5, 60)

    def bits(*test: int) -> float:
        return len(test) * bigram_cross_entropy(train, np.array(test), 7)

    for w in range(7):
        assert sum(2 ** -(bits(0, w, a) - bits(0, w)) for a in range(7)) == pytest.approx(1)


def test_bigram_model_learns_a_markov_chain():
    rng = np.random.default_rng(4)
    chain = rng.dirichlet(np.full(6, 0.5), size=6)
    ids = [0]
    for _ in range(20_000):
        ids.append(int(rng.choice(6, p=chain[ids[-1]])))
    train = np.array(ids[:15_000])
    test = np.array(ids[15_000:])
    entropy = ngram_entropy("".join("abcdef"[i] for i in test), 2)
    assert entropy < bigram_cross_entropy(train, test, 6) < entropy + 0.02


def plain(text: str, order: int) -> float:
    """The formula of the docstring, one n-gram at a time."""
    ngrams = [text[i : i + order] for i in range(len(text) - order + 1)]
    contexts = Counter(ngram[:-1] for ngram in ngrams)
    counts = Counter(ngrams)
    return -sum(c * math.log2(c / contexts[ngram[:-1]]) for ngram, c in counts.items()) / len(
        ngrams
    )


@settings(derandomize=True, max_examples=100, deadline=None)
@given(st.text(st.sampled_from("abcé\U0001f600"), min_size=6, max_size=60), st.integers(1, 6))
def test_entropy_equals_the_formula(text, order):
    assert ngram_entropy(text, order) == pytest.approx(plain(text, order), abs=1e-9)
