"""A prepared corpus on disk: `meta.json`, hash-checked token shards in three splits, and the tokenizer."""

import hashlib
import json
import os
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tarflowlm.data.sources import SPLITS
from tarflowlm.data.text import sha256_of
from tarflowlm.data.tokenizer import Tokenizer, load_tokenizer
from tarflowlm.data.windows import TokenArray
from tarflowlm.errors import UserError, first_line

META = "meta.json"
FORMAT, VERSION = "tarflowlm-corpus", 1


class Corpus:
    """A prepared corpus on disk: the content `meta` of meta.json, the `tokenizer` it was encoded with, and tokens.

    The tokens are memory-mapped and read only where they are used.
    """

    def __init__(self, path: Path, meta: dict[str, Any], tokenizer: Tokenizer) -> None:
        self.path, self.meta, self.tokenizer = path, meta, tokenizer

    def split(self, name: str) -> TokenArray:
        """The tokens of split "train", "valid" or "test"."""
        return self._tokens[name]

    def num_tokens(self, name: str) -> int:
        """Number of tokens of a split."""
        return int(self.meta["splits"][name]["tokens"])

    def num_characters(self, name: str) -> int:
        """Number of characters of the normalised text of a split."""
        return int(self.meta["splits"][name]["characters"])

    @property
    def fingerprint(self) -> str:
        """sha256 (hex) over the hashes of all shards: equal for equal tokens in equal splits."""
        hashes = [[shard["sha256"] for shard in self.meta["splits"][split]["shards"]] for split in SPLITS]
        return hashlib.sha256(json.dumps(hashes).encode("ascii")).hexdigest()

    def changed_file(self, current: Sequence[Path] | None = None) -> Path | None:
        """The first source file that has changed since, or None. Equal size and time count as unchanged.

        `current` are the files of the source now, matched by name since a package may be reinstalled. Without it the
        recorded paths are checked, and a missing file counts as unchanged: the shards do not need it.
        """
        recorded = {Path(record["path"]).name: record for record in self.meta["files"]}
        if current is None:
            current = [path for record in recorded.values() if (path := Path(record["path"])).is_file()]
        elif different := recorded.keys() ^ {path.name for path in current}:
            return Path(min(different))
        for path in current:
            record, now = recorded[path.name], path.stat()
            if (now.st_size, now.st_mtime_ns) != (record["size"], record["mtime_ns"]) and (
                now.st_size != record["size"] or sha256_of(path) != record["sha256"]
            ):
                return path
        return None

    def verify(self) -> None:
        """UserError for a shard that differs from what was written; `open_corpus` checks only their sizes."""
        for split in SPLITS:
            for shard in self.meta["splits"][split]["shards"]:
                if sha256_of(self.path / shard["file"]) != shard["sha256"]:
                    raise UserError(f"{self.path / shard['file']} is damaged: prepare the corpus again")

    @cached_property
    def _tokens(self) -> dict[str, TokenArray]:
        dtype = token_dtype(self.meta["vocab_size"])

        def mapped(shard: dict[str, Any]) -> npt.NDArray[Any]:
            # an empty file cannot be mapped
            return np.memmap(self.path / shard["file"], dtype, "r") if shard["tokens"] else np.zeros(0, dtype)

        return {split: TokenArray([mapped(s) for s in self.meta["splits"][split]["shards"]]) for split in SPLITS}

    def __repr__(self) -> str:
        sizes = ", ".join(f"{split} {self.num_tokens(split):,}" for split in SPLITS)
        return f"Corpus({str(self.path)!r}: {self.meta['source']}, tokens: {sizes})"


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """The smallest little-endian unsigned type that holds `vocab_size` ids."""
    if vocab_size <= 1 << 8:
        return np.dtype("u1")
    return np.dtype("<u2") if vocab_size <= 1 << 16 else np.dtype("<u4")


def open_corpus(path: str | os.PathLike[str]) -> Corpus:
    """The corpus prepared in directory `path`. UserError if a file is missing, truncated or foreign."""
    folder = Path(path)
    try:
        meta = json.loads((folder / META).read_text(encoding="utf-8"))
        if (meta["format"], meta["version"]) != (FORMAT, VERSION):
            raise ValueError(f"format {meta['format']!r}, version {meta['version']!r}")
        corpus = Corpus(folder, meta, load_tokenizer(folder))
        if corpus.tokenizer.fingerprint != meta["tokenizer_fingerprint"]:
            raise UserError("tokenizer.json is not the one this corpus was encoded with")
        for split in SPLITS:
            for shard in meta["splits"][split]["shards"]:
                size = shard["tokens"] * token_dtype(meta["vocab_size"]).itemsize
                if (folder / shard["file"]).stat().st_size != size:
                    raise UserError(f"{shard['file']} does not have {size:,} bytes")
    except FileNotFoundError as error:
        raise UserError(f"{folder} is not a complete corpus, {error.filename} is missing: prepare it again") from None
    except (OSError, LookupError, TypeError, ValueError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else first_line(error)
        raise UserError(f"the corpus {folder} cannot be used ({reason}): prepare it again") from None
    return corpus
