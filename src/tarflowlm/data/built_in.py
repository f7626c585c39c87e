"""The texts that the package ships."""

from abc import abstractmethod
from collections.abc import Iterator
from pathlib import Path

from tarflowlm.data.library import SEPARATOR
from tarflowlm.data.reading import read_text
from tarflowlm.data.source import Source, Text
from tarflowlm.data.splits import SPLITS


class BuiltIn(Source):
    """Documents in English, in the folder of their `name`, whose `README.md` tells what they are.

    A line `<|endoftext|>` stands between the documents of a file; a paragraph is a line.
    """

    separator = SEPARATOR
    suffix = ".txt.xz"

    def __init__(self) -> None:
        self.identity = self.name
        self.path = Path(__file__).parent / self.name

    def state(self) -> list[list[str | int]]:
        # an installation gives files new times
        return [[file.name, file.stat().st_size] for file in self.files]

    def texts(self) -> Iterator[Text]:
        for file in self.files:
            whole = read_text(file).removesuffix(f"{SEPARATOR}\n").removesuffix("\n")
            for document in whole.split(f"\n{SEPARATOR}\n"):
                yield self.placed(document, file)

    @abstractmethod
    def placed(self, document: str, file: Path) -> Text:
        """A document of a file, with its split or the key that draws it."""


class Tales(BuiltIn):
    """Fairy tales and children's stories in English, in the public domain.

    2,783 documents, 25 million characters, each a tale, a short story or a chapter, whose first
    line is its title. The hash of that line gives the split, so one tale in several translations
    under one title is in one split. `data/tales/README.md` tells how they were made, and
    `data/tales/books.tsv` names every book.
    """

    name = "tales"

    def placed(self, document: str, file: Path) -> Text:
        return Text([document], key=document.partition("\n")[0])


class Stories(BuiltIn):
    """Short stories in the words of a four-year-old: about 2 % of TinyStories (Eldan and Li 2023),
    under the licence CDLA-Sharing-1.0.

    48,731 documents, 39 million characters, in one file for each split: the stories of validation
    and test come from the validation part of TinyStories. A figure on them is not one on
    TinyStories.
    """

    name = "stories"

    def placed(self, document: str, file: Path) -> Text:
        split = next(one for one in SPLITS if file.name == f"{self.name}_{one}{self.suffix}")
        return Text([document], split=split)
