"""n-gram entropies against values computed by hand, and their order."""

import itertools
import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tarflowlm.errors import UserError
from tarflowlm.evaluation.ngram import ngram_entropy


def plain(text: str, order: int) -> float:
    """The formula of the docstring, one n-gram at a time."""
    ngrams = [text[i : i + order] for i in range(len(text) - order + 1)]
    contexts = Counter(ngram[:-1] for ngram in ngrams)
    counts = Counter(ngrams)
    return -sum(c * math.log2(c / contexts[ngram[:-1]]) for ngram, c in counts.items()) / len(ngrams)


@pytest.mark.parametrize(
    ("text", "order", "expected"),
    [
        ("aaaa", 1, 0.0),
        ("abab", 1, 1.0),
        ("abcd", 1, 2.0),
        ("aaab", 1, 0.75 * math.log2(4 / 3) + 0.25 * 2),
        ("ababab", 2, 0.0),
        # pairs aa, ab, bb, ba: each once; after a: a or b, after b: b or a
        ("aabba", 2, 1.0),
        # pairs aa aa ab: after a: a 2/3, b 1/3
        ("aaab", 2, 2 / 3 * math.log2(1.5) + 1 / 3 * math.log2(3)),
        ("abc", 3, 0.0),
    ],
)
def test_by_hand(text, order, expected):
    assert ngram_entropy(text, order) == pytest.approx(expected, abs=1e-12)


@settings(derandomize=True, max_examples=100, deadline=None)
@given(st.text(st.sampled_from("abcé\U0001f600"), min_size=6, max_size=60), st.integers(1, 6))
def test_equals_the_plain_formula(text, order):
    assert ngram_entropy(text, order) == pytest.approx(plain(text, order), abs=1e-9)


@pytest.mark.parametrize("dense", [1, 30, 1000])
def test_sorting_and_counting_agree(dense, monkeypatch):
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 9, 3000).astype(np.uint8)
    expected = [ngram_entropy(ids, order) for order in range(1, 6)]
    monkeypatch.setattr("tarflowlm.evaluation.ngram._DENSE", dense)
    assert [ngram_entropy(ids, order) for order in range(1, 6)] == pytest.approx(expected, abs=1e-12)


def test_longer_contexts_never_cost_bits():
    rng = np.random.default_rng(1)
    ids = rng.choice(27, size=20_000, p=rng.dirichlet(np.ones(27)))
    entropies = [ngram_entropy(ids, order) for order in range(1, 7)]
    assert entropies[0] <= math.log2(27)
    # the ends of the text belong to fewer n-grams, hence the slack
    assert all(b <= a + 1e-2 for a, b in itertools.pairwise(entropies))
    assert all(entropy >= 0 for entropy in entropies)


def test_large_ids_and_long_contexts_do_not_overflow():
    ids = np.array([0, 50_256, 2**40, 0, 50_256, 2**40, 0, 50_256, -5] * 20)
    text = "".join({0: "a", 50_256: "b", 2**40: "c", -5: "d"}[int(i)] for i in ids)
    for order in (1, 2, 3, 12):
        assert ngram_entropy(ids, order) == pytest.approx(plain(text, order), abs=1e-9)


@pytest.mark.parametrize(
    ("ids", "order", "message"),
    [
        ("abc", 0, "order=0 must be 1 or more"),
        ("ab", 3, "the text has 2 symbols, too few for n-grams of order 3"),
        ("", 1, "has 0 symbols"),
        (np.array([0.5]), 1, "1-d array of integers"),
        (np.array([[1]]), 1, "1-d array of integers"),
    ],
)
def test_what_makes_no_sense_is_refused(ids, order, message):
    with pytest.raises(UserError, match=message):
        ngram_entropy(ids, order)
