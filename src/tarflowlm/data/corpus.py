"""A prepared corpus on disk: `meta.json`, hash-checked token shards in three splits, and the tokenizer."""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from tarflowlm.data.shards import TokenArray, map_shard, token_dtype
from tarflowlm.data.stream import SPLITS, Split
from tarflowlm.data.text import sha256_of
from tarflowlm.data.tokenization import TokenizerConfig, build_tokenizer
from tarflowlm.data.tokenizer import Tokenizer, load_tokenizer
from tarflowlm.errors import UserError

META = "meta.json"
FORMAT = "tarflowlm-corpus"
VERSION = 1


@dataclass(frozen=True)
class FileRecord:
    """A source file as it was when the corpus was prepared."""

    path: str
    size: int
    """Bytes."""
    mtime_ns: int
    """Time of the last change, nanoseconds since 1970."""
    sha256: str

    @classmethod
    def of(cls, path: Path) -> "FileRecord":
        """The record of the file `path` as it is now. UserError if it cannot be read."""
        try:
            status = path.stat()
            return cls(str(path), status.st_size, status.st_mtime_ns, sha256_of(path))
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror or error}") from None

    def is_changed(self, path: Path) -> bool:
        """Whether the file `path` differs. Equal size and time count as equal; otherwise the content decides."""
        status = path.stat()
        if (status.st_size, status.st_mtime_ns) == (self.size, self.mtime_ns):
            return False
        return status.st_size != self.size or sha256_of(path) != self.sha256


@dataclass(frozen=True)
class ShardRecord:
    """One shard: its file in the corpus directory, and its tokens."""

    file: str
    tokens: int
    sha256: str
    """Of the file."""


@dataclass(frozen=True)
class SplitRecord:
    """Size and shards of a split."""

    tokens: int
    characters: int
    shards: tuple[ShardRecord, ...]


@dataclass(frozen=True)
class CorpusMeta:
    """Content of `meta.json`: what the corpus was made from, with which tokenizer, and which files hold it."""

    source: str
    """Name of the corpus, or the path of the file as it was given."""
    identity: str
    """Name, or absolute path: equal for the same source however it was given."""
    files: tuple[FileRecord, ...]
    tokenizer_fingerprint: str
    tokenizer_config: dict[str, Any] | None
    """Fields of the TokenizerConfig that asked for it; null if a finished tokenizer was given."""
    vocab_size: int
    splits: dict[Split, SplitRecord]

    def to_json(self) -> str:
        """Content of `meta.json`; `read` reads it back."""
        return json.dumps({"format": FORMAT, "version": VERSION, **asdict(self)}, ensure_ascii=False, indent=1) + "\n"

    @classmethod
    def read(cls, path: Path) -> "CorpusMeta":
        """`meta.json` at `path`. UserError if it is missing, foreign, damaged or of another version."""
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise UserError(f"{path.parent} is no prepared corpus: it has no {path.name}") from None
        except (OSError, ValueError, RecursionError) as error:
            raise UserError(f"cannot read {path} ({error}): prepare the corpus again") from None
        if not isinstance(document, dict) or document.get("format") != FORMAT:
            raise UserError(f'{path} is not of a tarflowlm corpus (no "format": "{FORMAT}" in it)')
        if document.get("version") != VERSION:
            raise UserError(
                f"{path} has format version {document.get('version')!r}, this program reads {VERSION}: "
                "prepare the corpus again"
            )
        try:
            return cls._from_document(document)
        except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
            raise UserError(f"{path} is damaged ({error!r}): prepare the corpus again") from None

    @classmethod
    def _from_document(cls, document: dict[str, Any]) -> "CorpusMeta":
        splits: dict[Split, SplitRecord] = {}
        for split in SPLITS:
            record = document["splits"][split]
            shards = tuple(ShardRecord(**shard) for shard in record["shards"])
            sizes = [shard.tokens for shard in shards]
            if sum(sizes) != record["tokens"] or len({*sizes[:-1]}) > 1 or sizes[-1] > sizes[0]:
                raise ValueError(f"the shards of split {split} do not add up")
            splits[split] = SplitRecord(int(record["tokens"]), int(record["characters"]), shards)
        return cls(
            source=str(document["source"]),
            identity=str(document["identity"]),
            files=tuple(FileRecord(**record) for record in document["files"]),
            tokenizer_fingerprint=str(document["tokenizer_fingerprint"]),
            tokenizer_config=document["tokenizer_config"],
            vocab_size=int(document["vocab_size"]),
            splits=splits,
        )

    def changed_file(self, current: Sequence[Path] | None = None) -> Path | None:
        """The first source file that has changed since, or None.

        `current` are the files that the source consists of now, matched by name, so that a reinstalled package counts
        as unchanged. Without it the recorded paths are checked, and a missing file counts as unchanged: the shards do
        not need it.
        """
        if current is None:
            pairs = [(record, Path(record.path)) for record in self.files if Path(record.path).is_file()]
        else:
            by_name = {path.name: path for path in current}
            names = {Path(record.path).name for record in self.files}
            if added := sorted(by_name.keys() - names):
                return by_name[added[0]]
            if removed := sorted(names - by_name.keys()):
                return Path(removed[0])
            pairs = [(record, by_name[Path(record.path).name]) for record in self.files]
        return next((path for record, path in pairs if record.is_changed(path)), None)


class Corpus:
    """A prepared corpus on disk. Its tokens are memory-mapped and read only where they are used."""

    def __init__(self, path: Path, meta: CorpusMeta, tokenizer: Tokenizer) -> None:
        self.path = path
        self.meta = meta
        self.tokenizer = tokenizer
        """The tokenizer it was encoded with, normalisation included."""

    def split(self, name: str) -> TokenArray:
        """The tokens of split "train", "valid" or "test". UserError for any other name."""
        return self._tokens[_validated_split(name)]

    def num_tokens(self, name: str) -> int:
        """Number of tokens of a split."""
        return self.meta.splits[_validated_split(name)].tokens

    def num_characters(self, name: str) -> int:
        """Number of characters of the normalised text of a split."""
        return self.meta.splits[_validated_split(name)].characters

    @property
    def fingerprint(self) -> str:
        """sha256 (hex) over the hashes of all shards: equal for equal tokens in equal splits."""
        hashes = [[shard.sha256 for shard in self.meta.splits[split].shards] for split in SPLITS]
        return hashlib.sha256(json.dumps(hashes).encode("ascii")).hexdigest()

    def check_source(self) -> None:
        """UserError if a source file has changed since. A missing one is fine: the shards do not need it."""
        changed = self.meta.changed_file()
        if changed is not None:
            raise UserError(
                f"{changed} changed since the corpus {self.path} was prepared from it: delete {self.path} "
                "and prepare it again, or restore the file"
            )

    def verify(self) -> None:
        """Read all shards. UserError for one that differs from what was written (`open_corpus` checks only sizes)."""
        for record in self.meta.splits.values():
            for shard in record.shards:
                if sha256_of(self.path / shard.file) != shard.sha256:
                    raise UserError(f"{self.path / shard.file} is damaged: prepare the corpus again")

    @cached_property
    def _tokens(self) -> dict[Split, TokenArray]:
        dtype = token_dtype(self.meta.vocab_size)
        return {
            split: TokenArray([map_shard(self.path / shard.file, dtype) for shard in self.meta.splits[split].shards])
            for split in SPLITS
        }

    def __repr__(self) -> str:
        sizes = ", ".join(f"{split} {self.num_tokens(split):,}" for split in SPLITS)
        return f"Corpus({str(self.path)!r}: {self.meta.source}, tokens: {sizes})"


def open_corpus(path: str | os.PathLike[str]) -> Corpus:
    """The corpus prepared in directory `path`.

    UserError if it holds none, or if a file in it is missing, truncated or foreign.
    """
    folder = Path(path)
    meta = CorpusMeta.read(folder / META)
    tokenizer = load_tokenizer(folder)
    if tokenizer.fingerprint != meta.tokenizer_fingerprint or tokenizer.vocab_size != meta.vocab_size:
        raise UserError(f"{folder / 'tokenizer.json'} is not the one this corpus was encoded with: prepare it again")
    itemsize = token_dtype(meta.vocab_size).itemsize
    for record in meta.splits.values():
        for shard in record.shards:
            file = folder / shard.file
            if not file.is_file():
                raise UserError(f"{file} is missing: prepare the corpus again")
            if file.stat().st_size != shard.tokens * itemsize:
                raise UserError(
                    f"{file} has {file.stat().st_size} bytes where {shard.tokens * itemsize} belong: "
                    "prepare the corpus again"
                )
    return Corpus(folder, meta, tokenizer)


def check_tokenizer(corpus: Corpus, wanted: TokenizerConfig | Tokenizer) -> None:
    """UserError if `corpus` was not encoded with the `wanted` tokenizer."""
    if isinstance(wanted, Tokenizer):
        matches = wanted.fingerprint == corpus.tokenizer.fingerprint
    elif corpus.meta.tokenizer_config is not None and (wanted.needs_training or wanted.source):
        # equal requests match without training again or asking the hub again
        matches = corpus.meta.tokenizer_config == asdict(wanted)
        if not matches and wanted.source:
            matches = build_tokenizer(wanted).fingerprint == corpus.tokenizer.fingerprint
    elif wanted.needs_training:
        ours = corpus.tokenizer
        matches = (ours.kind, ours.vocab_size, ours.normalization) == ("bpe", wanted.vocab_size, wanted.normalize)
    else:
        matches = build_tokenizer(wanted).fingerprint == corpus.tokenizer.fingerprint
    if not matches:
        raise UserError(
            f"{corpus.path} was prepared with {corpus.tokenizer!r}, not with {_describe(wanted)}: "
            "prepare another one, or leave the tokenizer to the directory"
        )


def _validated_split(name: str) -> Split:
    for split in SPLITS:
        if split == name:
            return split
    raise UserError(f"split {name!r} is not one of {', '.join(SPLITS)}")


def _describe(wanted: TokenizerConfig | Tokenizer) -> str:
    if isinstance(wanted, Tokenizer):
        return repr(wanted)
    size = f", vocab_size={wanted.vocab_size}" if wanted.vocab_size else ""
    source = f", source={wanted.source!r}" if wanted.source else ""
    return f"kind={wanted.kind!r}{size}{source}, normalize={wanted.normalize!r}"
