"""From the name of a source to tokens: a corpus from the cache, or another text under a given tokenizer."""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tarflowlm.config import DataConfig as DataConfig
from tarflowlm.data.corpus import META, VERSION, Corpus, check_tokenizer, open_corpus
from tarflowlm.data.download import cache_root
from tarflowlm.data.prepare import encode_in_order, write_corpus
from tarflowlm.data.shards import TokenArray, token_dtype
from tarflowlm.data.sources import SOURCE_NAMES, resolve_source
from tarflowlm.data.stream import SPLITS, CorpusProgress, Notice
from tarflowlm.data.tokenization import TokenizerConfig, build_tokenizer
from tarflowlm.data.tokenizer import Tokenizer
from tarflowlm.errors import UserError


def cached_corpus(
    source: str,
    tokenizer: TokenizerConfig | Tokenizer | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    *,
    progress: CorpusProgress | None = None,
    notice: Notice | None = None,
) -> Corpus:
    """`source` prepared for `tokenizer`: opened from the cache, or prepared now and kept there.

    `source`: a corpus name, a text file, or a prepared directory, which is opened where it is (UserError if its
    source file changed, or if it was encoded with another tokenizer than one given here).
    `tokenizer`: None means the one of a prepared directory, else the default TokenizerConfig.
    `cache_dir`: None means $TARFLOWLM_CACHE or ~/.cache/tarflowlm. Entries are keyed by the name or path of the
    source and the tokenizer. An entry that is damaged, or whose source changed, is prepared again, and `notice`
    says so.

    A killed preparation is resumed. Of several processes one prepares, the others wait.
    """
    if _is_prepared(source):
        corpus = open_corpus(source)
        if tokenizer is not None:
            check_tokenizer(corpus, tokenizer)
        corpus.check_source()
        return corpus
    found = resolve_source(source)
    wanted: TokenizerConfig | Tokenizer = tokenizer if tokenizer is not None else TokenizerConfig()
    root = Path(cache_dir) if cache_dir is not None else cache_root()
    target = root / "corpora" / f"{Path(found.identity).name}-{_cache_key(found.identity, wanted)}"
    stale = None
    if target.exists():
        try:
            corpus = open_corpus(target)
        except UserError as error:
            stale = f"the cached corpus is unusable ({error}); preparing {found.name} again"
        else:
            changed = corpus.meta.changed_file(found.files)
            if changed is None:
                return corpus
            stale = f"{changed} changed since it was last prepared; preparing {found.name} again"
        if notice is not None:
            notice(stale)
    return write_corpus(found, wanted, target, replace=stale is not None, progress=progress, notice=notice)


def check_source(source: str) -> None:
    """UserError for a text that `cached_corpus` would not find. Nothing is read or downloaded."""
    if not _is_prepared(source):
        resolve_source(source)


def encode_text_source(
    source: str,
    tokenizer: Tokenizer,
    splits: Sequence[str] = SPLITS,
    *,
    progress: CorpusProgress | None = None,
    notice: Notice | None = None,
) -> dict[str, TokenArray]:
    """Tokens of another text under a given tokenizer (a checkpoint's, say), which also normalises it; in memory.

    `source`: a corpus name, a text file, or a directory that was prepared with this very tokenizer. `splits` may name
    "train", "valid", "test" and "all" (the whole text, in that order). A split of a short text may be empty.

    UserError for unknown characters, a directory of another tokenizer, and every problem with the source.
    """
    for name in splits:
        if name not in (*SPLITS, "all"):
            raise UserError(f"split {name!r} is not one of {', '.join(SPLITS)}, all")
    if _is_prepared(source):
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


def _is_prepared(source: str) -> bool:
    """Whether `source` is a directory that holds a prepared corpus, and not the name of a corpus."""
    return source not in SOURCE_NAMES and os.path.isfile(os.path.join(source, META))


def _cache_key(identity: str, tokenizer: TokenizerConfig | Tokenizer) -> str:
    if isinstance(tokenizer, TokenizerConfig) and not tokenizer.needs_training:
        # by content: a tokenizer.json that changed is another tokenizer, and an equal Tokenizer shares the entry
        tokenizer = build_tokenizer(tokenizer)
    tokenizer_key = tokenizer.fingerprint if isinstance(tokenizer, Tokenizer) else asdict(tokenizer)
    content = json.dumps([VERSION, identity, tokenizer_key], sort_keys=True)
    return hashlib.sha256(content.encode("utf-8")).hexdigest()[:16]
