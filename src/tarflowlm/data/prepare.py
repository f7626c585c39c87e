"""Preparing a corpus: text is streamed, normalised, split, encoded on all cores and written as token shards.

Memory does not grow with the text, and a killed preparation is resumed. Until it is complete, it lies in
`.<name>.partial` beside the target: shards, tokenizer.json, and partial.json, which records how much of the shards is
valid and from which cursor the source continues. Then the folder is renamed to the target.
"""

import json
import os
import shutil
import tempfile
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tarflowlm.data.corpus import (
    META,
    Corpus,
    CorpusMeta,
    FileRecord,
    ShardRecord,
    SplitRecord,
    check_tokenizer,
    open_corpus,
)
from tarflowlm.data.shards import ShardWriter, token_dtype
from tarflowlm.data.sources import resolve_source
from tarflowlm.data.stream import SPLITS, Batch, CorpusProgress, Cursor, Notice, Source, Split
from tarflowlm.data.tokenization import TokenizerConfig, build_tokenizer
from tarflowlm.data.tokenizer import Tokenizer, load_tokenizer
from tarflowlm.errors import UserError
from tarflowlm.files import replacing, sync_folder, waiting_lock, write_json

SHARD_TOKENS = 1 << 26
COMMIT_CHARACTERS = 1 << 26
"""Characters between two commits, from which a killed preparation is resumed."""
BPE_CHARACTERS = 1 << 27
"""BPE is trained on at most this many characters of the training split: the words it counts need memory."""
PARTIAL = "partial.json"
_IN_FLIGHT = 3
"""Batches encoded at once: the `tokenizers` library spreads each over all cores, and the others keep the cores busy
while Python copies its result. Threads suffice, as the library works without the interpreter's lock."""


def prepare_corpus(
    source: str | Source,
    tokenizer: TokenizerConfig | Tokenizer,
    out: str | os.PathLike[str],
    *,
    progress: CorpusProgress | None = None,
    notice: Notice | None = None,
    shard_tokens: int = SHARD_TOKENS,
    commit_characters: int = COMMIT_CHARACTERS,
) -> Corpus:
    """Read, normalise, split and encode `source` (a corpus name or a text file) into the directory `out`.

    `out` appears complete or not at all. If it already holds this very corpus, that is opened. The next equal call
    resumes a killed preparation from its last commit (every `commit_characters` characters) and ends in the same
    bytes. Of several processes one prepares, the others wait.

    UserError if `out` holds anything else, and for every problem with the source, its characters or the tokenizer.
    """
    target = Path(out)
    found = source if isinstance(source, Source) else resolve_source(source)
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        corpus = open_corpus(target) if (target / META).is_file() else None
        if corpus is None or corpus.meta.identity != found.identity:
            raise UserError(f"{target} already exists and holds something else: remove it or choose another --out")
        if changed := corpus.meta.changed_file(found.files):
            raise UserError(f"{target} holds this corpus as it was before {changed} changed: remove {target} first")
        check_tokenizer(corpus, tokenizer)
        return corpus
    return write_corpus(
        found,
        tokenizer,
        target,
        progress=progress,
        notice=notice,
        shard_tokens=shard_tokens,
        commit_characters=commit_characters,
    )


def write_corpus(
    source: Source,
    tokenizer: TokenizerConfig | Tokenizer,
    target: Path,
    *,
    replace: bool = False,
    progress: CorpusProgress | None = None,
    notice: Notice | None = None,
    shard_tokens: int = SHARD_TOKENS,
    commit_characters: int = COMMIT_CHARACTERS,
) -> Corpus:
    """As `prepare_corpus`, for a resolved source. With `replace` it takes the place of what `target` holds."""
    files = tuple(FileRecord.of(path) for path in source.obtain(progress, notice))
    folder = target.with_name(f".{target.name}.partial")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with waiting_lock(target):
            if not replace and (target / META).is_file():
                return open_corpus(target)  # another process was faster
            preparation = _Preparation(source, tokenizer, files, folder, shard_tokens, progress)
            try:
                preparation.run(commit_characters)
            except BaseException:
                if preparation.state.cursor is None:  # nothing to resume
                    shutil.rmtree(folder, ignore_errors=True)
                raise
            _install(folder, target, replace)
    except OSError as error:
        raise UserError(f"cannot write to {error.filename or target}: {error.strerror or error}") from None
    return open_corpus(target)


def encode_in_order(
    batches: Iterable[Batch], tokenizer: Tokenizer, dtype: np.dtype[Any]
) -> Iterator[tuple[Batch, npt.NDArray[Any]]]:
    """Each batch with the tokens of its texts, in order; `batches` is read only a little ahead."""

    def encode(batch: Batch) -> npt.NDArray[Any]:
        return tokenizer.encode_each(batch.texts).astype(dtype)

    pending: deque[tuple[Batch, Future[npt.NDArray[Any]]]] = deque()
    pool = ThreadPoolExecutor(_IN_FLIGHT)
    try:
        for batch in batches:
            pending.append((batch, pool.submit(encode, batch)))
            if len(pending) > _IN_FLIGHT:
                first, tokens = pending.popleft()
                yield first, tokens.result()
        while pending:
            first, tokens = pending.popleft()
            yield first, tokens.result()
    finally:
        pool.shutdown(cancel_futures=True)


@dataclass
class _SplitState:
    characters: int = 0
    has_text: bool = False
    """Whether it has any character but white space."""
    shards: list[dict[str, Any]] = field(default_factory=list)


@dataclass
class _State:
    """Content of partial.json."""

    plan: dict[str, Any]
    """Everything the shards depend on: only a preparation with an equal plan can be resumed."""
    cursor: Cursor | None
    """Where the source continues; None before the first commit."""
    splits: dict[Split, _SplitState]


class _Preparation:
    """One preparation, from the start or from the last commit of a killed one."""

    def __init__(
        self,
        source: Source,
        wanted: TokenizerConfig | Tokenizer,
        files: tuple[FileRecord, ...],
        folder: Path,
        shard_tokens: int,
        progress: CorpusProgress | None,
    ) -> None:
        self.source, self.wanted, self.files, self.folder = source, wanted, files, folder
        self.shard_tokens, self.progress = shard_tokens, progress
        self.tokenizer: Tokenizer | None = None
        """None while it has yet to be trained."""
        if isinstance(wanted, Tokenizer):
            self.tokenizer, tokenizer_key = wanted, wanted.fingerprint
        elif wanted.needs_training:
            tokenizer_key = json.dumps(asdict(wanted))
        else:
            self.tokenizer = build_tokenizer(wanted)
            tokenizer_key = self.tokenizer.fingerprint
        plan = {
            "identity": source.identity,
            "settings": source.settings,
            "files": [file.sha256 for file in files],
            "tokenizer": tokenizer_key,
            "shard_tokens": shard_tokens,
        }
        self.state = _read_state(folder, plan) or _State(plan, None, {split: _SplitState() for split in SPLITS})

    def run(self, commit_characters: int) -> None:
        """Prepare a complete corpus in the folder."""
        if self.state.cursor is None:
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder.mkdir()
        for unfinished in self.folder.glob(".*"):
            unfinished.unlink()  # killed while a file was replaced
        tokenizer = self._saved_tokenizer()
        dtype = token_dtype(tokenizer.vocab_size)
        with ExitStack() as stack:
            writers = {
                split: stack.enter_context(ShardWriter(self.folder, split, dtype, self.shard_tokens, state.shards))
                for split, state in self.state.splits.items()
            }
            stream = self.source.stream(tokenizer.normalization, self.state.cursor, self.progress)
            uncommitted = 0
            for batch, tokens in encode_in_order(stream.batches, tokenizer, dtype):
                writers[batch.split].write(tokens)
                uncommitted += self._count_characters(batch)
                self._report("encode", self._num_characters(), stream.total)
                if batch.cursor is not None and uncommitted >= commit_characters:
                    self._commit(writers, batch.cursor)
                    uncommitted = 0
        self._report("encode", self._num_characters(), self._num_characters())
        self._finish(tokenizer, writers)

    def _saved_tokenizer(self) -> Tokenizer:
        """The tokenizer in the folder, where it is trained or saved first if this preparation is not resumed."""
        if self.state.cursor is not None:
            return load_tokenizer(self.folder)
        if self.tokenizer is None:
            assert isinstance(self.wanted, TokenizerConfig)
            self.tokenizer = build_tokenizer(self.wanted, self._training_text(self.wanted))
        self.tokenizer.save(self.folder / "tokenizer.json")
        return self.tokenizer

    def _training_text(self, config: TokenizerConfig) -> Iterator[str]:
        stream = self.source.stream(config.normalize, None, self.progress)
        limit = BPE_CHARACTERS if stream.total is None else min(BPE_CHARACTERS, stream.total)
        done = 0
        for batch in stream.batches:
            if batch.split == "train":
                yield from batch.texts
                done += sum(map(len, batch.texts))
                self._report("bpe", done, limit)
                if done >= limit:
                    break
        self._report("bpe", done, done)

    def _count_characters(self, batch: Batch) -> int:
        state = self.state.splits[batch.split]
        num = sum(map(len, batch.texts))
        state.characters += num
        state.has_text = state.has_text or any(text and not text.isspace() for text in batch.texts)
        return num

    def _num_characters(self) -> int:
        return sum(state.characters for state in self.state.splits.values())

    def _report(self, stage: str, done: int, total: int | None) -> None:
        if self.progress is not None:
            self.progress(stage, done, total)

    def _commit(self, writers: dict[Split, ShardWriter], cursor: Cursor) -> None:
        """Make all tokens so far durable, then record them in partial.json, from where the next call resumes."""
        for split, writer in writers.items():
            writer.sync()
            self.state.splits[split].shards = [dict(shard) for shard in writer.shards]
        sync_folder(self.folder)
        self.state.cursor = cursor
        write_json(self.folder / PARTIAL, asdict(self.state))

    def _finish(self, tokenizer: Tokenizer, writers: dict[Split, ShardWriter]) -> None:
        splits = {}
        for split, state in self.state.splits.items():
            if not state.has_text:
                raise UserError(f"{self.source.name} is too short: its {split} split holds no text")
            shards = tuple(ShardRecord(**shard) for shard in writers[split].shards)
            splits[split] = SplitRecord(sum(shard.tokens for shard in shards), state.characters, shards)
        meta = CorpusMeta(
            source=self.source.name,
            identity=self.source.identity,
            files=self.files,
            tokenizer_fingerprint=tokenizer.fingerprint,
            tokenizer_config=None if isinstance(self.wanted, Tokenizer) else asdict(self.wanted),
            vocab_size=tokenizer.vocab_size,
            splits=splits,
        )
        with replacing(self.folder / META) as temporary:
            temporary.write_text(meta.to_json(), encoding="utf-8")


def _read_state(folder: Path, plan: dict[str, Any]) -> _State | None:
    """The last commit of a killed preparation with the same plan, if there is one."""
    try:
        document = json.loads((folder / PARTIAL).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(document, dict) or document.get("plan") != json.loads(json.dumps(plan)):
        return None
    splits = {split: _SplitState(**document["splits"][split]) for split in SPLITS}
    return _State(plan, document["cursor"], splits)


def _install(folder: Path, target: Path, replace: bool) -> None:
    """Rename the complete `folder` to `target`."""
    if replace and target.exists():
        # renamed before it is deleted, so that `target` never exists in part
        retired = Path(tempfile.mkdtemp(prefix=f".{target.name}.old.", dir=target.parent))
        try:
            os.rename(target, retired / target.name)
        finally:
            shutil.rmtree(retired, ignore_errors=True)
    os.rename(folder, target)
    # not earlier: a kill before the rename would lose everything
    (target / PARTIAL).unlink(missing_ok=True)
    sync_folder(target.parent)
