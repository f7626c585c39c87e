"""Simple models of a text, to compare with: n-grams, and a compressor. No torch here."""

import bz2
import math
from collections import Counter


def baselines_on(text: str) -> dict[str, float]:
    """Bits per character of a text under simple models, by their names in the results."""
    return {
        "unigram_bpc": ngram_entropy(text, 1),
        "trigram_bpc": ngram_entropy(text, 3),
        "bz2_bpc": 8 * len(bz2.compress(text.encode("utf-8"), 9)) / len(text),
    }


def ngram_entropy(text: str, order: int) -> float:
    r"""Entropy of a character given the `order - 1` before it, from the counts of a text; in bits.

        H_n = - 1/M sum_{w, a} c(w a) log2( c(w a) / c(w) ),   c(w) = sum_a c(w a),   M = T - n + 1

    over the contexts w of n - 1 characters and the next character a. c counts the M n-grams of the
    text of T characters. No n-gram model of this order does better on this text.
    """
    counts = Counter(text[i : i + order] for i in range(len(text) - order + 1))
    contexts: Counter[str] = Counter()
    for gram, count in counts.items():
        contexts[gram[:-1]] += count
    total = sum(c * math.log2(contexts[gram[:-1]] / c) for gram, c in counts.items())
    return total / counts.total()
