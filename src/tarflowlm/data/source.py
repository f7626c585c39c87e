"""A source of text: what every text is, whatever holds it.

Its documents come from `texts` in one way, as they are; `pieces` has them normalised, each piece
with its split, and `data.encode` makes tokens of those.
"""

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from tarflowlm.config import Normalization
from tarflowlm.data.normalize import normalize_text8, unwrapped
from tarflowlm.data.reading import BLOCK, kind_of, plain_line_ends, text_pieces
from tarflowlm.data.splits import Piece, Split, split_of_document
from tarflowlm.errors import SILENT, Progress


class Text(NamedTuple):
    """A document of a source, or all of a source without documents; not yet normalised."""

    blocks: Iterable[str]
    key: str = ""
    """The hash of it draws the split."""
    split: Split | None = None
    """The split of a text that comes with one."""


def is_hidden(file: Path, folder: Path) -> bool:
    """Whether a file, or a folder between it and this one, is hidden."""
    return "." in {part[0] for part in file.relative_to(folder).parts}


class Source(ABC):
    """A text. Equal settings give the same pieces every time."""

    name: str
    """The name that the user gave."""
    identity: str
    """A registered name, a set of the hub, or an absolute path, with #FIELD where it names one."""
    path: Path
    """A file, or a folder of files."""
    suffix: str = ""
    """The suffix of the files at any depth of the folder; if empty, only its own texts are read."""
    is_fixed: bool = False
    """Whether the name alone tells the text. Its files may not be on this machine yet."""
    normalization: Normalization = "none"
    unwrap: bool = False
    """Whether the lines of paragraphs are joined."""
    progress: Progress = SILENT
    has_documents: bool = True
    """Whether it holds documents; False: one text that may be cut anywhere."""
    separator: str = "\n"
    """Follows a document that is not normalised where no token can end it."""

    @property
    def files(self) -> tuple[Path, ...]:
        """The files that are on this machine, sorted by name."""
        if not (path := self.path).is_dir():
            return (path,) if path.is_file() else ()
        if self.suffix:
            below = path.rglob(f"*{self.suffix}")
            found = [file for file in below if not is_hidden(file, path)]
        else:
            found = [file for file in path.glob("[!.]*") if kind_of(file) in (".txt", ".jsonl")]
        return tuple(sorted(filter(Path.is_file, found)))

    @property
    def skipped(self) -> Counter[str]:
        """The suffixes of other files below its folder, which are not read; hidden ones are left
        out.
        """
        if not self.path.is_dir():
            return Counter()
        read = set(self.files)
        every = (file for file in self.path.rglob("?*.?*") if file.is_file() and file not in read)
        return Counter(file.suffix for file in every if not is_hidden(file, self.path))

    def state(self) -> list[list[str | int]]:
        """Sizes and times that tell a changed text from this one."""
        files = () if self.is_fixed else self.files
        return [[f.name, f.stat().st_size, f.stat().st_mtime_ns] for f in files]

    def obtain(self) -> None:  # noqa: B027
        """Download and check the files that `texts` reads."""

    @abstractmethod
    def texts(self) -> Iterator[Text]:
        """All of its texts in order. Call `obtain` first."""

    @property
    def shares(self) -> tuple[float, float]:
        """Cumulative percentages of train and valid among the texts whose keys draw the split."""
        return 90.0, 95.0

    @property
    def num_characters(self) -> int | None:
        """The length of the normalised text; None if only encoding it can tell."""
        return None

    def pieces(self) -> Iterator[Piece]:
        """The normalised text."""
        shares = self.shares
        for text in self.texts():
            split = text.split or split_of_document(text.key, shares)
            last = ""
            for piece in filter(None, self.normalized(text.blocks)):
                if last:
                    yield Piece(split, last)
                last = piece
            if last:
                yield Piece(split, last, ends=True)

    def normalized(self, blocks: Iterable[str]) -> Iterator[str]:
        """Pieces of a document; text8 may leave some of them empty.

        In text8 they begin with a space and end without one.
        """
        if self.unwrap:
            blocks = [unwrapped("".join(blocks))]
        for piece in text_pieces(blocks, BLOCK):
            yield normalize_text8(piece).rstrip() if self.normalization == "text8" else piece


class GivenTexts(Source):
    """Texts in memory. They are documents if there are several, and have no splits."""

    name = identity = "texts"
    files = ()

    def __init__(self, given: Sequence[str], normalization: Normalization) -> None:
        self.given = given
        self.normalization = normalization
        self.has_documents = len(given) > 1

    def texts(self) -> Iterator[Text]:
        for text in self.given:
            yield Text([plain_line_ends(text)], split="test")
