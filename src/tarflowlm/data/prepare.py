"""Writing a prepared corpus: streamed, in memory that does not grow with the text, and gone on with after a kill.

What is not finished lies in `.<name>.partial` beside the target: shards, tokenizer.json, and partial.json, which says
how far they are valid and where the source goes on. The folder becomes the target in one rename.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tarflowlm.data.config import TokenizerConfig, build_tokenizer
from tarflowlm.data.corpus import Corpus, check_tokenizer, is_empty_dir, open_corpus
from tarflowlm.data.encode import encode_in_order
from tarflowlm.data.meta import CorpusMeta, FileRecord, ShardRecord, SplitRecord
from tarflowlm.data.registry import resolve_source
from tarflowlm.data.shards import ShardWriter, token_dtype
from tarflowlm.data.sources import SPLITS, Batch, CorpusProgress, Cursor, Notice, Source, Split
from tarflowlm.data.tokenizer import Tokenizer, load_tokenizer
from tarflowlm.errors import UserError
from tarflowlm.files import replacing, sync_folder, waiting_lock, write_json

SHARD_TOKENS = 1 << 26
COMMIT_CHARACTERS = 1 << 26
"""Characters between two points where a stopped preparation goes on."""
BPE_CHARACTERS = 1 << 27
"""BPE is learnt from at most so many characters of the training split: the words it counts need memory."""
PARTIAL = "partial.json"


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
    """Reads, normalises, splits and encodes `source` (a corpus name or a text file) into the directory `out`.

    `out` appears complete or not at all. If it already holds this very corpus it is opened as it is;
    UserError if it holds anything else, and for every problem with the source, its characters or the
    tokenizer. A call that was killed is gone on with by the next one like it, every `commit_characters` characters,
    to the same bytes. Of several processes one prepares, the others wait.
    """
    target = Path(out)
    found = source if isinstance(source, Source) else resolve_source(source)
    if target.exists() and not is_empty_dir(target):
        corpus = open_corpus(target) if (target / "meta.json").is_file() else None
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
    """As `prepare_corpus`, for a resolved source; `replace` puts it in the place of what `target` holds."""
    files = tuple(FileRecord.of(path) for path in source.obtain(progress, notice))
    folder = target.with_name(f".{target.name}.partial")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with waiting_lock(target):
            if not replace and (target / "meta.json").is_file():
                return open_corpus(target)  # another process was faster
            writing = _Writing(source, tokenizer, files, folder, shard_tokens, progress)
            try:
                writing.run(commit_characters)
            except BaseException:
                if writing.state.cursor is None:
                    shutil.rmtree(folder, ignore_errors=True)
                raise
            _install(folder, target, replace)
    except OSError as error:
        raise UserError(f"cannot write to {error.filename or target}: {error.strerror or error}") from None
    return open_corpus(target)


@dataclass
class _SplitState:
    characters: int = 0
    has_text: bool = False
    """Whether there is more than white space."""
    shards: list[dict[str, Any]] = field(default_factory=list)


@dataclass
class _State:
    """Content of partial.json."""

    plan: dict[str, Any]
    """All that the shards depend on; a directory with another plan is of no use."""
    cursor: Cursor | None
    splits: dict[Split, _SplitState]


class _Writing:
    """One preparation, from the start or from where an earlier one was stopped."""

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
        """None for one that is yet to be trained."""
        if isinstance(wanted, Tokenizer):
            self.tokenizer, made_by = wanted, wanted.fingerprint
        elif wanted.needs_training:
            made_by = json.dumps(asdict(wanted))
        else:
            self.tokenizer = build_tokenizer(wanted)
            made_by = self.tokenizer.fingerprint
        plan = {
            "identity": source.identity,
            "settings": source.settings,
            "files": [file.sha256 for file in files],
            "tokenizer": made_by,
            "shard_tokens": shard_tokens,
        }
        self.state = _read_state(folder, plan) or _State(plan, None, {split: _SplitState() for split in SPLITS})

    def run(self, commit_characters: int) -> None:
        """Leaves a complete corpus in the folder."""
        if self.state.cursor is None:
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder.mkdir()
        for unfinished in self.folder.glob(".*"):
            unfinished.unlink()  # of a kill while a file was replaced
        tokenizer = self._tokenizer()
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
                uncommitted += self._count(batch)
                self._report("encode", self._characters(), stream.total)
                if batch.cursor is not None and uncommitted >= commit_characters:
                    self._commit(writers, batch.cursor)
                    uncommitted = 0
        self._report("encode", self._characters(), self._characters())
        self._finish(tokenizer, writers)

    def _tokenizer(self) -> Tokenizer:
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

    def _count(self, batch: Batch) -> int:
        state = self.state.splits[batch.split]
        num = sum(map(len, batch.texts))
        state.characters += num
        state.has_text = state.has_text or any(text and not text.isspace() for text in batch.texts)
        return num

    def _characters(self) -> int:
        return sum(state.characters for state in self.state.splits.values())

    def _report(self, stage: str, done: int, total: int | None) -> None:
        if self.progress is not None:
            self.progress(stage, done, total)

    def _commit(self, writers: dict[Split, ShardWriter], cursor: Cursor) -> None:
        """From here the next call goes on: tokens first, then the file that counts them."""
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
        with replacing(self.folder / "meta.json") as temporary:
            temporary.write_text(meta.to_json(), encoding="utf-8")


def _read_state(folder: Path, plan: dict[str, Any]) -> _State | None:
    """Where a preparation of the same plan was stopped, if there was one."""
    try:
        document = json.loads((folder / PARTIAL).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(document, dict) or document.get("plan") != json.loads(json.dumps(plan)):
        return None
    splits = {split: _SplitState(**document["splits"][split]) for split in SPLITS}
    return _State(plan, document["cursor"], splits)


def _install(folder: Path, target: Path, replace: bool) -> None:
    """Renames `folder` to `target`."""
    if replace and target.exists():
        # renamed away before it is deleted, so that `target` is never there in part
        retired = Path(tempfile.mkdtemp(prefix=f".{target.name}.old.", dir=target.parent))
        try:
            os.rename(target, retired / target.name)
        finally:
            shutil.rmtree(retired, ignore_errors=True)
    os.rename(folder, target)
    # not before: a kill in between would lose all
    (target / PARTIAL).unlink(missing_ok=True)
    sync_folder(target.parent)
