"""The bits that counting reaches on the test split of a text."""

import sys
from dataclasses import dataclass, field
from typing import Annotated, NamedTuple

import numpy as np
import numpy.typing as npt
import tyro

from tarflowlm.cli.main import main, run_command
from tarflowlm.cli.options import Json
from tarflowlm.config import DataConfig, TokenizerConfig
from tarflowlm.data import infer_tokenizer, prepare_corpus
from tarflowlm.evaluation.ngrams import baselines_on
from tarflowlm.options import arg
from tarflowlm.presets import preset
from tarflowlm.schema import Count
from tarflowlm.terminal.bars import Bars, print_result

Tokens = npt.NDArray[np.int64]
Reals = npt.NDArray[np.float64]


class Grams(NamedTuple):
    """The G different k-grams w a of a text, and the C different (k - 1)-grams w."""

    codes: Tokens
    """[G], ascending: the index of w among the (k - 1)-grams, times V, plus a."""
    kept: Reals
    """[G]: c(w a) - D(c(w a))."""
    reserved: Reals
    """[C]: the sum of D(c(w a)) over a."""
    total: Reals
    """[C]: c(w), the sum of c(w a) over a; 0 if w stands nowhere but at the end of the text."""


class KneserNey:
    r"""A model of the next token given the `order - 1` before it, fitted to the tokens `train`.

    Interpolated modified Kneser-Ney smoothing (Chen and Goodman 1999) over `vocab_size` V tokens.
    `train` [T] has T >= n = `order`. For k = 1 .. n, with w' for w without its first token,

        p_k(a | w) = (c_k(w a) - D_k(c_k(w a)) + p_{k-1}(a | w') sum_b D_k(c_k(w b))) / c_k(w)

    and p_0 = 1 / V. c_n counts the n-grams of the text; below, c_k(v) is the number of different
    tokens before the k-gram v. c_k(w) = sum_a c_k(w a); where it is 0, p_k(a | w) is p_{k-1}.
    With n_i for the number of k-grams that have the count i, and Y = n_1 / (n_1 + 2 n_2),

        D_k(0) = 0,     D_k(i) = i - (i + 1) Y n_{i+1} / n_i  for i = 1, 2,     D_k(i >= 3) as for 3

    or i / 2 where this is not in (0, i]. So p_k > 0, and it sums to one over a after every w.
    """

    def __init__(self, train: Tokens, vocab_size: int, order: int) -> None:
        self.vocab_size = vocab_size
        self.orders: list[Grams] = []
        """For k = 1 .. n."""
        # the index of the k-gram that begins at each place; there is one empty gram
        at = np.zeros(len(train) + 1, dtype=np.int64)
        contexts = 1
        codes, counts = at[:0], at[:0]
        for k in range(1, order + 1):
            ends = at[:-1] * vocab_size + train[k - 1 :]
            longer, indices, times = np.unique(ends, return_inverse=True, return_counts=True)
            if k > 1:
                # of every different k-gram, the (k - 1)-gram without its first token
                suffixes = np.zeros(len(longer), dtype=np.int64)
                suffixes[indices] = at[1:]
                before = np.bincount(suffixes, minlength=len(codes))
                self.orders.append(self._smoothed(codes, before, contexts))
                contexts = len(codes)
            codes, counts, at = longer, times, indices
        self.orders.append(self._smoothed(codes, counts, contexts))

    def _smoothed(self, codes: Tokens, counts: Tokens, contexts: int) -> Grams:
        discounts = discounts_of(counts)[counts.clip(max=3)]
        context = codes // self.vocab_size
        return Grams(
            codes,
            counts - discounts,
            np.bincount(context, discounts, contexts).astype(np.float64),
            np.bincount(context, counts, contexts).astype(np.float64),
        )

    def probabilities(self, tokens: Tokens) -> Reals:
        """p_n of each of the `tokens` [T] given those before it, and p_k of the k-th for k < n."""
        p = np.full(len(tokens), 1 / self.vocab_size)
        # as in the text that was counted; -1 for a gram that is not in it
        at = np.zeros(len(tokens) + 1, dtype=np.int64)
        for k, (codes, kept, reserved, total) in enumerate(self.orders, 1):
            w = at[:-1]
            code = np.where(w < 0, -1, w * self.vocab_size + tokens[k - 1 :])
            place = np.searchsorted(codes, code).clip(max=len(codes) - 1)
            is_seen = codes[place] == code
            shorter = p[k - 1 :]
            mixed = np.where(is_seen, kept[place], 0) + reserved[w] * shorter
            is_known = (w >= 0) & (total[w] > 0)
            p[k - 1 :] = np.where(is_known, mixed / np.maximum(total[w], 1), shorter)
            at = np.where(is_seen, place, -1)
        return p

    def bits(self, tokens: Tokens) -> float:
        """The bits of `tokens` [T], together."""
        return float(-np.log2(self.probabilities(tokens)).sum())


def discounts_of(counts: Tokens) -> Reals:
    """D(0), D(1), D(2) and D(3) of `KneserNey` for grams with these counts."""
    n = np.bincount(counts.clip(max=5), minlength=6)
    found = [0.0]
    for i in (1, 2, 3):
        # n_1 = 0 gives Y = 0 and no discount; n_i = 0 gives no formula
        y = n[1] / max(n[1] + 2 * n[2], 1)
        discount = i - (i + 1) * y * n[i + 1] / n[i] if n[i] and n[1] else 0.0
        found.append(discount if 0 < discount <= i else i / 2)
    return np.array(found)


@dataclass(frozen=True, kw_only=True)
class Args(Json):
    """Bits per character of the test split under an n-gram model of the training split's tokens,
    and under the simple models of `tarflowlm quickstart`, which count the test split itself: they
    are entropies of its characters, and its size under bz2 -9.

    As in `tarflowlm eval`, the ends of documents cost bits and are no characters. An n-gram reads
    on from one document to the next.
    """

    data: Annotated[str, arg("SOURCE")] = "tales"
    """Corpus name, file or prepared directory."""
    order: Annotated[Count, arg("INT")] = 5
    """The n of the n-grams."""
    tokenizer: Annotated[TokenizerConfig, tyro.conf.arg(name="")] = field(
        default_factory=lambda: preset("quickstart").data.tokenizer
    )
    """The tokenizer; the default is that of the quickstart."""


def run(args: Args) -> None:
    with Bars() as bars:
        text = infer_tokenizer(DataConfig(source=args.data, tokenizer=args.tokenizer))
        corpus = prepare_corpus(text, progress=bars)
    tokenizer = corpus.tokenizer
    train, test = (np.asarray(corpus.split(s), dtype=np.int64) for s in ("train", "test"))
    decoded = tokenizer.decode(test)
    bits = {"tokens": KneserNey(train, tokenizer.vocab_size, args.order).bits(test)}
    # to these an end is an empty line
    bits |= {name: bpc * len(decoded) for name, bpc in baselines_on(decoded).items()}
    characters = int(tokenizer.characters_per_token[test].sum())
    found = {name.removesuffix("_bpc") + "_bpc": b / characters for name, b in bits.items()}
    labels = (
        f"{args.order}-grams of tokens, counted in the training split",
        "characters, counted in the test split",
        "trigrams of characters, counted in the test split",
        "bz2 -9 of the test split",
    )
    rows = [(label, f"{bpc:.3f}") for label, bpc in zip(labels, found.values(), strict=True)]
    value = {"order": args.order, "characters": characters, **found}
    print_result(args.json, value, f"{args.data}, bits per character of the test split", rows)


def count(argv: list[str]) -> None:
    """Count with these words."""
    run_command(sys.modules[__name__], argv, "python -m reproduction.ngrams")


if __name__ == "__main__":
    main(dispatch=count)
