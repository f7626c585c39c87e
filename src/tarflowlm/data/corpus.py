"""Prepared corpora: a text as hash-checked token shards, split into train, valid and test."""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path

import numpy as np

from tarflowlm.data.config import TokenizerConfig, build_tokenizer
from tarflowlm.data.meta import CorpusMeta, FileRecord, ShardRecord, SplitRecord
from tarflowlm.data.pieces import text_pieces
from tarflowlm.data.read import sha256_of
from tarflowlm.data.shards import ShardWriter, TokenArray, map_shard, token_dtype
from tarflowlm.data.sources import SOURCE_NAMES, SPLITS, Source, Split, Texts, resolve_source
from tarflowlm.data.tokenizer import Tokenizer, load_tokenizer
from tarflowlm.errors import UserError

Progress = Callable[[str, int, int], None]
"""Called with what is being done ("bpe", "train", "valid", "test"), characters done, characters in all."""

SHARD_TOKENS = 1 << 26
_PIECE = 1 << 22  # characters encoded at once: int64 ids of a whole corpus would not fit


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


def prepare_corpus(
    source: str,
    tokenizer: TokenizerConfig | Tokenizer,
    out: str | os.PathLike[str],
    *,
    progress: Progress | None = None,
    shard_tokens: int = SHARD_TOKENS,
) -> Corpus:
    """Reads, normalises, splits and encodes `source` (a corpus name or a text file) into the directory `out`.

    `out` appears complete or not at all. If it already holds this very corpus it is opened as it is;
    UserError if it holds anything else, and for every problem with the source, its characters or the
    tokenizer.
    """
    target = Path(out)
    found = resolve_source(source)
    if target.exists() and not is_empty_dir(target):
        corpus = open_corpus(target) if (target / "meta.json").is_file() else None
        if corpus is None or corpus.meta.identity != found.identity:
            raise UserError(f"{target} already exists and holds something else: remove it or choose another --out")
        if changed := corpus.meta.changed_file(found.files):
            raise UserError(f"{target} holds this corpus as it was before {changed} changed: remove {target} first")
        check_tokenizer(corpus, tokenizer)
        return corpus
    return write_corpus(found, tokenizer, target, progress=progress, shard_tokens=shard_tokens)


def write_corpus(
    source: Source,
    tokenizer: TokenizerConfig | Tokenizer,
    target: Path,
    *,
    replace: bool = False,
    progress: Progress | None = None,
    shard_tokens: int = SHARD_TOKENS,
) -> Corpus:
    """As `prepare_corpus`, for a resolved source; `replace` puts it in the place of what `target` holds."""
    files = tuple(FileRecord.of(path) for path in source.files)
    texts = source.read(tokenizer.normalization if isinstance(tokenizer, Tokenizer) else tokenizer.normalize)
    for split, text in texts.items():
        if not text.strip():
            raise UserError(f"{source.name} is too short: its {split} split holds no text")
    built = tokenizer if isinstance(tokenizer, Tokenizer) else _build(tokenizer, texts["train"], progress)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    except OSError as error:
        raise UserError(f"cannot write to {target.parent}: {error.strerror or error}") from None
    try:
        splits = _encode_splits(texts, built, temporary, progress, shard_tokens)
        meta = CorpusMeta(
            source=source.name,
            identity=source.identity,
            files=files,
            tokenizer_fingerprint=built.fingerprint,
            tokenizer_config=None if isinstance(tokenizer, Tokenizer) else asdict(tokenizer),
            vocab_size=built.vocab_size,
            splits=splits,
        )
        built.save(temporary / "tokenizer.json")
        (temporary / "meta.json").write_text(meta.to_json(), encoding="utf-8")
        temporary.chmod(0o755)  # mkdtemp makes directories that only their owner can enter
        _install(temporary, target, replace)
    except OSError as error:
        raise UserError(f"cannot write {target}: {error.strerror or error}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return open_corpus(target)


def encode_text_source(source: str, tokenizer: Tokenizer, splits: Sequence[str] = SPLITS) -> dict[str, TokenArray]:
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
    texts = resolve_source(source).read(tokenizer.normalization)
    result = {}
    for name in splits:
        pieces = (piece for split in SPLITS if name in (split, "all") for piece in text_pieces(texts[split], _PIECE))
        dtype = token_dtype(tokenizer.vocab_size)
        parts = [tokenizer.encode(piece).astype(dtype) for piece in pieces]
        result[name] = TokenArray.of(np.concatenate(parts) if parts else np.zeros(0, dtype))
    return result


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


def _build(config: TokenizerConfig, text: str, progress: Progress | None) -> Tokenizer:
    def pieces() -> Iterator[str]:
        done = 0
        for piece in text_pieces(text, _PIECE):
            yield piece
            done += len(piece)
            if progress is not None:
                progress("bpe", done, len(text))

    return build_tokenizer(config, pieces())


def _encode_splits(
    texts: Texts, tokenizer: Tokenizer, folder: Path, progress: Progress | None, shard_tokens: int
) -> dict[Split, SplitRecord]:
    records: dict[Split, SplitRecord] = {}
    for split, text in texts.items():
        done = 0
        with ShardWriter(folder, split, token_dtype(tokenizer.vocab_size), shard_tokens) as writer:
            for piece in text_pieces(text, _PIECE):
                writer.write(tokenizer.encode(piece))
                done += len(piece)
                if progress is not None:
                    progress(split, done, len(text))
        shards = tuple(ShardRecord(**shard) for shard in writer.shards)
        records[split] = SplitRecord(sum(shard.tokens for shard in shards), len(text), shards)
    return records


def _install(temporary: Path, target: Path, replace: bool) -> None:
    """Renames `temporary` to `target`. Where another process was faster, what it wrote stays."""
    if replace and target.exists():
        # renamed away before it is deleted, so that `target` is never there in part
        retired = Path(tempfile.mkdtemp(prefix=f".{target.name}.old.", dir=target.parent))
        try:
            os.rename(target, retired / target.name)
        finally:
            shutil.rmtree(retired, ignore_errors=True)
    try:
        os.rename(temporary, target)
    except OSError:
        if not (target / "meta.json").is_file():
            raise
