"""The bits that simple counting reaches on the text of the quickstart."""

import sys

import numpy as np
import numpy.typing as npt

from tarflowlm.cli.quickstart import baselines_on
from tarflowlm.data import prepare_corpus
from tarflowlm.presets import preset

Tokens = npt.NDArray[np.int64]


def bigram_cross_entropy(train: Tokens, test: Tokens, vocab_size: int) -> float:
    r"""Bits per token of `test` under a bigram model fitted to `train`.

    Both are at least two integers [T] below `vocab_size` V. Interpolated Kneser-Ney (Chen
    and Goodman 1999): with counts c of `train`, N(w .) and N(. a) the numbers of different tokens
    after w and before a, and N the number of different bigrams,

        p(a | w) = (max(c(w a) - D, 0) + D N(w .) p(a)) / c(w),      c(w) = sum_a c(w a)
        p(a)     = (max(N(. a) - D, 0) + D K / V) / N,               K = number of a with N(. a) > 0

    and D = n_1 / (n_1 + 2 n_2) from the numbers n_k of bigrams with c = k. p(a | w) = p(a) for the
    first token and after tokens that `train` does not have.
    """
    codes, counts = np.unique(train[:-1] * vocab_size + train[1:], return_counts=True)
    once = int((counts == 1).sum())
    twice = int((counts == 2).sum())
    discount = once / (once + 2 * twice) if once else 0.5
    before = np.bincount(codes % vocab_size, minlength=vocab_size)
    p = np.maximum(before - discount, 0) + discount * (before > 0).sum() / vocab_size
    p /= len(codes)
    context = np.bincount(train[:-1], minlength=vocab_size)
    after = np.bincount(codes // vocab_size, minlength=vocab_size)
    w = test[:-1]
    a = test[1:]
    place = np.searchsorted(codes, w * vocab_size + a).clip(max=len(codes) - 1)
    count = np.where(codes[place] == w * vocab_size + a, counts[place], 0)
    joint = np.maximum(count - discount, 0) + discount * after[w] * p[a]
    conditional = np.where(context[w] > 0, joint / np.maximum(context[w], 1), p[a])
    return float(-(np.log2(conditional).sum() + np.log2(p[test[0]])) / len(test))


def main() -> None:
    """`python -m reproduction.ngrams`: bits per character of the quickstart's test split under a
    bigram model of its tokens, and under the simple models of `tarflowlm quickstart`.
    """
    corpus = prepare_corpus(preset("quickstart").data)
    train, test = (np.asarray(corpus.split(s), dtype=np.int64) for s in ("train", "test"))
    per_token = bigram_cross_entropy(train, test, corpus.tokenizer.vocab_size)
    text = corpus.tokenizer.decode(test.tolist())
    found = {"bigrams of tokens": per_token * len(test) / len(text), **baselines_on(text)}
    for name, bits in found.items():
        sys.stdout.write(f"{name}: {bits:.3f} bits per character\n")


if __name__ == "__main__":
    main()
