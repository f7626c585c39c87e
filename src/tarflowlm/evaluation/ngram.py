"""Baselines without a neural network: n-gram entropies, a bigram model, and general-purpose compressors."""

import bz2
import lzma
from typing import Any

import numpy as np
import numpy.typing as npt


def ngram_entropy(ids_or_text: str | npt.NDArray[Any], order: int) -> float:
    r"""Entropy of a symbol given the `order - 1` symbols before it, from the counts of this text; bits per symbol.

        H_n = - 1/M  sum_{w, a}  c(w a)  log2( c(w a) / c(w) ),      c(w) = sum_a c(w a),   M = T - n + 1

    over the contexts w of n - 1 symbols and the next symbol a. c counts the M n-grams of the text of T symbols.
    `order` n = 1 is the unigram entropy, n = 3 the trigram entropy. No n-gram model of this order does better on this
    text. A model fitted to other text does worse, much worse if M is small.

    `ids_or_text`: a string, whose characters are the symbols, or integers [T]. T must be at least `order`.
    """
    if isinstance(ids_or_text, str):
        ids_or_text = np.frombuffer(ids_or_text.encode("utf-32-le", errors="surrogatepass"), dtype="<u4")
    ids = _ranks(ids_or_text)
    num_kinds, num_ngrams = int(ids.max()) + 1, len(ids) - order + 1
    contexts = np.zeros(num_ngrams, dtype=np.int64)
    for k in range(order - 1):
        contexts = _ranks(contexts * num_kinds + ids[k : k + num_ngrams])
    total = _sum_c_log_c(contexts * num_kinds + ids[order - 1 :]) - _sum_c_log_c(contexts)
    return max(0.0, -total / num_ngrams)


def bigram_cross_entropy(train: npt.NDArray[Any], test: npt.NDArray[Any], vocab_size: int) -> float:
    r"""Bits per token of `test` under a bigram model fitted to `train`: integers below `vocab_size` V, [T] each.

    Interpolated Kneser-Ney (Chen and Goodman 1999): with counts c of `train`, N(w .) and N(. a) the numbers of
    different tokens after w and before a, and N the number of different bigrams,

        p(a | w) = (max(c(w a) - D, 0) + D N(w .) p(a)) / c(w),      c(w) = sum_a c(w a)
        p(a)     = (max(N(. a) - D, 0) + D K / V) / N,               K = number of a with N(. a) > 0

    and D = n_1 / (n_1 + 2 n_2) from the numbers n_k of bigrams with c = k. p(a | w) = p(a) for the first token and
    after tokens that `train` does not have. Both texts need two tokens or more.
    """
    train, test = train.astype(np.int64), test.astype(np.int64)
    codes, counts = np.unique(train[:-1] * vocab_size + train[1:], return_counts=True)
    once, twice = int((counts == 1).sum()), int((counts == 2).sum())
    discount = once / (once + 2 * twice) if once else 0.5
    before = np.bincount(codes % vocab_size, minlength=vocab_size)
    p = np.maximum(before - discount, 0) + discount * (before > 0).sum() / vocab_size
    p /= len(codes)
    context = np.bincount(train[:-1], minlength=vocab_size)
    after = np.bincount(codes // vocab_size, minlength=vocab_size)
    w, a = test[:-1], test[1:]
    place = np.searchsorted(codes, w * vocab_size + a).clip(max=len(codes) - 1)
    count = np.where(codes[place] == w * vocab_size + a, counts[place], 0)
    joint = np.maximum(count - discount, 0) + discount * after[w] * p[a]
    conditional = np.where(context[w] > 0, joint / np.maximum(context[w], 1), p[a])
    return float(-(np.log2(conditional).sum() + np.log2(p[test[0]])) / len(test))


def compressed_bits(text: str) -> dict[str, float]:
    """Bits per character of a text compressed by bz2 and by lzma at their strongest, without any other text."""
    data = text.encode("utf-8", errors="surrogatepass")
    sizes = {"bz2": len(bz2.compress(data, 9)), "lzma": len(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME))}
    return {name: 8 * size / max(len(text), 1) for name, size in sizes.items()}


def _ranks(codes: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
    """Codes replaced by their ranks 0, 1, ..., which keeps products of codes small."""
    return np.unique(codes, return_inverse=True)[1].astype(np.int64)


def _sum_c_log_c(codes: npt.NDArray[np.int64]) -> float:
    """Sum of c log2 c over the counts c of all codes."""
    counts = np.unique(codes, return_counts=True)[1].astype(np.float64)
    return float((counts * np.log2(counts)).sum())
