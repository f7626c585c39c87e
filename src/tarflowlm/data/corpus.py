"""Prepared corpora: meta.json, the tokenizer, and the tokens of each split in one file."""

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, TypedDict

import numpy as np

from tarflowlm.config import DataConfig
from tarflowlm.data.bpe import build_tokenizer
from tarflowlm.data.encode import encoded
from tarflowlm.data.library import load_tokenizer
from tarflowlm.data.source import GivenTexts, Source
from tarflowlm.data.sources import SOURCE_NAMES, resolve_source
from tarflowlm.data.splits import SPLITS, Split
from tarflowlm.data.tokenizer import Tokenizer, check_own
from tarflowlm.data.windows import Array
from tarflowlm.errors import SILENT, Progress, UserError, first_line
from tarflowlm.files import cache_root, new_folder, sync_file, waiting_lock, write_json

META = "meta.json"
VERSION = 4
"""The first entry of a plan, which changes with the form of corpora and the rule of splits."""
BPE_CHARACTERS = 1 << 27
"""Characters of the training split that train a BPE; more would need much memory for words."""

log = logging.getLogger("tarflowlm")


class SplitMeta(TypedDict):
    """The file of a split: little-endian tokens, each of the least whole number of bytes."""

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
    splits: dict[Split, SplitMeta]


@dataclass(eq=False)
class Corpus:
    """A prepared corpus: its tokens, memory-mapped, their `tokenizer`, and its meta.json."""

    path: Path
    meta: Meta
    tokenizer: Tokenizer

    def split(self, name: Split) -> Array:
        """The tokens of split "train", "valid" or "test"."""
        # a plain view: indexing an np.memmap spends most of its time building np.memmap results
        return np.asarray(np.memmap(self.path / f"{name}.bin", self.tokenizer.token_dtype, "r"))

    def num_tokens(self, name: Split) -> int:
        return self.meta["splits"][name]["tokens"]

    def num_characters(self, name: Split) -> int:
        """The number of characters of the normalised text of a split."""
        return self.meta["splits"][name]["characters"]

    @property
    def fingerprint(self) -> str:
        """sha256 (hex) over the hashes of the splits: equal for equal tokens in equal splits."""
        # each in a list, because saved runs hold a number made so
        hashes = [[self.meta["splits"][split]["sha256"]] for split in SPLITS]
        return hashlib.sha256(json.dumps(hashes).encode("ascii")).hexdigest()


def is_prepared(source: str) -> bool:
    """Whether `source` is the directory of a corpus, and not the name of one."""
    return source not in SOURCE_NAMES and os.path.isfile(
        os.path.join(os.path.expanduser(source), META)
    )


def open_corpus(path: str | os.PathLike[str]) -> Corpus:
    """The corpus in directory `path`. UserError if a file is missing, truncated or foreign."""
    folder = Path(os.path.expanduser(path))
    try:
        meta: Meta = json.loads((folder / META).read_text(encoding="utf-8"))
        if meta["plan"][0] != VERSION:
            raise ValueError(f"version {meta['plan'][0]!r}")
        tokenizer = load_tokenizer(folder)
        if tokenizer.fingerprint != meta["tokenizer"]:
            raise ValueError("tokenizer.json is not the one this corpus was encoded with")
        for split in SPLITS:
            size = meta["splits"][split]["tokens"] * tokenizer.token_dtype.itemsize
            if (folder / f"{split}.bin").stat().st_size != size:
                raise ValueError(f"{split}.bin does not have {size:,} bytes")
    except (OSError, LookupError, TypeError, ValueError) as error:
        what = f"the corpus {folder} cannot be used ({first_line(error)})"
        raise UserError(f"{what}: prepare it again") from None
    return Corpus(folder, meta, tokenizer)


def prepare_corpus(
    text: DataConfig,
    tokenizer: Tokenizer | None = None,
    *,
    out: str | os.PathLike[str] | None = None,
    progress: Progress = SILENT,
) -> Corpus:
    """The corpus of a text, encoded by `tokenizer`, or by the one that `text` describes.

    It is opened, or prepared now, in the cache or in the directory `out`, which must hold this very
    corpus or nothing. It appears complete or not at all, and only one of several processes prepares
    it. A `source` that is itself a prepared directory is opened in its place. UserError if a
    directory holds something else, or was prepared with another tokenizer.
    """
    if is_prepared(text.source):
        if out is not None or text.unwrap:
            raise UserError(f"{text.source} is prepared already: give its text")
        return _opened(text, tokenizer)
    if tokenizer is not None:
        check_own(tokenizer)
    config = text.tokenizer if tokenizer is None else None
    source = resolve_source(text, (tokenizer or text.tokenizer).normalization, progress=progress)
    if config is not None and not config.needs_training:
        tokenizer = build_tokenizer(config, has_documents=source.has_documents)
    # the plan has the content of a tokenizer, since a tokenizer.json may change
    key = asdict(text.tokenizer) if tokenizer is None else tokenizer.fingerprint
    plan = [VERSION, source.identity, source.state(), source.unwrap, key]
    digest = hashlib.sha256(json.dumps(plan, sort_keys=True).encode("ascii")).hexdigest()
    cached = cache_root() / "corpora" / f"{Path(source.identity).name[:50]}-{digest[:16]}"
    target = cached if out is None else Path(out).resolve()
    # without the lock, too: a cache that is there already may be another user's
    found = _found(target, plan, is_own=out is not None, level=logging.DEBUG)
    if found is not None:
        return found
    with waiting_lock(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        found = _found(target, plan, is_own=out is not None)
        if found is not None:
            return found
        source.obtain()
        shutil.rmtree(target, ignore_errors=True)
        with new_folder(target) as folder:
            if tokenizer is None:
                tokenizer = build_tokenizer(
                    text.tokenizer, _training_text(source), has_documents=source.has_documents
                )
            tokenizer.save(folder)
            meta: Meta = {
                "source": source.name,
                "plan": plan,
                "tokenizer": tokenizer.fingerprint,
                "tokenizer_config": None if config is None else asdict(config),
                "splits": _write_splits(source, tokenizer, folder),
            }
            write_json(folder / META, meta)
        return open_corpus(target)


def _opened(text: DataConfig, tokenizer: Tokenizer | None) -> Corpus:
    """The corpus in a directory. UserError if it was prepared with another tokenizer.

    A configuration that leaves the normalisation open (auto) takes the directory's tokenizer.
    """
    corpus = open_corpus(text.source)
    config = text.tokenizer
    if tokenizer is not None:
        suitable = [tokenizer]
    elif config.normalize == "auto" or asdict(config) == corpus.meta["tokenizer_config"]:
        return corpus  # left to the directory, or the same: without asking the hub again
    elif config.needs_training:
        suitable = []
    else:
        suitable = [build_tokenizer(config, has_documents=have) for have in (False, True)]
    if corpus.tokenizer.fingerprint not in [one.fingerprint for one in suitable]:
        what = f"{text.source} was prepared with another tokenizer: give the text itself"
        raise UserError(what if tokenizer else f"{what}, or data.tokenizer.normalize auto")
    return corpus


def _found(
    target: Path, plan: list[object], *, is_own: bool, level: int = logging.WARNING
) -> Corpus | None:
    """The corpus of this plan in `target`; None if it still has to be prepared.

    UserError if a directory of the user's own holds something else.
    """
    if is_prepared(str(target)):
        try:
            corpus = open_corpus(target)
            if corpus.meta["plan"] == plan:
                return corpus
        except UserError as error:
            log.log(level, "%s", error)
    if is_own and target.exists() and not (target.is_dir() and not any(target.iterdir())):
        what = f"{target} holds something else than this text so encoded"
        raise UserError(f"{what}: remove it or choose another --out")
    return None


def _training_text(source: Source) -> Iterator[str]:
    """The beginning of the training split, for a BPE."""
    total = source.num_characters
    source.progress.stage(f"text for the tokenizer of {source.name}, characters", total)
    left = BPE_CHARACTERS
    for split, piece, _ in source.pieces():
        source.progress.advance(len(piece))
        if split == "train":
            yield piece
            left -= len(piece)
        if left <= 0:
            return


def _write_splits(source: Source, tokenizer: Tokenizer, folder: Path) -> dict[Split, SplitMeta]:
    """Write the tokens of all splits. UserError if one has no text."""
    splits = {split: SplitMeta(tokens=0, characters=0, sha256="") for split in SPLITS}
    digests = {split: hashlib.sha256() for split in SPLITS}
    with ExitStack() as stack:
        files = {
            split: stack.enter_context((folder / f"{split}.bin").open("wb")) for split in SPLITS
        }
        for split, tokens, characters in encoded(source, tokenizer):
            tokens.tofile(files[split])
            digests[split].update(tokens.tobytes())
            splits[split]["tokens"] += len(tokens)
            splits[split]["characters"] += characters
    for split in SPLITS:
        if not splits[split]["tokens"]:
            what = f"{source.name} is too short: its {split} split holds no text"
            raise UserError(f"{what}: give a longer one, or more different documents")
        sync_file(folder / f"{split}.bin")
        splits[split]["sha256"] = digests[split].hexdigest()
    return splits


def encode_text(
    text: DataConfig | Sequence[str],
    tokenizer: Tokenizer,
    split: Split | Literal["all"],
    *,
    progress: Progress = SILENT,
) -> Array:
    """Tokens of another text under a given tokenizer, which also normalises it; in memory.

    The `source` is the name of a corpus, a text file, or a directory that was prepared with this
    very tokenizer. A split of a short text may be empty. Texts themselves are documents if there
    are several, and have no splits.
    """
    wanted = SPLITS if split == "all" else (split,)
    source: Source
    if not isinstance(text, DataConfig):
        source = GivenTexts(text, tokenizer.normalization)
    elif is_prepared(text.source):
        corpus = _opened(text, tokenizer)
        return np.concatenate([corpus.split(name) for name in wanted])
    else:
        source = resolve_source(text, tokenizer.normalization, progress=progress)
    source.obtain()
    parts = encoded(source, tokenizer, wanted, is_whole=split == "all")
    tokens = [some for _, some, _ in parts]
    return np.concatenate([np.zeros(0, tokenizer.token_dtype), *tokens])
