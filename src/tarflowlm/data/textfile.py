"""Sources of text, and the first kind of source: the user's own files.

A source yields its normalised text in pieces, each with its split (`data.splits`); `data.prepare`
encodes them.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path

from tarflowlm.config import Normalization
from tarflowlm.data.splits import Piece, cut_in_three
from tarflowlm.data.text import BLOCK, FIELD, file_blocks, normalize, text_files, text_pieces
from tarflowlm.errors import UserError
from tarflowlm.progress import Progress


class Source(ABC):
    """A text in one or more parts. Equal normalisation gives the same pieces every time."""

    name: str
    """The user's word for it."""
    identity: str
    """A registered name, or the absolute path of a file."""

    @property
    @abstractmethod
    def files(self) -> tuple[Path, ...]:
        """The files it is read from, as far as they are on this machine."""

    @property
    def num_parts(self) -> int:
        """Parts that are prepared one by one. A kill loses the one that is being prepared."""
        return 1

    def state(self) -> list[list[str | int]]:
        """What tells a changed text from this one."""
        return [[f.name, f.stat().st_size, f.stat().st_mtime_ns] for f in self.files]

    def obtain(self, progress: Progress) -> None:  # noqa: B027
        """Download and check what `pieces` needs."""

    def count_characters(self, normalization: Normalization, progress: Progress) -> int | None:
        """The characters of the normalised text; None where only reading the pieces tells."""
        return None

    @abstractmethod
    def pieces(
        self, part: int, normalization: Normalization, progress: Progress
    ) -> Iterator[Piece]:
        """The text of part `part`, counted from 0. Call `obtain` first."""


class TextFile(Source):
    """A text file, or a folder of them by their names, cut in three; so it is read twice.

    `field` holds the texts of .jsonl files.
    """

    def __init__(self, path: Path, field: str = "text") -> None:
        self.path = path.resolve()
        self.field = field
        more = "" if field == "text" else FIELD + field
        self.name = f"{path}{more}"
        self.identity = f"{self.path}{more}"
        self._totals: dict[Normalization, int] = {}

    @property
    def files(self) -> tuple[Path, ...]:
        return text_files(self.path)

    def blocks(self) -> Iterator[str]:
        """The text as it is, in blocks of at most a megabyte; a line end between files."""
        for number, file in enumerate(self.files):
            if number:
                yield "\n"
            yield from file_blocks(file, self.field)

    def count_characters(self, normalization: Normalization, progress: Progress) -> int:
        if normalization not in self._totals:
            progress.stage(f"reading {self.name}, characters")
            total = 0
            for piece in self._normalized(normalization):
                total += len(piece)
                progress.advance(len(piece))
            if not total:
                remedy = "keep its letters with a byte or BPE tokenizer and normalize none"
                raise UserError(f"text8 normalisation leaves nothing of {self.name}: {remedy}")
            self._totals[normalization] = total
        return self._totals[normalization]

    def pieces(
        self, part: int, normalization: Normalization, progress: Progress
    ) -> Iterator[Piece]:
        total = self.count_characters(normalization, progress)
        return cut_in_three(self._normalized(normalization), total)

    def _normalized(self, normalization: Normalization) -> Iterator[str]:
        for piece in text_pieces(self.blocks(), BLOCK):
            yield normalized_piece(piece, normalization)


def normalized_piece(piece: str, normalization: Normalization) -> str:
    """One of several pieces of a text; pieces of text8 begin with a space and end without one."""
    text = normalize(piece, normalization)
    return "" if normalization == "text8" and text == " " else text
