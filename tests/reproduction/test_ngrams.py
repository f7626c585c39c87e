"""The model of n-grams is a distribution, and learns one; entropies of n-grams."""

import itertools
import json
import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import prepared
from reproduction.ngrams import KneserNey, count
from tarflowlm.data import TokenizerConfig
from tarflowlm.evaluation.ngrams import ngram_entropy


def conditionals(model: KneserNey, history: tuple[int, ...]) -> list[float]:
    """p of every token after a history."""
    texts = [np.array([*history, a]) for a in range(model.vocab_size)]
    return [float(model.probabilities(text)[-1]) for text in texts]


@pytest.mark.parametrize("order", [1, 2, 3, 5])
def test_probabilities_sum_to_one_after_every_history(order):
    """Whether it was seen or not, and for tokens that were not."""
    train = np.random.default_rng(3).integers(0, 4, 60)
    model = KneserNey(train, 5, order)
    for length in range(order + 1):
        for history in itertools.product(range(5), repeat=min(length, 3)):
            found = conditionals(model, history)
            assert sum(found) == pytest.approx(1, abs=1e-12)
            assert min(found) > 0


def smoothed(train: list[int], vocab_size: int, history: tuple[int, ...], a: int, order: int):
    """p_k(a | w) of the docstring for the last tokens w of a history, one gram at a time."""

    def count(k: int) -> Counter[tuple[int, ...]]:
        grams = [tuple(train[i : i + k]) for i in range(len(train) - k + 1)]
        if k == order:
            return Counter(grams)
        longer = {tuple(train[i : i + k + 1]) for i in range(len(train) - k)}
        return Counter(gram[1:] for gram in longer)

    def p(k: int, w: tuple[int, ...]) -> float:
        if k == 0:
            return 1 / vocab_size
        counts = count(k)
        n = Counter(counts.values())
        discounts = {0: 0.0}
        for i in (1, 2, 3):
            discounts[i] = i / 2
            if n[i] and n[1]:
                d = i - (i + 1) * n[1] / (n[1] + 2 * n[2]) * n[i + 1] / n[i]
                discounts[i] = d if 0 < d <= i else i / 2
        row = [counts[(*w, b)] for b in range(vocab_size)]
        if not sum(row):
            return p(k - 1, w[1:])
        taken = [discounts[min(c, 3)] for c in row]
        return (row[a] - taken[a] + sum(taken) * p(k - 1, w[1:])) / sum(row)

    return p(order, history[len(history) - order + 1 :])


@settings(derandomize=True, max_examples=60, deadline=None)
@given(
    st.lists(st.integers(0, 3), min_size=12, max_size=60),
    st.lists(st.integers(0, 4), min_size=4, max_size=12),
    st.integers(1, 4),
)
def test_smoothing_equals_the_formula(train, test, order):
    found = KneserNey(np.array(train), 5, order).probabilities(np.array(test))
    for place, a in enumerate(test):
        if place >= order - 1:
            expected = smoothed(train, 5, tuple(test[:place]), a, order)
            assert found[place] == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("order", [2, 3])
def test_the_model_learns_a_markov_chain(order):
    rng = np.random.default_rng(4)
    chain = rng.dirichlet(np.full(6, 0.5), size=6)
    ids = [0]
    for _ in range(20_000):
        ids.append(int(rng.choice(6, p=chain[ids[-1]])))
    train = np.array(ids[:15_000])
    test = np.array(ids[15_000:])
    entropy = ngram_entropy("".join("abcdef"[i] for i in test), 2)
    assert entropy < KneserNey(train, 6, order).bits(test) / len(test) < entropy + 0.02


def test_ends_of_documents_cost_bits_and_are_no_characters(tmp_path, capsys):
    texts = [f"story {n} was told" for n in range(60)]
    rows = [json.dumps({"text": text}) for text in texts]
    (tmp_path / "in.jsonl").write_text("\n".join(rows), encoding="utf-8")
    options = ["--kind", "byte", "--vocab-size", "0", "--normalize", "none", "--json"]
    count(["--data", str(tmp_path / "in.jsonl"), "--order", "3", *options])
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    tokenizer = TokenizerConfig(kind="byte", normalize="none")
    corpus = prepared(tmp_path / "in.jsonl", tokenizer)
    assert found["characters"] == corpus.num_characters("test")
    train, test = (np.asarray(corpus.split(split), dtype=np.int64) for split in ("train", "test"))
    assert (test == 256).sum() == 3
    bits = KneserNey(train, 257, 3).bits(test)
    assert found["tokens_bpc"] == pytest.approx(bits / found["characters"])
    decoded = corpus.tokenizer.decode(test)
    share = len(decoded) / found["characters"]
    assert found["trigram_bpc"] == pytest.approx(ngram_entropy(decoded, 3) * share)


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
