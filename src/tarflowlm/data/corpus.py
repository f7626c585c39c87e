"""Prepared corpora: a text as hash-checked token shards, split into train, valid and test."""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tarflowlm.data.config import TokenizerConfig, build_tokenizer
from tarflowlm.data.encode import encode_in_order
from tarflowlm.data.meta import CorpusMeta
from tarflowlm.data.read import sha256_of
from tarflowlm.data.registry import SOURCE_NAMES, resolve_source
from tarflowlm.data.shards import TokenArray, map_shard, token_dtype
from tarflowlm.data.sources import SPLITS, CorpusProgress, Notice, Split
from tarflowlm.data.tokenizer import Tokenizer, load_tokenizer
from tarflowlm.errors import UserError


class Corpus:
    """A prepared corpus on disk; tokens are memory-mapped, nothing is read before it is used."""

    def __init__(self, path: Path, meta: CorpusMeta, tokenizer: Tokenizer) -> None:
        self.path = path
        self.meta = meta
        self.tokenizer = tokenizer
        """What it was encoded with, normalisation included."""

    def split(self, name: str) -> TokenArray:
        """The tokens of split "train", "valid" or "test"."""
        return self._tokens[self._checked(name)]

    def num_tokens(self, name: str) -> int:
        """Tokens of a split."""
        return self.meta.splits[self._checked(name)].tokens

    def num_characters(self, name: str) -> int:
        """Characters of the normalised text of a split."""
        return self.meta.splits[self._checked(name)].characters

    @property
    def fingerprint(self) -> str:
        """sha256 (hex) over those of all shards: equal for equal tokens in equal splits."""
        hashes = [[shard.sha256 for shard in self.meta.splits[split].shards] for split in SPLITS]
        return hashlib.sha256(json.dumps(hashes).encode("ascii")).hexdigest()

    def check_source(self) -> None:
        """UserError where a source file changed since; one that is gone is fine, the shards stand alone."""
        changed = self.meta.changed_file()
        if changed is not None:
            raise UserError(
                f"{changed} changed since the corpus {self.path} was prepared from it: delete {self.path} "
                "and prepare it again, or restore the file"
            )

    def verify(self) -> None:
        """Reads all shards; UserError for one that is not as it was written (`open_corpus` checks sizes)."""
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

    def _checked(self, name: str) -> Split:
        for split in SPLITS:
            if split == name:
                return split
        raise UserError(f"split {name!r} is not one of {', '.join(SPLITS)}")

    def __repr__(self) -> str:
        sizes = ", ".join(f"{split} {self.num_tokens(split):,}" for split in SPLITS)
        return f"Corpus({str(self.path)!r}: {self.meta.source}, tokens: {sizes})"


def open_corpus(path: str | os.PathLike[str]) -> Corpus:
    """The corpus prepared in directory `path`.

    UserError for a directory that holds none, and for a missing, truncated or foreign file in it.
    """
    folder = Path(path)
    meta = CorpusMeta.read(folder / "meta.json")
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


def encode_text_source(
    source: str,
    tokenizer: Tokenizer,
    splits: Sequence[str] = SPLITS,
    *,
    progress: CorpusProgress | None = None,
    notice: Notice | None = None,
) -> dict[str, TokenArray]:
    """Tokens of another text under a given tokenizer (say, a checkpoint's), which also normalises it.

    `source`: a corpus name, a text file, or a directory that was prepared with this very tokenizer. `splits`
    may name "train", "valid", "test" and "all" (the whole text, in that order). A split of a short text may
    be empty. UserError for unknown characters, a directory of another tokenizer, and every problem with the
    source.
    """
    for name in splits:
        if name not in (*SPLITS, "all"):
            raise UserError(f"split {name!r} is not one of {', '.join(SPLITS)}, all")
    if is_prepared(source):
        corpus = open_corpus(source)
        check_tokenizer(corpus, tokenizer)
        whole = [np.asarray(corpus.split(split)) for split in SPLITS] if "all" in splits else []
        return {n: TokenArray.of(np.concatenate(whole)) if n == "all" else corpus.split(n) for n in splits}
    found = resolve_source(source)
    found.obtain(progress, notice)
    dtype = token_dtype(tokenizer.vocab_size)
    parts: dict[str, list[npt.NDArray[Any]]] = {split: [np.zeros(0, dtype)] for split in SPLITS}
    batches = found.stream(tokenizer.normalization).batches
    wanted = (batch for batch in batches if "all" in splits or batch.split in splits)
    for batch, tokens in encode_in_order(wanted, tokenizer, dtype):
        parts[batch.split].append(tokens)
    parts["all"] = [part for split in SPLITS for part in parts[split]]
    return {name: TokenArray.of(np.concatenate(parts[name])) for name in splits}


def check_tokenizer(corpus: Corpus, wanted: TokenizerConfig | Tokenizer) -> None:
    """UserError where `corpus` was not encoded with the tokenizer that is `wanted`."""
    if isinstance(wanted, Tokenizer):
        matches = wanted.fingerprint == corpus.tokenizer.fingerprint
    elif corpus.meta.tokenizer_config is not None and (wanted.needs_training or wanted.source):
        # equal requests match without training again or asking the hub again
        matches = corpus.meta.tokenizer_config == asdict(wanted)
        if not matches and wanted.source:
            matches = build_tokenizer(wanted).fingerprint == corpus.tokenizer.fingerprint
    elif wanted.needs_training:
        ours = corpus.tokenizer
        matches = (ours.kind, ours.vocab_size, ours.normalization) == (
            "bpe",
            wanted.vocab_size,
            wanted.normalize,
        )
    else:
        matches = build_tokenizer(wanted).fingerprint == corpus.tokenizer.fingerprint
    if not matches:
        raise UserError(
            f"{corpus.path} was prepared with {corpus.tokenizer!r}, not with {_describe(wanted)}: "
            "prepare another one, or leave the tokenizer to the directory"
        )


def is_prepared(source: str) -> bool:
    """Whether `source` is a directory that holds a prepared corpus, and not the name of a corpus."""
    return source not in SOURCE_NAMES and os.path.isfile(os.path.join(source, "meta.json"))


def is_empty_dir(path: Path) -> bool:
    """Whether `path` is a directory without anything in it."""
    return path.is_dir() and not any(path.iterdir())


def _describe(wanted: TokenizerConfig | Tokenizer) -> str:
    if isinstance(wanted, Tokenizer):
        return repr(wanted)
    size = f", vocab_size={wanted.vocab_size}" if wanted.vocab_size else ""
    source = f", source={wanted.source!r}" if wanted.source else ""
    return f"kind={wanted.kind!r}{size}{source}, normalize={wanted.normalize!r}"
