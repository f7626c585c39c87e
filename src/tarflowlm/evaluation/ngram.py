"""Empirical n-gram entropy of a text: a reference for how much a model gains from context."""

from typing import Any

import numpy as np
import numpy.typing as npt

from tarflowlm.errors import UserError

_DENSE = 1 << 24  # counts up to here are an array over all n-grams, beyond it a sort


def ngram_entropy(ids_or_text: str | npt.NDArray[Any], order: int) -> float:
    r"""Entropy of a symbol given the `order - 1` symbols before it, from the counts of this text; bits per symbol.

        H_n = - 1/M  sum_{w, a}  c(w a)  log2( c(w a) / c(w) ),      c(w) = sum_a c(w a),   M = T - n + 1

    over the contexts w of n - 1 symbols and the next symbol a. c counts the M n-grams of the text of T symbols.
    `order` n = 1 is the unigram entropy, n = 3 the trigram entropy. No n-gram model of this order does better on this
    text. A model fitted to other text does worse, much worse if M is small.

    `ids_or_text`: a string, whose characters are the symbols, or integers [T].
    Raises UserError for an order below 1 or a text shorter than `order`.
    """
    symbols = _symbols(ids_or_text)
    if order < 1:
        raise UserError(f"order={order} must be 1 or more")
    if len(symbols) < order:
        raise UserError(f"the text has {len(symbols)} symbols, too few for n-grams of order {order}")
    ids, num_kinds = _renumber(symbols)
    num_ngrams = len(symbols) - order + 1
    contexts = np.zeros(num_ngrams, dtype=np.int64)
    num_contexts = 1
    for k in range(order - 1):
        contexts, num_contexts = _append(contexts, num_contexts, ids[k : k + num_ngrams], num_kinds)
    joint = contexts * num_kinds + ids[order - 1 :]
    total = _sum_c_log_c(joint, num_contexts * num_kinds) - _sum_c_log_c(contexts, num_contexts)
    return max(0.0, -total / num_ngrams)


def _symbols(ids_or_text: str | npt.NDArray[Any]) -> npt.NDArray[Any]:
    if isinstance(ids_or_text, str):
        return np.frombuffer(ids_or_text.encode("utf-32-le", errors="surrogatepass"), dtype="<u4")
    array = np.asarray(ids_or_text)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise UserError(f"symbols must be a 1-d array of integers, not {array.dtype} of shape {array.shape}")
    return array


def _append(
    contexts: npt.NDArray[np.int64], num_contexts: int, ids: npt.NDArray[np.int64], num_kinds: int
) -> tuple[npt.NDArray[np.int64], int]:
    """Contexts extended by one symbol: (codes, an upper bound on them). They are renumbered before they overflow."""
    codes, bound = contexts * num_kinds + ids, num_contexts * num_kinds
    return (codes, bound) if bound <= _DENSE else _renumber(codes)


def _renumber(codes: npt.NDArray[Any]) -> tuple[npt.NDArray[np.int64], int]:
    """Codes replaced by their ranks 0, 1, ..., and the number of different codes."""
    if int(codes.min()) >= 0 and int(codes.max()) < _DENSE:
        occurs = np.bincount(codes) > 0
        return (np.cumsum(occurs) - 1)[codes], int(occurs.sum())
    kinds, inverse = np.unique(codes, return_inverse=True)
    return inverse.astype(np.int64), len(kinds)


def _sum_c_log_c(codes: npt.NDArray[np.int64], bound: int) -> float:
    """Sum of c log2 c over the counts c of all codes."""
    counts = np.bincount(codes) if bound <= _DENSE else np.unique(codes, return_counts=True)[1]
    counts = counts[counts > 0].astype(np.float64)
    return float((counts * np.log2(counts)).sum())
