"""Preparing corpora: a text is streamed, normalised, split, encoded, and written as token shards.
Until it is complete, a corpus is in `.<name>.partial` beside its directory, where `resume.npz`
holds the source's position behind the last finished shard and the tokens since then.
"""

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tarflowlm.config import TokenizerConfig
from tarflowlm.data.bpe import build_tokenizer
from tarflowlm.data.corpus import (
    FORMAT,
    META,
    VERSION,
    Corpus,
    TokenArray,
    open_corpus,
    token_dtype,
)
from tarflowlm.data.sources import (
    SOURCE_NAMES,
    SPLITS,
    Source,
    Split,
    TextFile,
    resolve_source,
)
from tarflowlm.data.tokenizer import Tokenizer, load_tokenizer
from tarflowlm.errors import UserError
from tarflowlm.files import cache_root, remove_leftovers, replacing, sha256_of, write_json
from tarflowlm.locks import waiting_lock
from tarflowlm.progress import SILENT, Progress

RESUME = "resume.npz"
SHARD_TOKENS = 1 << 26
BPE_CHARACTERS = (
    1 << 27
)  # of the training split, at most, for training BPE: the words it counts need memory

log = logging.getLogger("tarflowlm")


def cached_corpus(
    source: str,
    tokenizer: TokenizerConfig | Tokenizer | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    *,
    progress: Progress = SILENT,
    may_download: bool = True,
) -> Corpus:
    """`source` prepared for `tokenizer`: opened from the cache, or prepared now and kept there.

    `source`: a corpus name, a text file, or a prepared directory, which is opened where it is
    (UserError if its source file changed or its tokenizer is another). `tokenizer`: None means that
    of a prepared directory, else the default. `cache_dir`: None means $TARFLOWLM_CACHE or
    ~/.cache/tarflowlm. An entry that is damaged, or whose source changed, is prepared again with a
    warning. Without `may_download`, UserError for a text that would be.
    """
    if _is_prepared(source):
        corpus = open_corpus(source)
        if tokenizer is not None:
            _check_tokenizer(corpus, tokenizer)
        if changed := corpus.changed_file():
            raise UserError(
                f"{changed} changed since {source} was prepared: delete {source} and prepare it again"
            )
        return corpus
    found, wanted = resolve_source(source), tokenizer or TokenizerConfig()
    root = Path(cache_dir) if cache_dir is not None else cache_root()
    key = json.dumps([VERSION, found.identity, _key(_built(wanted))], sort_keys=True)
    target = (
        root
        / "corpora"
        / f"{Path(found.identity).name}-{hashlib.sha256(key.encode()).hexdigest()[:16]}"
    )
    usable = _usable(target, found)[0]
    if usable is None and not may_download and (found.files is None or found.is_large):
        usual, asked = (
            asdict(TokenizerConfig()),
            asdict(wanted) if isinstance(wanted, TokenizerConfig) else {},
        )
        options = "".join(
            f" --{name.replace('_', '-')} {x}" for name, x in asked.items() if x != usual[name]
        )
        first = f"`tarflowlm data {source} --out DIR{options}`"
        raise UserError(
            f"{source}: several processes would wait for its preparation; run {first}, then --data DIR"
        )
    return usable or _write(found, wanted, target, progress)


def prepare_corpus(
    source: str | Source,
    tokenizer: TokenizerConfig | Tokenizer,
    out: str | os.PathLike[str],
    *,
    progress: Progress = SILENT,
    shard_tokens: int = SHARD_TOKENS,
) -> Corpus:
    """Read, normalise, split and encode `source` (a corpus name or a text file) into the directory
    `out`. `out` appears complete or not at all. If it already holds this very corpus, that is
    opened; anything else there is a UserError. The next equal call resumes a killed preparation. Of
    several processes one prepares.
    """
    target, found = Path(out), source if isinstance(source, Source) else resolve_source(source)
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return _write(found, tokenizer, target, progress, shard_tokens)
    is_same = (target / META).is_file() and open_corpus(target).meta["identity"] == found.identity
    corpus, problem = _usable(target, found) if is_same else (None, "holds something else")
    if corpus is None:
        raise UserError(f"{target} cannot be used ({problem}): remove it or choose another --out")
    _check_tokenizer(corpus, tokenizer)
    return corpus


def check_source(source: str) -> None:
    """UserError for a text that `cached_corpus` would not find. Nothing is read or downloaded."""
    if not _is_prepared(source):
        resolve_source(source)


FITTED = 1 << 20  # characters at the beginning of a text that `check_fit` reads
# share of letters that text8's normalisation may lose in a text for a model that has only a-z
STRANGE = 0.01


def check_fit(source: str, tokenizer: Tokenizer) -> None:
    """UserError if the beginning of a text file is in letters that the tokenizer drops or spells
    byte by byte.
    """
    if _is_prepared(source) or not isinstance(found := resolve_source(source), TextFile):
        return
    text = _beginning(found)
    remedy = f"train a new model on it: `tarflowlm train english-small --data {source} --out DIR`"
    if tokenizer.normalization == "text8":
        if (lost := _lost(text)) > STRANGE:
            raise UserError(
                f"{lost:.1%} of the letters of {source} are not a-z, all that the model has: {remedy}"
            )
    elif tokenizer.kind == "bpe" and (count := len(tokenizer.encode(text))) > len(text):
        per = f"{count / len(text):.1f} tokens of the model for a character of {source}"
        raise UserError(f"{per}, since they were made for another language: {remedy}")


def suited(source: str, wanted: TokenizerConfig) -> TokenizerConfig:
    """The tokenizer that is `wanted`; in place of the default one, bytes for a user's text that it
    would not keep.
    """
    if wanted != TokenizerConfig() or source in SOURCE_NAMES or _is_prepared(source):
        return wanted
    if (
        not isinstance(found := resolve_source(source), TextFile)
        or (lost := _lost(_beginning(found))) <= STRANGE
    ):
        return wanted
    log.warning(
        "%.1f %% of the letters of %s are not a-z: its tokens are bytes, which keep all",
        100 * lost,
        source,
    )
    return TokenizerConfig(kind="byte", normalize="none")


def _beginning(source: TextFile) -> str:
    return "".join(islice(source.blocks(), 1 + FITTED // source.block))[:FITTED]


def _lost(text: str) -> float:
    """The share of letters that text8's normalisation loses."""
    letters = [character for character in text if character.isalpha()]
    return sum(not character.isascii() for character in letters) / max(len(letters), 1)


def encode_text_source(
    source: str,
    tokenizer: Tokenizer,
    splits: Sequence[str] = SPLITS,
    *,
    progress: Progress = SILENT,
) -> dict[str, TokenArray]:
    """Tokens of another text under a given tokenizer, which also normalises it; in memory.
    `source`: a corpus name, a text file, or a directory that was prepared with this very tokenizer.
    `splits` may name "all", too: the whole text. A split of a short text may be empty.
    """
    found: dict[str, list[Any]] = {split: [] for split in SPLITS}
    if _is_prepared(source):
        corpus = open_corpus(source)
        _check_tokenizer(corpus, tokenizer)
        found = {split: [corpus.split(split)] for split in SPLITS}
    else:
        text, dtype = resolve_source(source), token_dtype(tokenizer.vocab_size)
        text.obtain(progress)
        stream = text.stream(tokenizer.normalization, progress=progress)
        progress.stage(f"encoding {text.name}, characters", stream.total)
        for batch in stream.batches:
            for split, texts in batch.texts.items():
                if {split, "all"} & {*splits}:
                    found[split].append(tokenizer.encode_each(texts).astype(dtype))
                progress.advance(sum(map(len, texts)))
        found = {
            split: [np.concatenate([np.zeros(0, dtype), *parts])] for split, parts in found.items()
        }
    found["all"] = [part for split in SPLITS for part in found[split]]
    return {name: TokenArray.of(np.concatenate(found[name])) for name in splits}


def _is_prepared(source: str) -> bool:
    return source not in SOURCE_NAMES and os.path.isfile(os.path.join(source, META))


def _usable(target: Path, source: Source) -> tuple[Corpus | None, str]:
    """The corpus in `target` if it can be used and its source is unchanged, else None and the
    reason.
    """
    if not (target / META).is_file():
        return None, ""
    try:
        corpus = open_corpus(target)
    except UserError as error:
        return None, str(error)
    changed = corpus.changed_file(source.files)
    return (corpus, "") if changed is None else (None, f"{changed} changed since it was prepared")


def _built(wanted: TokenizerConfig | Tokenizer) -> TokenizerConfig | Tokenizer:
    """The tokenizer itself, unless it has to be trained."""
    return (
        build_tokenizer(wanted)
        if isinstance(wanted, TokenizerConfig) and not wanted.needs_training
        else wanted
    )


def _key(tokenizer: TokenizerConfig | Tokenizer) -> Any:
    """JSON by content: a tokenizer.json that changed is another tokenizer."""
    return tokenizer.fingerprint if isinstance(tokenizer, Tokenizer) else asdict(tokenizer)


def _check_tokenizer(corpus: Corpus, wanted: TokenizerConfig | Tokenizer) -> None:
    ours, recorded = corpus.tokenizer, corpus.meta["tokenizer_config"]
    if isinstance(wanted, TokenizerConfig) and recorded == asdict(wanted):
        return  # an equal request, without training again or asking the hub again
    if isinstance(wanted, TokenizerConfig) and wanted.needs_training:
        request = ("bpe", wanted.vocab_size, wanted.normalize)
        matches = recorded is None and request == (ours.kind, ours.vocab_size, ours.normalization)
    else:
        matches = _key(_built(wanted)) == ours.fingerprint
    if not matches:
        what = f"{corpus.path} was prepared with {ours!r}, not with {wanted!r}"
        raise UserError(f"{what}: prepare another one, or leave the tokenizer to the directory")


def _write(
    source: Source,
    wanted: TokenizerConfig | Tokenizer,
    target: Path,
    progress: Progress,
    size: int = SHARD_TOKENS,
) -> Corpus:
    """Prepare `source` in the place of whatever corpus `target` holds, unless another process was
    faster.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with waiting_lock(target):
        corpus, problem = _usable(target, source)
        if corpus is not None:
            return corpus
        if problem:
            log.warning("preparing %s again: %s", source.name, problem)
        files = [
            {
                "path": str(p),
                "size": p.stat().st_size,
                "mtime_ns": p.stat().st_mtime_ns,
                "sha256": sha256_of(p),
            }
            for p in source.obtain(progress)
        ]
        tokenizer = _built(wanted)
        # the shares, so that what an earlier version split in another way is begun again
        plan = [
            source.identity,
            [file["sha256"] for file in files],
            _key(tokenizer),
            size,
            *source.shares,
        ]
        folder = target.with_name(f".{target.name}.partial")
        try:
            shards = _Shards(folder, plan, size)
            if isinstance(tokenizer, TokenizerConfig):
                text = _training_text(source, tokenizer, progress)
                tokenizer = (
                    build_tokenizer(tokenizer, text)
                    if shards.cursor is None
                    else load_tokenizer(folder)
                )
            tokenizer.save(folder)
            _encode(source, tokenizer, shards, progress)
        except BaseException:
            if not (folder / RESUME).exists():
                shutil.rmtree(folder, ignore_errors=True)
            raise
        meta = {
            "format": FORMAT,
            "version": VERSION,
            "source": source.name,
            "identity": source.identity,
        }
        config = None if isinstance(wanted, Tokenizer) else asdict(wanted)
        meta |= {
            "files": files,
            "tokenizer_fingerprint": tokenizer.fingerprint,
            "tokenizer_config": config,
        }
        write_json(
            folder / META, meta | {"vocab_size": tokenizer.vocab_size, "splits": shards.splits}
        )
        (folder / RESUME).unlink(missing_ok=True)
        shutil.rmtree(target, ignore_errors=True)
        os.rename(folder, target)
    return open_corpus(target)


def _training_text(source: Source, config: TokenizerConfig, progress: Progress) -> Iterator[str]:
    stream = source.stream(config.normalize, progress=progress)
    left = min(BPE_CHARACTERS, stream.total or BPE_CHARACTERS)
    progress.stage(f"text for the tokenizer of {source.name}, characters", left)
    for batch in stream.batches:
        yield from (texts := batch.texts.get("train", []))
        progress.advance(size := sum(map(len, texts)))
        if (left := left - size) <= 0:
            break


def _encode(source: Source, tokenizer: Tokenizer, shards: "_Shards", progress: Progress) -> None:
    stream, dtype = (
        source.stream(tokenizer.normalization, shards.cursor, progress),
        token_dtype(tokenizer.vocab_size),
    )
    done = sum(record["characters"] for record in shards.splits.values())
    progress.stage(f"encoding {source.name}, characters", stream.total, done)
    for batch in stream.batches:
        for split, texts in batch.texts.items():
            size = sum(map(len, texts))
            shards.add(split, tokenizer.encode_each(texts).astype(dtype), size)
            progress.advance(size)
        if batch.cursor is not None:
            shards.write_full(batch.cursor)
    for split, record in shards.splits.items():
        if not record["characters"]:
            raise UserError(f"{source.name} is too short: its {split} split holds no text")
        shards.write(split, everything=True)


class _Shards:
    """The shards of a corpus in `folder`, of `shard_tokens` tokens each, and the tokens that wait
    for the next ones. It takes over the files of a killed preparation of the same `plan`, the JSON
    of all that they depend on.
    """

    def __init__(self, folder: Path, plan: Any, shard_tokens: int) -> None:
        self.folder, self.plan, self.shard_tokens = (
            folder,
            json.loads(json.dumps(plan)),
            shard_tokens,
        )
        self.cursor: Any = (
            None  # position of the source behind the tokens in `waiting`; None at the start
        )
        self.waiting: dict[Split, list[npt.NDArray[Any]]] = {split: [] for split in SPLITS}
        self.splits: dict[Split, dict[str, Any]] = {
            s: {"tokens": 0, "characters": 0, "shards": []} for s in SPLITS
        }
        """Tokens, characters, and finished shards (file, tokens, sha256) of every split."""
        if not self._resume():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()

    def add(self, split: Split, tokens: npt.NDArray[Any], characters: int) -> None:
        self.waiting[split].append(tokens)
        self.splits[split]["tokens"] += len(tokens)
        self.splits[split]["characters"] += characters

    def write_full(self, cursor: Any) -> None:
        """Write the shards that are full, if any, and with them how to go on from `cursor`, the
        source's position.
        """
        if max(sum(map(len, waiting)) for waiting in self.waiting.values()) < self.shard_tokens:
            return
        for split in SPLITS:
            self.write(split)
        state = json.dumps({"plan": self.plan, "cursor": cursor, "splits": self.splits})
        arrays: dict[str, Any] = {split: waiting[0] for split, waiting in self.waiting.items()}
        with replacing(self.folder / RESUME) as temporary, temporary.open("wb") as file:
            np.savez(file, state=state, **arrays)

    def write(self, split: Split, *, everything: bool = False) -> None:
        """Write the full shards of a split; with `everything` also its last one, at least one in
        all.
        """
        tokens = np.concatenate(self.waiting[split] or [np.zeros(0, "u1")])
        shards = self.splits[split]["shards"]
        while len(tokens) >= self.shard_tokens or (everything and (len(tokens) or not shards)):
            shard, tokens = tokens[: self.shard_tokens], tokens[self.shard_tokens :]
            name = f"{split}-{len(shards):05d}.bin"
            with replacing(self.folder / name) as temporary:
                shard.tofile(temporary)
            shards.append(
                {
                    "file": name,
                    "tokens": len(shard),
                    "sha256": hashlib.sha256(shard.data).hexdigest(),
                }
            )
        self.waiting[split] = [tokens]

    def _resume(self) -> bool:
        try:
            with np.load(self.folder / RESUME) as saved:
                state = json.loads(str(saved["state"]))
                if state["plan"] != self.plan:
                    return False
                self.waiting = {split: [saved[split]] for split in SPLITS}
        except Exception:  # missing, or damaged in any way
            return False
        self.cursor, self.splits = state["cursor"], state["splits"]
        remove_leftovers(self.folder)
        return True
