"""Drafts: cheap guesses of the tokens that a model will draw by numbers that are known.

A model's token is argmax_k (log p_k + g_k) with the Gumbel numbers g of its place. A drafter has a
law q of its own from the last few tokens, and guesses argmax_k (log q_k + g_k) with the same
numbers. The closer q is to p, the more often it is right (Daliri et al. 2024, arXiv 2408.07978). A
wrong guess costs time and changes nothing.

The law is a back-off model of n-grams. A context lists its most probable tokens, and leaves the
others to its longest suffix that is a context, too:

    q(k | c) = the listed one, or rest(c) q(k | suffix of c)

K symbols; R contexts; E listed tokens of all contexts; W windows of T tokens.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from itertools import count
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Array = npt.NDArray[Any]
STEPS = 16
"""A log-probability is stored in steps of 1/16 of a nat, down to -16."""
LONGEST = 9
"""Most tokens of a context."""
PRIOR = 0.5
"""The law of the suffix counts as much as so many observations."""
LISTED = 0.2
"""A context lists tokens of so many occurrences, as a share of the gain for which it is kept."""
FEW = 256
"""Symbols at most of a model that has a drafter."""
ASKED = 200_000
"""Most tokens whose laws a drafter is made of."""
LEAST = 16
"""Fewest windows of them."""
BYTES = 600_000
"""Size at most of a drafter."""
DOUBT = 0.45
"""The probability that a guess is wrong whose score is not above the next one's."""
SHARPNESS = 1.1
"""A guess whose score is m above the next one's is wrong with probability DOUBT exp(-SHARPNESS m).
"""
USEFUL = 0.2
"""The smallest probability of use for which another position of a call pays. This and the next one
are good to a factor of two.
"""
USEFUL_OF_ROW = 0.01
"""What every row adds to it: several rows share the fixed cost of a call."""


@dataclass(frozen=True, eq=False)
class Drafter:
    """A law of the next token after the last ones.

    `codes` [R] are contexts, in order: digits of base K, the last token lowest, below a leading 1.
    The empty one lists all K symbols. `rest` [R] are levels of log rest(c), in steps of -1/16.
    Context r lists the next `sizes`[r] of `tokens` [E], with the `levels` [E] of their log q.
    """

    codes: Tensor
    sizes: Tensor
    rest: Tensor
    tokens: Tensor
    levels: Tensor

    @cached_property
    def row_of(self) -> dict[int, int]:
        """The row of every context."""
        codes = self.codes.tolist()
        return dict(zip(codes, range(len(codes)), strict=True))

    @cached_property
    def length(self) -> int:
        """Tokens of the longest context."""
        # not by a logarithm, which may round a power of the base down
        base, longest = int(self.sizes[0]), int(self.codes.max())
        return next(n for n in count() if base ** (n + 1) > longest)

    @cached_property
    def log_q(self) -> Array:
        """log q [R, K] after every context."""
        codes, sizes = self.codes.numpy(), self.sizes.numpy()
        base = int(sizes[0])
        log_rest, levels = (x.numpy() * np.float32(-1 / STEPS) for x in (self.rest, self.levels))
        log_q = np.full((len(codes), base), np.nan, dtype=np.float32)
        log_q[np.repeat(np.arange(len(sizes)), sizes), self.tokens.numpy()] = levels
        # shorter contexts have smaller codes, so they come first
        for length in range(1, self.length + 1):
            first, last = np.searchsorted(codes, (base**length, 2 * base**length))
            parent = np.zeros(last - first, dtype=np.int64)
            for shorter in range(1, length):
                suffix = base**shorter + codes[first:last] % base**shorter
                at = np.searchsorted(codes, suffix)
                parent = np.where(codes[at] == suffix, at, parent)
            rest = log_q[parent] + log_rest[first:last, None]
            own = log_q[first:last]
            log_q[first:last] = np.where(np.isnan(own), rest, own)
        return log_q

    def row(self, text: list[int]) -> int:
        """The row of the longest context that a text ends with."""
        row, digits, scale, base = 0, 0, 1, self.log_q.shape[1]
        for token in reversed(text[-self.length :]):
            digits += token * scale
            scale *= base
            row = self.row_of.get(scale + digits, row)
        return row


class Guesser:
    """Guesses the next tokens of texts that are written at one temperature."""

    most = 15
    """Most guesses at once."""

    def __init__(
        self, drafter: Drafter, temperature: float = 1.0, top_p: float | None = None
    ) -> None:
        self.drafter = drafter
        self.length = drafter.length
        """Tokens of the past that matter."""
        # all tokens are as likely long before a number is too large for float32
        self.temperature = np.float32(min(temperature, 1e30))
        self.range = math.inf if top_p is None or top_p >= 1 else -math.log(1 - top_p)
        """How far below the largest log q a token may be: about what top-p keeps."""

    def guess(self, past: Array, numbers: Array) -> Array:
        """Guesses [b, m] by numbers [b, n, K] after the last tokens [b, h] of texts, m <= n.

        They end where few of them can still be of use: a guess is right with a probability that
        grows with the margin of its score, and only if all before it are right.
        """
        texts = past.tolist()
        hope = np.ones(len(texts))
        found: list[Array] = []
        for place in range(numbers.shape[1]):
            rows = [self.drafter.row(text) for text in texts]
            log_q = self.drafter.log_q[rows] / self.temperature
            if self.range < math.inf:
                log_q[log_q < log_q.max(1, keepdims=True) - self.range] = -np.inf
            scores = log_q + numbers[:, place]
            largest = np.partition(scores, -2)[:, -2:]
            hope *= 1 - DOUBT * np.exp(-SHARPNESS * (largest[:, 1] - largest[:, 0]))
            if hope.mean() < USEFUL + USEFUL_OF_ROW * len(texts):
                break
            found.append(scores.argmax(1))
            for text, token in zip(texts, found[-1].tolist(), strict=True):
                text.append(token)
        return np.stack(found, 1) if found else past[:, :0]


def make_drafter(
    laws: Callable[[Tensor], tuple[Tensor, Tensor] | None], text: Array, window: int, most: int
) -> Drafter | None:
    """A drafter for a model, from at most `most` tokens of a `text`.

    `laws` maps windows [W, T] to what is drawn in them and to the log-weights [W, T, K]. None where
    there are no such laws, from too short a text, for a single symbol, and for many: too few of
    their guesses are right (docs/log.md).
    """
    number = min(most, ASKED, len(text)) // window
    if number < LEAST:
        return None
    starts = np.linspace(0, len(text) - window, number).astype(int)
    windows = np.stack([np.asarray(text[start : start + window]) for start in starts])
    symbols, p = [], []
    for part in torch.from_numpy(windows.astype(np.int64)).split(8):
        found = laws(part)
        if found is None or not 1 < found[1].shape[-1] <= FEW:
            return None
        symbols.append(found[0].cpu().numpy())
        p.append(found[1].softmax(-1).cpu().numpy())
    return drafter_of(np.concatenate(symbols), np.concatenate(p), BYTES)


class Counts(NamedTuple):
    """What follows the contexts of one length."""

    codes: Array
    """[C], sorted."""
    suffix: Array
    """The same contexts without their first token, as indices into those of the length before."""
    times: Array
    """How often each occurs, [C]."""
    mass: Array
    """The sums of the laws of the next token, [C, K]."""


def drafter_of(symbols: Array, p: Array, most_bytes: int) -> Drafter:
    """A drafter of at most `most_bytes` from a text and the laws of its tokens.

    `symbols` [W, T] are windows, and p [W, T, K] the probabilities of each after those before.
    """
    base = p.shape[2]
    levels: list[Counts] = []
    where = np.ones(symbols.shape, dtype=bool)
    suffix = np.zeros(symbols.shape, dtype=np.int64)
    code = np.ones(symbols.shape, dtype=np.int64)
    for length in range(LONGEST + 1):
        codes, first, index, count = np.unique(
            code[where], return_index=True, return_inverse=True, return_counts=True
        )
        order = np.argsort(index, kind="stable")
        begins = np.concatenate((np.zeros(1, dtype=np.int64), count.cumsum()[:-1]))
        mass = np.add.reduceat(p[where][order], begins, dtype=np.float64)
        levels.append(Counts(codes, suffix[where][first], count, mass))
        suffix[where] = index
        where[:, : length + 1] = False
        if base ** (length + 2) >= 2**62 or not where.any():
            break
        code += (np.roll(symbols, length + 1, axis=1) + base - 1) * base**length
    least = 0.4
    while True:
        drafter = _pruned(levels, least)
        tensors = drafter.codes, drafter.sizes, drafter.rest, drafter.tokens, drafter.levels
        size = sum(tensor.nbytes for tensor in tensors)
        if size <= most_bytes:
            return drafter
        least *= max(1.2, size / most_bytes)


def _pruned(levels: list[Counts], least: float) -> Drafter:
    """The contexts whose law differs from their parent's in at least so many occurrences.

    A context's parent is its longest suffix that is kept.
    """
    base = levels[0].mass.shape[1]
    laws = np.full((1, base), 1 / base)
    row_of = np.zeros(1, dtype=np.int64)
    found: list[tuple[Array, ...]] = []
    for length, level in enumerate(levels):
        parent = row_of[level.suffix] if length else row_of
        before = laws[parent]
        q = (level.mass + PRIOR * before) / (level.times[:, None] + PRIOR)
        is_listed = level.times[:, None] * q >= (LISTED * least if length else 0.0)
        gain = level.times * (1 - np.minimum(q, before).sum(1))
        is_kept = is_listed.any(1) & ((gain >= least) | (length == 0))
        codes, q, before, is_listed = (x[is_kept] for x in (level.codes, q, before, is_listed))
        seen, expected = ((x * is_listed).sum(1) for x in (q, before))
        rest = np.clip((1 - seen) / np.maximum(1 - expected, 1e-3), 1e-6, 1.0)
        found.append((codes, is_listed.sum(1), rest, is_listed.nonzero()[1], q[is_listed]))
        row_of = np.where(is_kept, len(laws) + is_kept.cumsum() - 1, parent)
        laws = np.concatenate((laws, np.where(is_listed, q, rest[:, None] * before)))
    codes, sizes, rest, tokens, q = map(np.concatenate, zip(*found, strict=True))

    rest, q = (np.clip(np.round(-STEPS * np.log(x)), 0, 255) for x in (rest, q))
    return Drafter(
        codes=torch.from_numpy(codes),
        sizes=torch.from_numpy(sizes.astype(np.int16)),
        rest=torch.from_numpy(rest.astype(np.uint8)),
        tokens=torch.from_numpy(tokens.astype(np.uint8)),
        levels=torch.from_numpy(q.astype(np.uint8)),
    )
