"""Text files, which are read once more to draw their splits."""

import hashlib
import http.client
import io
import urllib.request
import zipfile
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import ClassVar

from tarflowlm.data.reading import BLOCK, FIELD, json_texts, kind_of, text_blocks, text_pieces
from tarflowlm.data.source import Source, Text
from tarflowlm.data.splits import FEW_DOCUMENTS, Piece, cut_in_three, fair_shares, place_of_document
from tarflowlm.errors import UserError, first_line
from tarflowlm.files import replacing, sources_dir


class TextFiles(Source):
    """A text file, which is cut in three; or documents: the files of a folder in the order of their
    names, and the lines of .jsonl files.

    `field` holds the texts of .jsonl files; if it begins with a dot, it is the suffix of the files.
    The name of a file or the text of a line is the key of a document.
    """

    def __init__(self, path: Path, field: str = "text") -> None:
        self.path = path.resolve()
        self.field = "text" if field.startswith(".") else field
        more = "" if field == "text" else FIELD + field
        self.name = f"{path}{more}"
        self.identity = f"{self.path}{more}"
        self.suffix = field if field.startswith(".") else ""
        self.has_fields = any(kind_of(file) == ".jsonl" for file in self.files)
        self.has_documents = len(self.files) > 1 or self.has_fields

    def texts(self) -> Iterator[Text]:
        for file in self.files:
            if kind_of(file) == ".jsonl":
                for text in json_texts(file, self.field):
                    yield Text([text], key=text)
            elif file == self.path or file.stat().st_size:
                yield Text(text_blocks(file), key=file.relative_to(self.path).as_posix())

    @cached_property
    def _counted(self) -> tuple[int, set[float]]:
        """The characters of the normalised text, and the places of its documents if they are few.

        UserError if there are none.
        """
        self.progress.stage(f"reading {self.name}, characters")
        total = 0
        places: set[float] = set()
        for text in self.texts():
            size = 0
            for piece in self.normalized(text.blocks):
                size += len(piece)
                self.progress.advance(len(piece))
            if size and len(places) <= FEW_DOCUMENTS:
                places.add(place_of_document(text.key))
            total += size
        if not total:
            what = f"{self.normalization} normalisation leaves nothing of {self.name}"
            remedy = "give a text with more, or another normalisation"
            for kind, _ in self.skipped.most_common(1):
                remedy = f"name the suffix of its texts, say {self.path}{FIELD}{kind}"
            raise UserError(f"{what}: {remedy}")
        return total, places

    @property
    def num_characters(self) -> int:
        return self._counted[0]

    @property
    def shares(self) -> tuple[float, float]:
        total, places = self._counted
        return fair_shares(places, total)

    def pieces(self) -> Iterator[Piece]:
        if self.has_documents:
            return super().pieces()
        blocks = (block for text in self.texts() for block in text.blocks)
        return cut_in_three(self.normalized(blocks), self.num_characters)


class Text8(TextFiles):
    """TEXT8 (Mahoney 2006), the first 10^8 characters of a cleaned English Wikipedia.

    Cut 90M/5M/5M as is customary. Downloaded into the cache. It is in its alphabet already, so no
    normalisation is applied.
    """

    is_fixed = True
    url: ClassVar = "http://mattmahoney.net/dc/text8.zip"
    md5: ClassVar = "3bea1919949baf155f99411df5fada7e"

    def __init__(self) -> None:
        super().__init__(sources_dir() / "text8")
        self.name = self.identity = "text8"

    def obtain(self) -> None:
        if not self.path.is_file():
            self.progress.stage(f"fetching {self.url}, 31 MB")
            self.path.parent.mkdir(parents=True, exist_ok=True)
            try:
                with urllib.request.urlopen(self.url, timeout=30) as response:
                    archive = zipfile.ZipFile(io.BytesIO(response.read()))
                text = archive.read("text8")
            except (OSError, http.client.HTTPException, zipfile.BadZipFile, KeyError) as error:
                what = f"cannot fetch {self.url} ({first_line(error)})"
                remedy = f"put text8, unpacked, into {self.path.parent}"
                raise UserError(f"{what}: {remedy}") from None
            with replacing(self.path) as temporary:
                temporary.write_bytes(text)
        if hashlib.md5(self.path.read_bytes()).hexdigest() != self.md5:
            raise UserError(f"{self.path} is not text8, whose md5 is {self.md5}: remove it")

    def normalized(self, blocks: Iterable[str]) -> Iterator[str]:
        return text_pieces(blocks, BLOCK)
