"""Words of a text as spans of its tokens, and which of them an edit changes."""

import itertools
import re
from bisect import bisect_left, bisect_right
from collections.abc import Sequence

import torch

from tarflowlm.errors import UserError

Span = tuple[int, int]
"""First token, and the one after the last."""


def words_of(pieces: Sequence[bytes]) -> list[Span]:
    """The words of a text, given the bytes of its tokens: what lies between white space.

    A token that begins with white space begins a word; one of nothing else belongs to none.
    """
    spans: list[Span] = []
    inside = False
    for at, piece in enumerate(pieces):
        is_space = not piece.strip()
        if not is_space and (not inside or piece[:1].isspace()):
            spans.append((at, at + 1))
        elif not is_space:
            spans[-1] = (spans[-1][0], at + 1)
        inside = not is_space
    return spans


def num_words(strength: float, words: Sequence[Span]) -> int:
    """How many words a share `strength` is: rounded, and at least one unless it is 0."""
    return max(1, round(strength * len(words))) if strength else 0


def pick_words(
    words: Sequence[Span],
    count: int,
    length: int,
    generator: torch.Generator,
    costs: Sequence[float] | None = None,
) -> list[Span]:
    """`count` words of a text of `length` tokens: at random, or by the highest mean of `costs`.

    Listed first to last. Words at either end of the text are the last to be picked: nothing says
    that a word begins or ends there. UserError for more words than there are.
    """
    if not 0 <= count <= len(words):
        raise UserError(f"words {count}: the text has {len(words)}, give at most that")
    if costs is None:
        order = torch.randperm(len(words), generator=generator).tolist()
    else:
        mean = [sum(costs[start:stop]) / (stop - start) for start, stop in words]
        order = sorted(range(len(words)), key=lambda i: -mean[i])
    order.sort(key=lambda i: words[i][0] == 0 or words[i][1] == length)
    return [words[i] for i in sorted(order[:count])]


def merge_words(chosen: Sequence[Span], words: Sequence[Span]) -> list[Span]:
    """The chosen words, first to last; neighbours and the white space between them are one span."""
    spans: list[Span] = []
    previous = False
    for word in words:
        if word in chosen:
            spans.append((spans.pop()[0] if previous else word[0], word[1]))
        previous = word in chosen
    return spans


def neighbours(words: Sequence[Span], start: int, stop: int, count: int) -> list[Span]:
    """`count` words before the place `start`, and as many from `stop` on: a span for each side."""
    before = [word for word in words if word[1] <= start]
    after = [word for word in words if word[0] >= stop]
    chosen = [*before[max(len(before) - count, 0) :], *after[:count]]
    # the two sides are apart, even if no word is between them
    return [*merge_words(chosen, before), *merge_words(chosen, after)]


def covered(spans: Sequence[Span], length: int) -> torch.Tensor:
    """Which of `length` tokens lie in the spans, [T]."""
    found = torch.zeros(length, dtype=torch.bool)
    for start, stop in spans:
        found[start:stop] = True
    return found


def find_piece(pieces: Sequence[bytes], piece: str) -> Span:
    """The tokens that hold `piece`, where it first occurs as whole words, or else at all.

    UserError for a piece that is empty or not in the text.
    """
    found = find_all(pieces, piece) or find_all(pieces, piece, as_words=False)
    if not found:
        raise UserError(f"{piece!r} does not occur in the text: give a piece of it")
    return found[0]


def find_all(pieces: Sequence[bytes], piece: str, *, as_words: bool = True) -> list[Span]:
    """The tokens that hold each occurrence of `piece`, as whole words or anywhere."""
    if not piece:
        return []
    pattern = re.escape(piece)
    if as_words:
        pattern = rf"(?<!\w){pattern}(?!\w)"
    # tokens may hold parts of characters, so places are counted in bytes
    handler = "surrogateescape"
    text = b"".join(pieces).decode("utf-8", handler)
    ends = list(itertools.accumulate(len(part) for part in pieces))
    places = [
        [len(text[:at].encode("utf-8", handler)) for at in m.span()]
        for m in re.finditer(pattern, text)
    ]
    return [(bisect_right(ends, start), bisect_left(ends, stop) + 1) for start, stop in places]
