"""Three parts of every text: train trains a model, valid chooses its weights, test measures it."""

import hashlib
from collections.abc import Iterable, Iterator
from itertools import pairwise
from typing import Literal, NamedTuple, get_args

Split = Literal["train", "valid", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)
MOST_HELD_OUT = 40_000_000
"""The most characters of validation and of test, about 10 million tokens of GPT-2."""
FEW_DOCUMENTS = 4096
"""If there are at most this many documents, every split has at least one."""


class Piece(NamedTuple):
    """A stretch of normalised text that is encoded on its own, and the split it belongs to."""

    split: Split
    text: str
    ends: bool = False
    """Whether a document ends here."""


def cut_in_three(pieces: Iterable[str], total: int) -> Iterator[Piece]:
    """A text of `total` characters in pieces: 90 %, 5 % and 5 %.

    Validation and test have at most `MOST_HELD_OUT` characters.
    """
    valid = max(total * 90 // 100, total - 2 * MOST_HELD_OUT)
    test = max(total * 95 // 100, total - MOST_HELD_OUT)
    cuts = list(pairwise([0, valid, test, total]))
    position = 0
    for piece in pieces:
        for split, (start, stop) in zip(SPLITS, cuts, strict=True):
            text = piece[max(0, start - position) : max(0, stop - position)]
            if text:
                yield Piece(split, text)
        position += len(piece)


def place_of_document(key: str) -> float:
    """A percentage by the sha256 of the `key` of a document."""
    return int(hashlib.sha256(key.encode("utf-8")).hexdigest()[:8], 16) * 100 / 2**32


def split_of_document(key: str, shares: tuple[float, float] = (90.0, 95.0)) -> Split:
    """The split of a document by the sha256 of its `key`.

    `shares` are the cumulative percentages of train and valid.
    """
    place = place_of_document(key)
    if place < shares[0]:
        return "train"
    return "valid" if place < shares[1] else "test"


def fair_shares(places: set[float], characters: int) -> tuple[float, float]:
    """The `shares` for documents that have `characters` together.

    Validation and test get 5 % each, or about `MOST_HELD_OUT` characters. With 3 to `FEW_DOCUMENTS`
    documents, whose `places` are known, this is rounded to whole documents, at least one.
    """
    held = min(5.0, 100 * MOST_HELD_OUT / characters)
    if len(SPLITS) <= len(places) <= FEW_DOCUMENTS:
        each = max(1, round(len(places) * held / 100))
        return sorted(places)[-2 * each], sorted(places)[-each]
    return 100 - 2 * held, 100 - held
