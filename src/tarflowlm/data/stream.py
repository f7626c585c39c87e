"""A text as a stream: what a source of text provides, in which batches, and how texts are split."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from tarflowlm.config import Normalization

Split = Literal["train", "valid", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)
PERCENT: dict[Split, int] = {"train": 90, "valid": 5, "test": 5}
"""Shares of the splits, unless a source says otherwise."""

CorpusProgress = Callable[[str, int, int | None], None]
"""Called with the stage ("fetch", "count", "bpe", "encode"), how much of it is done, and its total (None where that
is not known): bytes when fetching, characters otherwise."""

Notice = Callable[[str], None]
"""Called with one line that the user should read."""

Cursor = dict[str, Any]
"""The position after a batch, from which a source can continue: JSON, and understood by that source alone."""


class Batch(NamedTuple):
    """Normalised text of one split, in stretches that are each encoded on their own."""

    split: Split
    texts: list[str]
    cursor: Cursor | None
    """Start of the next batch; None where the source cannot continue from there."""


@dataclass(frozen=True)
class Stream:
    """Batches of a source from some position on."""

    batches: Iterator[Batch]
    total: int | None
    """Size of the whole text, in characters; None where it is not known in advance."""


class Source(ABC):
    """A text that has a name and is read as a stream.

    `name` is what the user called it; `identity` tells sources apart: a registered name, or the absolute path of a
    file. Equal normalisation and `settings` give the same batches every time.
    """

    name: str
    identity: str

    @property
    @abstractmethod
    def files(self) -> tuple[Path, ...] | None:
        """The files it is read from, to notice changes; None if they are not here, or it is not read from files."""

    def obtain(self, progress: CorpusProgress | None = None, notice: Notice | None = None) -> tuple[Path, ...]:
        """Download and check what `stream` needs; returns the files it is read from. UserError if that fails."""
        return self.files or ()

    @property
    def settings(self) -> dict[str, Any]:
        """What batches and cursors depend on besides text and normalisation; JSON."""
        return {}

    @abstractmethod
    def stream(
        self, normalization: Normalization, cursor: Cursor | None = None, progress: CorpusProgress | None = None
    ) -> Stream:
        """The batches from `cursor` on, or from the start. Call `obtain` first."""


def split_ranges(total: int) -> dict[Split, tuple[int, int]]:
    """The half-open range of characters of each split of a text: the first 90 % for training, then 5 % and 5 %."""
    first = total * 90 // 100
    second = total * 95 // 100
    return {"train": (0, first), "valid": (first, second), "test": (second, total)}


def split_of_document(key: str, percent: dict[Split, int] = PERCENT) -> Split:
    """The split of a document, by the sha256 of its `key` (file name, or text), so that it never changes."""
    place = int(hashlib.sha256(key.encode("utf-8")).hexdigest()[:8], 16) * 100 / 2**32
    if place < percent["train"]:
        return "train"
    return "valid" if place < percent["train"] + percent["valid"] else "test"
