"""Preparing a corpus: killed at any instant and resumed, in several processes at once, in constant memory."""

import contextlib
import gc
import multiprocessing
import os
import random
import signal
import time
import tracemalloc
from collections.abc import Callable
from concurrent.futures import Executor, Future
from pathlib import Path

import pytest

from tarflowlm.data import TokenizerConfig, open_corpus, prepare_corpus
from tarflowlm.data.bpe import train_bpe
from tarflowlm.data.download import sources_dir
from tarflowlm.data.openwebtext import Documents, DocumentsSpec
from tarflowlm.data.shards import ShardWriter
from tarflowlm.data.sources import TextFile
from tarflowlm.data.stream import Source
from tarflowlm.errors import UserError

BPE = TokenizerConfig(kind="bpe", vocab_size=300, normalize="none")
CHARS = TokenizerConfig()
SMALL = {"shard_tokens": 3000, "commit_characters": 4000}
SPEC = DocumentsSpec(name="small", repository="no/such", percent={"train": 80, "valid": 10, "test": 10}, block=3000)


def source_of(kind: str) -> Source:
    return Documents(SPEC) if kind == "documents" else TextFile(Path("text.txt"), block=2000)


def prepare(kind: str, config: TokenizerConfig, out: Path) -> None:
    prepare_corpus(source_of(kind), config, out, **SMALL)


def prepare_there(folder: str, cache: str, *args) -> None:
    """`prepare`, in another process."""
    os.chdir(folder)
    os.environ["TARFLOWLM_CACHE"] = cache
    prepare(*args)


def content(folder: Path) -> dict[str, bytes]:
    # killed right after the last rename, a preparation leaves its notes behind
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "partial.json"}


@pytest.fixture
def texts() -> str:
    """Texts of the kinds that `source_of` reads, in the current directory and the cache."""
    rng = random.Random(11)
    words = ["the", "Cat", "saturated", "on", "a", "mattress,", "31", "na\u00efve", "overgrown", "dogs.", "x"]
    documents = [" ".join(rng.choices(words, k=rng.randint(0, 90))) for _ in range(400)]
    text = "\n".join(documents)
    Path("text.txt").write_text(text, encoding="utf-8")
    return text


@pytest.fixture
def parquet(texts) -> None:
    datasets = pytest.importorskip("datasets")
    sources_dir().joinpath("small").mkdir(parents=True)
    lines = texts.split("\n")
    for i in range(3):
        part = datasets.Dataset.from_dict({"text": lines[i::3]})
        part.to_parquet(sources_dir() / "small" / f"{i}.parquet")


@pytest.fixture(scope="session")
def in_process() -> Callable[..., multiprocessing.Process]:
    """Starts `prepare` in a new process that has everything imported already."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tarflowlm.data.openwebtext", "datasets"])

    def start(*args):
        process = context.Process(target=prepare_there, args=(os.getcwd(), os.environ["TARFLOWLM_CACHE"], *args))
        process.start()
        return process

    return start


CASES = [("text", BPE), ("text", CHARS), ("documents", BPE)]


@pytest.mark.usefixtures("parquet")
@pytest.mark.parametrize(("kind", "config"), CASES, ids=["bpe", "char", "documents"])
def test_killed_at_any_instant_it_ends_the_same(kind, config, in_process, tmp_path):
    prepare(kind, config, tmp_path / "whole")
    expected = content(tmp_path / "whole")
    assert len(expected) > 8
    out, partial = tmp_path / "killed", tmp_path / ".killed.partial"
    rng = random.Random(len(kind))
    kills = 0
    while True:
        process = in_process(kind, config, out)
        wait_for_commits(process, partial / "partial.json", rng.randint(0, 10) if kills else 0)
        time.sleep(rng.uniform(0, 0.01))
        process.kill()
        process.join()
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
        kills += 1
    assert content(out) == expected
    open_corpus(out).verify()
    assert not partial.exists()
    assert kills >= 3


def wait_for_commits(process, notes: Path, number: int) -> None:
    """Returns when `notes` was written so many times, or the process ended."""
    seen: set[int] = set()
    while process.is_alive() and len(seen) < number:
        with contextlib.suppress(FileNotFoundError):
            seen.add(notes.stat().st_mtime_ns)
        time.sleep(0.0005)


class Stop(Exception):
    pass


@pytest.mark.usefixtures("parquet")
@pytest.mark.parametrize(("kind", "config"), CASES, ids=["bpe", "char", "documents"])
def test_stopped_after_any_number_of_writes_it_ends_the_same(kind, config, tmp_path, monkeypatch):
    prepare(kind, config, tmp_path / "whole")
    expected = content(tmp_path / "whole")
    real = ShardWriter.write
    allowed = 0

    def write(self, tokens):
        nonlocal allowed
        if allowed == 0:
            raise Stop
        allowed -= 1
        real(self, tokens)

    monkeypatch.setattr(ShardWriter, "write", write)
    progress = []
    while not (tmp_path / "out").exists():
        allowed = 7
        try:
            prepare(kind, config, tmp_path / "out")
        except Stop:
            assert (tmp_path / ".out.partial" / "partial.json").exists()
            progress.append(sum(path.stat().st_size for path in (tmp_path / ".out.partial").glob("*.bin")))
    assert len(progress) > 3
    assert progress == sorted(progress)
    assert content(tmp_path / "out") == expected


@pytest.mark.parametrize(
    "change",
    [
        lambda: (BPE, {"shard_tokens": 999}),
        lambda: (TokenizerConfig(kind="byte", normalize="none"), {}),
        lambda: (BPE, {}, Path("text.txt").write_text(Path("text.txt").read_text()[::-1])),
    ],
    ids=["shards", "tokenizer", "text"],
)
@pytest.mark.usefixtures("texts")
def test_another_plan_starts_over(change, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        real = ShardWriter.write
        calls = []

        def write(self, tokens):
            calls.append(tokens)
            if len(calls) > 20:
                raise Stop
            real(self, tokens)

        patch.setattr(ShardWriter, "write", write)
        with pytest.raises(Stop):
            prepare("text", BPE, tmp_path / "out")
    assert (tmp_path / ".out.partial" / "partial.json").exists()
    config, sizes, *_ = change()
    for name in ("out", "fresh"):
        prepare_corpus(source_of("text"), config, tmp_path / name, **(SMALL | sizes))
    assert content(tmp_path / "out") == content(tmp_path / "fresh")


@pytest.mark.usefixtures("texts")
@pytest.mark.parametrize("damage", ["cut", "gone", "no json"])
def test_damaged_leftovers_are_not_built_upon(damage, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(TextFile, "stream", _failing(TextFile.stream, after=30))
        with pytest.raises(Stop):
            prepare("text", CHARS, tmp_path / "out")
    folder = tmp_path / ".out.partial"
    shard = folder / "train-00001.bin"
    if damage == "no json":
        (folder / "partial.json").write_text('{"plan": ')
        prepare("text", CHARS, tmp_path / "out")
        open_corpus(tmp_path / "out").verify()
        return
    shard.write_bytes(shard.read_bytes()[:-1]) if damage == "cut" else shard.unlink()
    with pytest.raises(UserError, match=r"train-00001\.bin lost some of its 3,000 bytes: remove .*\.out\.partial"):
        prepare("text", CHARS, tmp_path / "out")


def _failing(real, after):
    def stream(*args, **kwargs):
        found = real(*args, **kwargs)

        def batches():
            for i, batch in enumerate(found.batches):
                if i == after:
                    raise Stop
                yield batch

        return type(found)(batches(), found.total)

    return stream


@pytest.mark.usefixtures("texts")
def test_of_several_processes_one_prepares(in_process, tmp_path):
    processes = [in_process("text", BPE, tmp_path / "out") for _ in range(3)]
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    open_corpus(tmp_path / "out").verify()
    assert {path.name for path in tmp_path.iterdir()} - {".out.lock"} == {"out"}


class InTurn(Executor):
    """Each task at once, in the caller's thread: how many overlap is no matter of luck."""

    def submit(self, task, /, *args, **kwargs):
        future = Future()
        future.set_result(task(*args, **kwargs))
        return future


@pytest.mark.parametrize("tokenizer", ["byte", "bpe"])
def test_memory_does_not_grow_with_the_text(tokenizer, words, tmp_path, monkeypatch):
    monkeypatch.setattr("tarflowlm.data.text._BLOCK", 1 << 14)
    monkeypatch.setattr("tarflowlm.data.prepare.ThreadPoolExecutor", lambda _: InTurn())
    config = TokenizerConfig(kind="byte", normalize="none")
    given = train_bpe([words], 300, alphabet=None, normalization="none") if tokenizer == "bpe" else config
    peaks = []
    for repeats in (20, 100):
        path = tmp_path / f"{repeats}.txt"
        path.write_text(words * repeats)
        gc.collect()  # what earlier tests left behind is not to be freed and allocated in between
        tracemalloc.start()
        prepare_corpus(TextFile(path, block=1 << 14), given, tmp_path / f"out{repeats}", shard_tokens=1 << 16)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.5 * peaks[0]


def test_the_text_may_not_change_while_it_is_read(texts, tmp_path, monkeypatch):
    real = TextFile._count_characters

    def count(self, *args):
        total = real(self, *args)
        self.path.write_text(texts + " more")
        return total

    monkeypatch.setattr(TextFile, "_count_characters", count)
    with pytest.raises(UserError, match=r"text\.txt changed while it was read"):
        prepare("text", CHARS, tmp_path / "out")
    assert not (tmp_path / "out").exists()
