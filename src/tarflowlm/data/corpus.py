"""Prepared corpora: meta.json, token shards in three splits, and the tokenizer."""

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

import numpy as np

from tarflowlm.data.sources import SOURCE_NAMES
from tarflowlm.data.splits import SPLITS, Split
from tarflowlm.data.tokenizer import Tokenizer, load_tokenizer
from tarflowlm.data.windows import TokenArray
from tarflowlm.errors import UserError, first_line

META = "meta.json"
VERSION = 3
"""The first entry of a plan: changes with the form of corpora, and with how texts are split."""


class Shard(TypedDict):
    """A file of tokens: little-endian, 1 byte for up to 256 symbols, 2 for up to 65,536, else 4."""

    file: str
    tokens: int
    characters: int
    sha256: str


class Meta(TypedDict):
    """The content of meta.json."""

    source: str
    plan: list[object]
    """All that the tokens depend on."""
    tokenizer: str
    """The fingerprint of the tokenizer."""
    tokenizer_config: dict[str, object] | None
    """The configuration it was built from, if it was."""
    splits: dict[Split, list[Shard]]


@dataclass(eq=False)
class Corpus:
    """A prepared corpus: its tokens, memory-mapped, their `tokenizer`, and what meta.json says."""

    path: Path
    meta: Meta
    tokenizer: Tokenizer

    def split(self, name: Split) -> TokenArray:
        """The tokens of split "train", "valid" or "test"."""
        dtype = self.tokenizer.token_dtype
        shards = self.meta["splits"][name]
        return TokenArray([np.memmap(self.path / shard["file"], dtype, "r") for shard in shards])

    def num_tokens(self, name: Split) -> int:
        return sum(shard["tokens"] for shard in self.meta["splits"][name])

    def num_characters(self, name: Split) -> int:
        """The number of characters of the normalised text of a split."""
        return sum(shard["characters"] for shard in self.meta["splits"][name])

    @property
    def fingerprint(self) -> str:
        """sha256 (hex) over the hashes of all shards: equal for equal tokens in equal splits."""
        hashes = [[shard["sha256"] for shard in self.meta["splits"][split]] for split in SPLITS]
        return hashlib.sha256(json.dumps(hashes).encode("ascii")).hexdigest()


def is_prepared(source: str) -> bool:
    """Whether `source` is the directory of a corpus, and not the name of one."""
    return source not in SOURCE_NAMES and os.path.isfile(os.path.join(source, META))


def open_corpus(path: str | os.PathLike[str]) -> Corpus:
    """The corpus in directory `path`. UserError if a file is missing, truncated or foreign."""
    folder = Path(path)
    try:
        meta: Meta = json.loads((folder / META).read_text(encoding="utf-8"))
        if meta["plan"][0] != VERSION:
            raise ValueError(f"version {meta['plan'][0]!r}")
        tokenizer = load_tokenizer(folder)
        if tokenizer.fingerprint != meta["tokenizer"]:
            raise ValueError("tokenizer.json is not the one this corpus was encoded with")
        for split in SPLITS:
            for shard in meta["splits"][split]:
                size = shard["tokens"] * tokenizer.token_dtype.itemsize
                if (folder / shard["file"]).stat().st_size != size:
                    raise ValueError(f"{shard['file']} does not have {size:,} bytes")
    except (OSError, LookupError, TypeError, ValueError) as error:
        what = f"the corpus {folder} cannot be used ({first_line(error)})"
        raise UserError(f"{what}: prepare it again") from None
    return Corpus(folder, meta, tokenizer)
