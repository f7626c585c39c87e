"""Sources of text, and the first kind of source: the user's own files.

A source yields its normalised text in pieces, each with its split (`data.splits`); `data.prepare`
encodes them.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from pathlib import Path

from tarflowlm.config import Normalization
from tarflowlm.data.splits import (
    FEW,
    Piece,
    Split,
    cut_in_three,
    fair_shares,
    place_of_document,
    split_of_document,
)
from tarflowlm.data.text import (
    BLOCK,
    FIELD,
    is_json_lines,
    json_texts,
    normalize,
    text_blocks,
    text_files,
    text_pieces,
    unwrapped,
)
from tarflowlm.errors import SILENT, Progress, UserError

Placed = Iterator[tuple[Split, Iterable[str]]]
"""Documents: the split and the text of each, in blocks."""


class Source(ABC):
    """A text in one or more parts. Equal settings give the same pieces every time."""

    name: str
    """The user's word for it."""
    identity: str
    """A registered name, or the absolute path of a file."""
    normalization: Normalization = "none"
    unwrap: bool = False
    """Whether the lines of paragraphs are joined."""
    progress: Progress = SILENT
    separator: str = "\n"
    """Follows a document that is not normalised where no token can end it."""

    @property
    @abstractmethod
    def files(self) -> tuple[Path, ...]:
        """The files it is read from, as far as they are on this machine."""

    @property
    def has_documents(self) -> bool:
        """Whether it holds documents, and not one text that is cut anywhere."""
        return True

    @property
    def num_parts(self) -> int:
        """Parts that are prepared one by one. A kill loses the one that is being prepared."""
        return 1

    def state(self) -> list[list[str | int]]:
        """Sizes and times that tell a changed text from this one."""
        return [[f.name, f.stat().st_size, f.stat().st_mtime_ns] for f in self.files]

    def obtain(self) -> None:  # noqa: B027
        """Download and check what `pieces` needs."""

    def count_characters(self) -> int | None:
        """The characters of the normalised text; None where only reading the pieces tells."""
        return None

    @abstractmethod
    def placed(self, part: int) -> Placed:
        """The documents of part `part`, counted from 0, as they are."""

    def pieces(self, part: int) -> Iterator[Piece]:
        """The text of part `part`. Call `obtain` first."""
        for split, blocks in self.placed(part):
            last = ""
            for text in filter(None, self.normalized(blocks)):
                if last:
                    yield Piece(split, last)
                last = text
            if last:
                yield Piece(split, last, ends=True)

    def normalized(self, blocks: Iterable[str]) -> Iterator[str]:
        """Pieces of a document; of text8 they begin with a space and end without one."""
        if self.unwrap:
            blocks = [unwrapped("".join(blocks))]
        for piece in text_pieces(blocks, BLOCK):
            text = normalize(piece, self.normalization)
            yield "" if self.normalization == "text8" and text == " " else text


class TextFile(Source):
    """A text file, which is cut in three; or documents: the files of a folder by their names, and
    the lines of .jsonl files. So it is read twice.

    `field` holds the texts of .jsonl files.
    """

    def __init__(self, path: Path, field: str = "text") -> None:
        self.path = path.resolve()
        self.field = field
        more = "" if field == "text" else FIELD + field
        self.name = f"{path}{more}"
        self.identity = f"{self.path}{more}"
        self._total = 0
        self._places: set[float] = set()

    @property
    def files(self) -> tuple[Path, ...]:
        return text_files(self.path)

    @property
    def has_documents(self) -> bool:
        return len(self.files) > 1 or any(map(is_json_lines, self.files))

    def documents(self) -> Iterator[tuple[str, Iterable[str]]]:
        """The key of each document, the name of a file or a line itself, and its blocks."""
        for file in self.files:
            if is_json_lines(file):
                for text in json_texts(file, self.field):
                    yield text, [text]
            elif file == self.path or file.stat().st_size:
                yield file.name, text_blocks(file)

    def blocks(self) -> Iterator[str]:
        """The text of all documents."""
        for _, blocks in self.documents():
            yield from blocks

    def count_characters(self) -> int:
        if not self._total:
            self.progress.stage(f"reading {self.name}, characters")
            for key, blocks in self.documents():
                size = 0
                for piece in self.normalized(blocks):
                    size += len(piece)
                    self.progress.advance(len(piece))
                if size and len(self._places) <= FEW:
                    self._places.add(place_of_document(key))
                self._total += size
            if not self._total:
                what = f"{self.normalization} normalisation leaves nothing of {self.name}"
                raise UserError(f"{what}: give a text with more, or another normalisation")
        return self._total

    def placed(self, part: int) -> Placed:
        total = self.count_characters()
        shares = fair_shares(self._places, total)
        for key, blocks in self.documents():
            yield split_of_document(key, shares), blocks

    def pieces(self, part: int) -> Iterator[Piece]:
        if self.has_documents:
            return super().pieces(part)
        total = self.count_characters()
        return cut_in_three(self.normalized(self.blocks()), total)
