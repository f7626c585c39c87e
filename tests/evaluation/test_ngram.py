"""n-gram entropies against values computed by hand, and their order."""

import itertools
import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tarflowlm.errors import UserError
from tarflowlm.evaluation.ngram import bigram_cross_entropy, compressed_bits, ngram_entropy


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


# --- what a text takes without a network


def test_the_bigram_model_is_a_distribution():
    """Its probabilities of the token after w, read from texts (0, w, a), sum to one, whether w was seen or not."""
    rng = np.random.default_rng(3)
    train = rng.integers(0, 5, 60)

    def bits(*test: int) -> float:
        return len(test) * bigram_cross_entropy(train, np.array(test), 7)

    for w in range(7):
        assert sum(2 ** -(bits(0, w, a) - bits(0, w)) for a in range(7)) == pytest.approx(1)


def test_the_bigram_model_by_hand():
    # of 0 0 0 1: bigrams 00 twice, 01 once, so n_1 = n_2 = 1, D = 1/3; N(. a) = 1, 1, 0; K = 2, N = 2, V = 3
    p = [(2 / 3 + 2 / 9) / 2, (2 / 3 + 2 / 9) / 2, (2 / 9) / 2]
    after = [(2 - 1 / 3 + 2 / 3 * p[0]) / 3, (1 - 1 / 3 + 2 / 3 * p[1]) / 3, 2 / 3 * p[2] / 3]
    expected = -sum(map(math.log2, [p[0], after[0], after[2], p[1]])) / 4
    assert bigram_cross_entropy(np.array([0, 0, 0, 1]), np.array([0, 0, 2, 1]), 3) == pytest.approx(expected)


def test_the_bigram_model_approaches_the_entropy_of_a_markov_chain():
    rng = np.random.default_rng(4)
    chain, ids = rng.dirichlet(np.full(6, 0.5), size=6), [0]
    for _ in range(20_000):
        ids.append(int(rng.choice(6, p=chain[ids[-1]])))
    train, test = np.array(ids[:15_000]), np.array(ids[15_000:])
    assert ngram_entropy(test, 2) < bigram_cross_entropy(train, test, 6) < ngram_entropy(test, 2) + 0.02


@pytest.mark.parametrize("train", [np.array([1]), np.array([0, 9]), np.array([0, -1])])
def test_bigrams_need_two_known_tokens(train):
    with pytest.raises(UserError, match="the train text"):
        bigram_cross_entropy(train, np.array([0, 1]), 5)


def test_compressors_see_repetition_and_no_more_in_noise():
    noise = "".join(np.random.default_rng(5).choice(list("abcd"), 20_000))
    for name in ("bz2", "lzma"):
        assert compressed_bits("all work and no play " * 1000)[name] < 0.2
        assert 2.0 < compressed_bits(noise)[name] < 2.6
