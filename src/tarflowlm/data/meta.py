"""`meta.json` of a prepared corpus: what it was made from, with what, and which files hold it."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tarflowlm.data.read import sha256_of
from tarflowlm.data.sources import SPLITS, Split
from tarflowlm.errors import UserError

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
        try:
            status = path.stat()
            return cls(str(path), status.st_size, status.st_mtime_ns, sha256_of(path))
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror or error}") from None

    def is_changed(self, path: Path) -> bool:
        """Whether the file `path` differs: equal size and time count as equal, else the content decides."""
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
    """Content of `meta.json`."""

    source: str
    """Name of the corpus, or the path of the file as it was given."""
    identity: str
    """Name, or absolute path: equal for the same source however it was given."""
    files: tuple[FileRecord, ...]
    tokenizer_fingerprint: str
    tokenizer_config: dict[str, Any] | None
    """Fields of the TokenizerConfig that asked for it; null where a finished tokenizer was given."""
    vocab_size: int
    splits: dict[Split, SplitRecord]

    def to_json(self) -> str:
        return json.dumps({"format": FORMAT, "version": VERSION, **asdict(self)}, ensure_ascii=False, indent=1) + "\n"

    @classmethod
    def read(cls, path: Path) -> "CorpusMeta":
        """`meta.json` at `path`. UserError where it is missing, foreign, of another version or damaged."""
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
        """The first source file that changed since, or None.

        `current` are the files the source consists of now (matched by name, so that a reinstalled package
        counts as the same); without it the recorded paths are looked at, and a file that is gone counts as
        unchanged: the shards stand alone.
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
