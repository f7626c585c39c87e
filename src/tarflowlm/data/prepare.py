"""Preparing corpora: the pieces of a text are encoded and written as token shards.

Until it is complete, a corpus is in `.<name>.partial` next to its directory. Every part of the
source gives one shard per split, and a record when these are written; after a kill, parts that
have a record are not made again.
"""

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Literal

import numpy as np

from tarflowlm.config import TokenizerConfig
from tarflowlm.data.bpe import build_tokenizer
from tarflowlm.data.corpus import META, VERSION, Corpus, Meta, Shard, is_prepared, open_corpus
from tarflowlm.data.fit import misfit, tell_losses
from tarflowlm.data.sources import resolve_source
from tarflowlm.data.splits import SPLITS, Piece, Split
from tarflowlm.data.text import BLOCK
from tarflowlm.data.textfile import Source
from tarflowlm.data.tokenizer import Tokenizer, load_tokenizer
from tarflowlm.data.windows import Array, TokenArray
from tarflowlm.errors import SILENT, Progress, UserError
from tarflowlm.files import (
    cache_root,
    read_json,
    remove_leftovers,
    sync_file,
    waiting_lock,
    write_json,
)
from tarflowlm.parts import share

BPE_CHARACTERS = 1 << 27
"""Characters of the training split that a BPE is trained on: the words it counts need memory."""
PLAN = "plan.json"
"""All that the shards of an incomplete corpus depend on."""

log = logging.getLogger("tarflowlm")


def cached_corpus(
    source: str,
    tokenizer: TokenizerConfig | Tokenizer,
    *,
    unwrap: bool = False,
    progress: Progress = SILENT,
) -> Corpus:
    """`source` prepared for `tokenizer`: opened from the cache, or prepared now and kept there.

    `source` is the name of a corpus, a text file, or a prepared directory, which is opened where it
    is (UserError if its tokenizer is another).
    """
    if is_prepared(source):
        return _opened(source, tokenizer)
    found = resolve_source(source, tokenizer.normalization, unwrap=unwrap, progress=progress)
    plan = _plan(found, tokenizer)
    digest = hashlib.sha256(json.dumps(plan, sort_keys=True).encode("ascii")).hexdigest()
    target = cache_root() / "corpora" / f"{Path(found.identity).name}-{digest[:16]}"
    return _prepare(found, tokenizer, plan, target)


def prepare_corpus(
    source: str,
    tokenizer: TokenizerConfig | Tokenizer,
    out: str | os.PathLike[str],
    *,
    unwrap: bool = False,
    progress: Progress = SILENT,
) -> Corpus:
    """Prepare `source`, the name of a corpus or a text file, in the directory `out`.

    `out` appears complete or not at all. If it already holds this very corpus, that is opened;
    anything else there is a UserError. Of several processes one prepares.
    """
    target = Path(out).resolve()
    found = resolve_source(source, tokenizer.normalization, unwrap=unwrap, progress=progress)
    plan = _plan(found, tokenizer)
    is_free = not target.exists() or (target.is_dir() and not any(target.iterdir()))
    if not is_free and not _holds(target, plan):
        remedy = "remove it or choose another --out"
        raise UserError(f"{target} holds something else than {source} so encoded: {remedy}")
    return _prepare(found, tokenizer, plan, target)


def prepare_part(
    source: str,
    tokenizer: TokenizerConfig | Tokenizer,
    out: str | os.PathLike[str],
    part: str,
    *,
    unwrap: bool = False,
    progress: Progress = SILENT,
) -> None:
    """Prepare a share of the files of `source` for `out`, beside the processes of other shares.

    `prepare_corpus` then prepares what is missing and puts all together.
    """
    found = resolve_source(source, tokenizer.normalization, unwrap=unwrap, progress=progress)
    plan = _plan(found, tokenizer)
    target = Path(out).resolve()
    folder = _partial(target)
    with waiting_lock(target):
        if _holds(target, plan):
            return
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / PLAN).exists():
            write_json(folder / PLAN, plan)
        if read_json(folder / PLAN) != plan:
            raise UserError(f"{folder} holds something else than {source} so encoded: remove it")
        found.obtain()
        used = _tokenizer(found, tokenizer, folder)
        used.save(folder)
    for number in share(part, found.num_parts):
        _part(found, number, used, folder)


def encode_text_source(
    source: str,
    tokenizer: Tokenizer,
    split: Split | Literal["all"],
    *,
    unwrap: bool = False,
    progress: Progress = SILENT,
) -> TokenArray:
    """Tokens of another text under a given tokenizer, which also normalises it; in memory.

    `source` is the name of a corpus, a text file, or a directory that was prepared with this very
    tokenizer. A split of a short text may be empty.
    """
    wanted = SPLITS if split == "all" else (split,)
    if is_prepared(source):
        corpus = _opened(source, tokenizer)
        return TokenArray([np.asarray(corpus.split(name)) for name in wanted])
    problem = misfit(source, tokenizer)
    if problem is not None:
        log.warning("%s", problem)
    elif tokenizer.normalization == "text8":
        tell_losses(source, "english-small")
    found = resolve_source(source, tokenizer.normalization, unwrap=unwrap, progress=progress)
    found.obtain()
    tokens = [np.zeros(0, tokenizer.token_dtype)]
    for part in range(found.num_parts):
        if split == "all" and (tokenizer.end is None or not found.has_documents):
            # whole, since word pieces may cross the cuts between the splits
            text = "".join(piece.text for piece in _pieces(found, part, tokenizer))
            progress.stage(f"encoding {found.name}, characters", len(text))
            tokens.append(tokenizer.encode(text).astype(tokenizer.token_dtype))
            progress.advance(len(text))
        else:
            tokens += [some for _, some, _ in _encoded(found, part, tokenizer, wanted)]
    return TokenArray([np.concatenate(tokens)])


def _encoded(
    source: Source, part: int, tokenizer: Tokenizer, wanted: Sequence[Split]
) -> Iterator[tuple[Split, Array, int]]:
    """The tokens of some splits of a part of a text, with the number of their characters.

    Every piece is encoded on its own.
    """
    which = f", part {part + 1} of {source.num_parts}" if source.num_parts > 1 else ""
    total = source.count_characters()
    source.progress.stage(f"encoding {source.name}{which}, characters", total)
    for pieces in _batches(_pieces(source, part, tokenizer)):
        split = pieces[0].split
        size = sum(len(piece.text) for piece in pieces)
        if split in wanted:
            yield split, _tokens(pieces, tokenizer), size
        source.progress.advance(size)


def _pieces(source: Source, part: int, tokenizer: Tokenizer) -> Iterator[Piece]:
    """The pieces of a part, with what stands between documents that no token ends."""
    is_apart = tokenizer.end is not None or tokenizer.normalization == "text8"
    for piece in source.pieces(part):
        is_open = piece.ends and source.has_documents and not is_apart
        yield piece._replace(text=piece.text + source.separator) if is_open else piece


def _tokens(pieces: Sequence[Piece], tokenizer: Tokenizer) -> Array:
    """The tokens of pieces, each encoded on its own, with the ends of documents."""
    texts = [piece.text for piece in pieces]
    ids = tokenizer.encode_each(texts)
    if tokenizer.end is not None:
        # before the first token that begins a character of the next document
        reached = tokenizer.characters_per_token[ids].cumsum()
        ends = np.cumsum([len(text) for text in texts])[[piece.ends for piece in pieces]]
        ids = np.insert(ids, np.searchsorted(reached, ends, side="right"), tokenizer.end)
    return ids.astype(tokenizer.token_dtype)


def _batches(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    """The pieces of each split in order, many short ones at a time, which are encoded faster."""
    waiting: dict[Split, list[Piece]] = {split: [] for split in SPLITS}
    size = dict.fromkeys(SPLITS, 0)
    for piece in pieces:
        split = piece.split
        waiting[split].append(piece)
        size[split] += len(piece.text)
        if size[split] >= BLOCK:
            yield waiting[split]
            waiting[split] = []
            size[split] = 0
    yield from filter(None, waiting.values())


def _plan(source: Source, tokenizer: TokenizerConfig | Tokenizer) -> list[object]:
    """All that the tokens of a corpus depend on, as JSON."""
    key = _key(tokenizer, source.has_documents)
    return [VERSION, source.identity, source.state(), source.unwrap, key]


def _key(wanted: TokenizerConfig | Tokenizer, has_documents: bool) -> str | dict[str, object]:
    """A tokenizer by its content, since a tokenizer.json may change; by configuration untrained."""
    if isinstance(wanted, Tokenizer):
        return wanted.fingerprint
    if wanted.needs_training:
        return asdict(wanted)
    return build_tokenizer(wanted, has_documents=has_documents).fingerprint


def _opened(directory: str, wanted: TokenizerConfig | Tokenizer) -> Corpus:
    """The corpus in a directory. UserError if it was prepared with another tokenizer."""
    corpus = open_corpus(directory)
    if isinstance(wanted, TokenizerConfig) and asdict(wanted) == corpus.meta["tokenizer_config"]:
        return corpus  # without asking the hub again
    if corpus.tokenizer.fingerprint not in (_key(wanted, False), _key(wanted, True)):
        what = f"{directory} was prepared with another tokenizer"
        raise UserError(f"{what}: give the text itself, or leave the tokenizer to the directory")
    return corpus


def _prepare(
    source: Source, wanted: TokenizerConfig | Tokenizer, plan: list[object], target: Path
) -> Corpus:
    """The corpus in `target`, prepared now unless it is there."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with waiting_lock(target):
        if is_prepared(str(target)):
            try:
                return open_corpus(target)
            except UserError as error:
                log.warning("preparing %s again: %s", source.name, error)
        source.obtain()
        folder = _partial(target)
        _take_over(folder, plan)
        try:
            tokenizer = _tokenizer(source, wanted, folder)
            tokenizer.save(folder)
            parts = [_part(source, n, tokenizer, folder) for n in range(source.num_parts)]
            shards = {split: [part[split] for part in parts if split in part] for split in SPLITS}
            for split in SPLITS:
                if not shards[split]:
                    what = f"{source.name} is too short: its {split} split holds no text"
                    remedy = "give a longer one, or more documents"
                    raise UserError(f"{what}: {remedy}")
        except BaseException:
            if not any(folder.glob("part-*.json")):
                shutil.rmtree(folder, ignore_errors=True)
            raise
        meta: Meta = {
            "source": source.name,
            "plan": plan,
            "tokenizer": tokenizer.fingerprint,
            "tokenizer_config": asdict(wanted) if isinstance(wanted, TokenizerConfig) else None,
            "splits": shards,
        }
        write_json(folder / META, meta)
        for note in (folder / PLAN, *folder.glob("part-*.json")):
            note.unlink()
        shutil.rmtree(target, ignore_errors=True)
        os.rename(folder, target)
        return open_corpus(target)


def _holds(target: Path, plan: list[object]) -> bool:
    """Whether a directory holds the corpus of this very plan."""
    return is_prepared(str(target)) and open_corpus(target).meta["plan"] == plan


def _partial(target: Path) -> Path:
    return target.with_name(f".{target.name}.partial")


def _take_over(folder: Path, plan: list[object]) -> None:
    """Keep in `folder` what a killed preparation of the same plan left there, and nothing else."""
    if (folder / PLAN).exists() and read_json(folder / PLAN) == plan:
        remove_leftovers(folder)
        return
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    write_json(folder / PLAN, plan)


def _tokenizer(source: Source, wanted: TokenizerConfig | Tokenizer, folder: Path) -> Tokenizer:
    """The tokenizer that is wanted; if that has to be trained, on the text of the source."""
    if isinstance(wanted, Tokenizer):
        return wanted
    if not wanted.needs_training:
        return build_tokenizer(wanted, has_documents=source.has_documents)
    if any(folder.glob("part-*.json")):  # of a killed preparation
        return load_tokenizer(folder)
    total = source.count_characters()
    source.progress.stage(f"text for the tokenizer of {source.name}, characters", total)

    def text() -> Iterator[str]:
        left = BPE_CHARACTERS
        for part in range(source.num_parts):
            for split, piece, _ in source.pieces(part):
                source.progress.advance(len(piece))
                if split == "train":
                    yield piece
                    left -= len(piece)
                if left <= 0:
                    return

    return build_tokenizer(wanted, text(), has_documents=source.has_documents)


def _part(source: Source, part: int, tokenizer: Tokenizer, folder: Path) -> dict[Split, Shard]:
    """Write the shards of a part, one for each split that it has text of; returns their records."""
    record = folder / f"part-{part:05d}.json"
    with waiting_lock(record):  # one process at a time
        if record.exists():
            done: dict[Split, Shard] = read_json(record)
            return done
        shards: dict[Split, Shard] = {}
        digests = {split: hashlib.sha256() for split in SPLITS}
        for split, tokens, characters in _encoded(source, part, tokenizer, SPLITS):
            name = f"{split}-{part:05d}.bin"
            with (folder / name).open("ab" if split in shards else "wb") as file:
                tokens.tofile(file)
            new: Shard = {"file": name, "tokens": 0, "characters": 0, "sha256": ""}
            shard = shards.setdefault(split, new)
            shard["tokens"] += len(tokens)
            shard["characters"] += characters
            digests[split].update(tokens.tobytes())
        for split, shard in shards.items():
            sync_file(folder / shard["file"])
            shard["sha256"] = digests[split].hexdigest()
        write_json(record, shards)
        return shards
