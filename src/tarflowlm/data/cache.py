"""Corpora prepared on demand and kept for the next run."""

import hashlib
import json
import os
from dataclasses import asdict
from pathlib import Path

from tarflowlm.data.config import TokenizerConfig, build_tokenizer
from tarflowlm.data.corpus import Corpus, check_tokenizer, is_prepared, open_corpus
from tarflowlm.data.meta import VERSION
from tarflowlm.data.prepare import write_corpus
from tarflowlm.data.registry import resolve_source
from tarflowlm.data.sources import CorpusProgress, Notice, cache_root
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
    """`source` prepared for `tokenizer`: from the cache if it is there, else prepared now and kept.

    `source`: a corpus name, a text file, or a prepared directory, which is opened where it is (UserError if
    its source file changed, or if it was encoded with another tokenizer than one given here).
    `tokenizer`: None means what a prepared directory has, or the default TokenizerConfig.
    `cache_dir`: None means $TARFLOWLM_CACHE or ~/.cache/tarflowlm. Entries are told apart by the source's
    name or path and the tokenizer; one whose source changed, or that is damaged, is prepared again, which
    `notice` says.

    A preparation that was killed is gone on with. Of several processes one prepares, the others wait.
    """
    if is_prepared(source):
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


def _cache_key(identity: str, tokenizer: TokenizerConfig | Tokenizer) -> str:
    if isinstance(tokenizer, TokenizerConfig) and not tokenizer.needs_training:
        # by content: a tokenizer.json that changed is another tokenizer, and a Tokenizer given directly
        # shares it
        tokenizer = build_tokenizer(tokenizer)
    made_by = tokenizer.fingerprint if isinstance(tokenizer, Tokenizer) else asdict(tokenizer)
    content = json.dumps([VERSION, identity, made_by], sort_keys=True)
    return hashlib.sha256(content.encode("utf-8")).hexdigest()[:16]
