"""Prepared corpora: their content, killed preparations, the cache, and damaged directories."""

import contextlib
import json
import os
import random
import shutil
from pathlib import Path

import numpy as np
import pytest

from helpers import flip
from tarflowlm.data import (
    ByteTokenizer,
    CharTokenizer,
    TokenizerConfig,
    load_tokenizer,
    open_corpus,
)
from tarflowlm.data.prepare import cached_corpus, encode_text_source, prepare_corpus
from tarflowlm.data.sources import SPLITS, OpenWebText, TextFile, sources_dir
from tarflowlm.errors import UserError
from tarflowlm.progress import Silent

CHARS = TokenizerConfig()
BYTES = TokenizerConfig(kind="byte", normalize="none")
BPE = TokenizerConfig(kind="bpe", vocab_size=40)


@pytest.mark.parametrize("config", [CHARS, BYTES, BPE], ids=["char", "byte", "bpe"])
def test_splits_are_the_text_cut_in_three(config, text_file, words, tmp_path):
    corpus = prepare_corpus(str(text_file), config, tmp_path / "out")
    decoded = {name: corpus.tokenizer.decode(np.asarray(corpus.split(name))) for name in SPLITS}
    assert "".join(decoded.values()) == words
    for name, percent in (("train", 90), ("valid", 5), ("test", 5)):
        assert abs(len(decoded[name]) - len(words) * percent / 100) <= 1
        assert corpus.num_characters(name) == len(decoded[name])
        assert corpus.num_tokens(name) == len(corpus.split(name))
    corpus.verify()
    flip(tmp_path / "out" / "valid-00000.bin")
    with pytest.raises(UserError, match=r"valid-00000\.bin is damaged"):
        corpus.verify()
    names = {"meta.json", "tokenizer.json", *(f"{split}-00000.bin" for split in SPLITS)}
    assert {path.name for path in (tmp_path / "out").iterdir()} == names
    assert load_tokenizer(tmp_path / "out").fingerprint == corpus.tokenizer.fingerprint


def test_format_stays(words, tmp_path):
    # the values were written by an earlier version
    path = tmp_path / "text.txt"
    path.write_text(words[:100])
    corpus = prepare_corpus(str(path), CHARS, tmp_path / "out", shard_tokens=64)
    assert corpus.fingerprint == "1584a19b076f99c59ccf5d285f513bea4af4aeb080920e2e05581a0062ab4456"
    meta = json.loads((tmp_path / "out" / "meta.json").read_text())
    assert (meta["format"], meta["version"], meta["vocab_size"]) == ("tarflowlm-corpus", 1, 27)
    assert meta["identity"] == meta["files"][0]["path"] == str(path.resolve())
    hashes = (
        "499e92b87cc1bec5af9becb08cdcb193cc99b2aa24711792532d96cd5712ac1e",
        "0009be49c03ecb39331d7e79a1f1dd4ce7a25df695e777f306d95697e8371987",
    )
    shards = [
        {"file": f"train-0000{i}.bin", "tokens": tokens, "sha256": hashes[i]}
        for i, tokens in enumerate((64, 26))
    ]
    assert meta["splits"]["train"] == {"tokens": 90, "characters": 90, "shards": shards}


def test_other_directories_are_not_overwritten(text_file, words, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    first = prepare_corpus(str(text_file), CHARS, out)  # an empty directory is fine
    assert prepare_corpus(str(text_file), CHARS, out).meta == first.meta
    with pytest.raises(
        UserError, match=r"prepared with CharTokenizer.*, not with TokenizerConfig\(kind='byte'"
    ):
        prepare_corpus(str(text_file), BYTES, out)
    other = tmp_path / "other.txt"
    other.write_text(words)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    for source, occupied in ((other, out), (text_file, tmp_path / "mine"), (text_file, other)):
        with pytest.raises(UserError, match="holds something else"):
            prepare_corpus(str(source), CHARS, occupied)
    text_file.write_text(words + " more")
    with pytest.raises(UserError, match=r"words\.txt changed since it was prepared"):
        prepare_corpus(str(text_file), CHARS, out)


# killed preparations

WORDS = [
    "the",
    "Cat",
    "saturated",
    "on",
    "a",
    "mattress,",
    "31",
    "na\u00efve",
    "overgrown",
    "dogs.",
    "x",
]
SMALL_BPE = TokenizerConfig(kind="bpe", vocab_size=300, normalize="none")
CASES = [
    ("text", SMALL_BPE),
    ("text", CHARS),
    pytest.param("documents", SMALL_BPE, marks=pytest.mark.slow),
]


class Stop(Exception):
    pass


@pytest.fixture
def source(tmp_path, monkeypatch):
    """source(kind): the same documents as a text file or as OpenWebText."""
    rng = random.Random(11)
    documents = [" ".join(rng.choices(WORDS, k=rng.randint(0, 90))) for _ in range(400)]
    path = tmp_path / "text.txt"
    path.write_text("\n".join(documents), encoding="utf-8")
    monkeypatch.setattr(OpenWebText, "block", 3000)
    monkeypatch.setattr(OpenWebText, "shares", (80, 90))

    def make(kind):
        if kind == "text":
            return TextFile(path, block=2000)
        datasets = pytest.importorskip("datasets")
        parquet = sources_dir() / "openwebtext" / "all.parquet"
        if not parquet.exists():
            parquet.parent.mkdir(parents=True)
            datasets.Dataset.from_dict({"text": documents}).to_parquet(parquet)
        return OpenWebText()

    return make


def content(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


class Stopping(Silent):
    """Stops a preparation after a number of encoded batches."""

    def __init__(self, batches: int) -> None:
        self.batches, self.encodes = batches, False

    def stage(self, name, total=None, done=0):
        self.encodes = name.startswith("encoding")

    def advance(self, count=1):
        self.batches -= self.encodes
        if not self.batches:
            raise Stop


@pytest.mark.parametrize(("kind", "config"), CASES)
def test_resumed_corpus_is_the_same_and_no_finished_shard_is_made_again(
    kind, config, source, tmp_path
):
    prepare_corpus(source(kind), config, tmp_path / "whole", shard_tokens=4000)
    seen: dict[str, int] = {}
    for batches in (30, 40, 30, 40, 1000):
        with contextlib.suppress(Stop):
            prepare_corpus(
                source(kind),
                config,
                tmp_path / "out",
                shard_tokens=4000,
                progress=Stopping(batches),
            )
            break
        shards = {
            path.name: path.stat().st_mtime_ns for path in (tmp_path / ".out.partial").glob("*.bin")
        }
        assert shards.items() >= seen.items()
        seen = shards
    assert content(tmp_path / "out") == content(tmp_path / "whole")
    assert len(seen) >= 2


@pytest.mark.parametrize("change", ["shards", "tokenizer", "text", "damage"])
def test_another_plan_or_damage_starts_over(change, source, tmp_path):
    sizes, config, path = {"shard_tokens": 3000}, SMALL_BPE, source("text").path
    with pytest.raises(Stop):
        prepare_corpus(source("text"), config, tmp_path / "out", progress=Stopping(30), **sizes)
    notes = tmp_path / ".out.partial" / "resume.npz"
    match change:
        case "shards":
            sizes = {"shard_tokens": 20_000}
        case "tokenizer":
            config = BYTES
        case "text":
            path.write_text(path.read_text(encoding="utf-8")[::-1], encoding="utf-8")
        case _:
            notes.write_bytes(notes.read_bytes()[:-99])
    for name in ("out", "fresh"):
        prepare_corpus(source("text"), config, tmp_path / name, **sizes)
    assert content(tmp_path / "out") == content(tmp_path / "fresh")


# the cache


def test_cache_is_used_and_told_apart_by_tokenizer(text_file, tmp_path):
    first = cached_corpus(str(text_file), cache_dir=tmp_path / "cache")
    assert Path(os.environ["TARFLOWLM_CACHE"]) in cached_corpus(str(text_file)).path.parents
    stamp = (first.path / "meta.json").stat().st_mtime_ns
    assert cached_corpus(str(text_file), CHARS, tmp_path / "cache").path == first.path
    assert cached_corpus(str(text_file), first.tokenizer, tmp_path / "cache").path == first.path
    assert (first.path / "meta.json").stat().st_mtime_ns == stamp
    assert cached_corpus(str(text_file), BPE, tmp_path / "cache").tokenizer.vocab_size == 40


def test_changed_source_is_prepared_again_with_a_warning(text_file, words, caplog):
    first = cached_corpus(str(text_file))
    mapped = first.split("valid")
    before = np.asarray(mapped).copy()
    os.utime(text_file, ns=(1, 1))
    cached_corpus(str(text_file))  # touched, but the same
    assert not caplog.messages
    text_file.write_text(words[::-1].strip())
    second = cached_corpus(str(text_file))
    assert second.path == first.path
    assert second.tokenizer.decode(second.split("train")[:20]) == " " + words[::-1].strip()[:19]
    assert len(caplog.messages) == 1
    assert "words.txt changed since it was prepared" in caplog.messages[0]
    np.testing.assert_array_equal(mapped, before)  # a run that reads the old one goes on


@pytest.mark.parametrize("name", ["train-00000.bin", "meta.json", "tokenizer.json"])
def test_damaged_cache_entry_is_prepared_again(name, text_file, caplog):
    first = cached_corpus(str(text_file))
    (first.path / name).unlink()
    assert cached_corpus(str(text_file)).fingerprint == first.fingerprint
    assert len(caplog.messages) == (name != "meta.json")
    assert list(first.path.parent.iterdir()) == [first.path]


def test_prepared_directory_is_opened_where_it_is(text_file, words, tmp_path):
    out = str(tmp_path / "moved")
    prepared = prepare_corpus(str(text_file), CHARS, tmp_path / "out")
    shutil.move(tmp_path / "out", out)
    for tokenizer in (None, CHARS, prepared.tokenizer):
        assert str(cached_corpus(out, tokenizer).path) == out
    for other in (BYTES, ByteTokenizer(), BPE):
        with pytest.raises(UserError, match="was prepared with CharTokenizer"):
            cached_corpus(out, other)
    text_file.write_text(words + " changed")
    with pytest.raises(UserError, match=r"words\.txt changed since"):
        cached_corpus(out)
    text_file.unlink()  # the shards do not need it
    cached_corpus(out)


# damaged directories


def damage_meta(**changes):
    def damage(folder):
        path = folder / "meta.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return damage


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "train-00000.bin").unlink(), r"train-00000\.bin is missing"),
        (
            lambda folder: os.truncate(folder / "valid-00000.bin", 7),
            r"valid-00000\.bin does not have",
        ),
        (lambda folder: (folder / "tokenizer.json").unlink(), r"tokenizer\.json does not exist"),
        (lambda folder: ByteTokenizer().save(folder), r"tokenizer\.json is not the one"),
        (lambda folder: (folder / "meta.json").unlink(), r"meta\.json is missing"),
        (lambda folder: (folder / "meta.json").write_bytes(b"\xff"), "cannot be used"),
        (lambda folder: (folder / "meta.json").write_text("[]"), "cannot be used"),
        (damage_meta(version=99), "version 99"),
        (damage_meta(splits={}), "no 'train'"),
    ],
)
def test_damaged_directories_are_refused(damage, message, text_file, tmp_path):
    prepare_corpus(str(text_file), CHARS, tmp_path / "out")
    damage(tmp_path / "out")
    with pytest.raises(UserError, match=message) as caught:
        open_corpus(tmp_path / "out")
    assert "\n" not in str(caught.value)


# another text


def test_another_text_is_encoded_with_a_given_tokenizer(text_file, words):
    tokenizer = CharTokenizer("zyxwvutsrqponmlkjihgfedcba ", "text8")
    text_file.write_text(words.upper())
    tokens = encode_text_source(str(text_file), tokenizer, ["train", "valid", "test", "all"])
    whole = np.asarray(tokens["all"])
    assert whole.dtype == np.uint8
    assert tokenizer.decode(whole) == words
    np.testing.assert_array_equal(whole, np.concatenate([tokens[name] for name in SPLITS]))
    text_file.write_text("one")
    short = encode_text_source(str(text_file), tokenizer, ["train", "valid", "test", "all"])
    assert len(short["all"]) == 4
    with pytest.raises(UserError, match="characters"):
        encode_text_source(str(text_file), CharTokenizer("abc", "none"))
