"""Prepared corpora: their content, killed preparations, the cache, and damaged directories."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from tarflowlm.data import (
    ByteTokenizer,
    CharTokenizer,
    TokenizerConfig,
    cached_corpus,
    encode_text_source,
    load_tokenizer,
    open_corpus,
    prepare_corpus,
)
from tarflowlm.data.bpe import train_bpe
from tarflowlm.data.splits import SPLITS
from tarflowlm.errors import Progress, UserError

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
    names = {"meta.json", "tokenizer.json", *(f"{split}-00000.bin" for split in SPLITS)}
    assert {path.name for path in (tmp_path / "out").iterdir()} == names
    assert load_tokenizer(tmp_path / "out").fingerprint == corpus.tokenizer.fingerprint


def test_other_directories_are_not_overwritten(text_file, words, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    first = prepare_corpus(str(text_file), CHARS, out)  # an empty directory is fine
    assert prepare_corpus(str(text_file), CHARS, out).meta == first.meta
    other = tmp_path / "other.txt"
    other.write_text(words)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    for source, config, occupied in (
        (other, CHARS, out),
        (text_file, BYTES, out),
        (text_file, CHARS, tmp_path / "mine"),
        (text_file, CHARS, other),
    ):
        with pytest.raises(UserError, match="holds something else"):
            prepare_corpus(str(source), config, occupied)
    text_file.write_text(words + " more")
    with pytest.raises(UserError, match="holds something else"):
        prepare_corpus(str(text_file), CHARS, out)


# killed preparations


class Stopped(Exception):
    pass


class Stopping(Progress):
    """Stops a preparation as it begins to encode for the `stages`-th time."""

    def __init__(self, stages: int) -> None:
        self.left = stages

    def stage(self, name, total=None, done=0):
        self.left -= name.startswith("encoding")
        if not self.left:
            raise Stopped


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("config", [CHARS, BPE], ids=["char", "bpe"])
def test_a_killed_preparation_keeps_the_parts_that_were_done(config, in_parts, tmp_path):
    prepare_corpus("openwebtext", config, tmp_path / "whole")
    for stages in (2, 2):
        with pytest.raises(Stopped):
            prepare_corpus("openwebtext", config, tmp_path / "out", progress=Stopping(stages))
    shards = {path: path.stat().st_mtime_ns for path in (tmp_path / ".out.partial").glob("*.bin")}
    (tmp_path / ".out.partial" / ".part-00002.json.x.tmp").touch()  # of a write that was killed
    assert {path.name for path in shards} >= {"train-00000.bin", "train-00001.bin"}
    prepare_corpus("openwebtext", config, tmp_path / "out")
    for path, written in shards.items():
        assert (tmp_path / "out" / path.name).stat().st_mtime_ns == written
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_another_plan_starts_over(in_parts, tmp_path):
    with pytest.raises(Stopped):
        prepare_corpus("openwebtext", CHARS, tmp_path / "out", progress=Stopping(2))
    for name in ("out", "fresh"):
        prepare_corpus("openwebtext", BYTES, tmp_path / name)
    assert content(tmp_path / "out") == content(tmp_path / "fresh")


def test_a_killed_preparation_of_one_part_leaves_nothing(text_file, tmp_path):
    with pytest.raises(Stopped):
        prepare_corpus(str(text_file), CHARS, tmp_path / "out", progress=Stopping(1))
    assert list(tmp_path.iterdir()) == [text_file]


# the cache


def test_cache_is_used_and_told_apart_by_tokenizer(text_file):
    first = cached_corpus(str(text_file), CHARS)
    assert Path(os.environ["TARFLOWLM_CACHE"]) in first.path.parents
    stamp = (first.path / "meta.json").stat().st_mtime_ns
    assert cached_corpus(str(text_file), CHARS).path == first.path
    assert cached_corpus(str(text_file), first.tokenizer).path == first.path
    assert (first.path / "meta.json").stat().st_mtime_ns == stamp
    assert cached_corpus(str(text_file), BPE).tokenizer.vocab_size == 40


def test_changed_source_is_another_entry(text_file, words):
    first = cached_corpus(str(text_file), CHARS)
    before = np.asarray(first.split("valid")).copy()
    text_file.write_text(words[::-1].strip())
    second = cached_corpus(str(text_file), CHARS)
    assert second.path != first.path
    assert second.tokenizer.decode(second.split("train")[:20]) == " " + words[::-1].strip()[:19]
    np.testing.assert_array_equal(first.split("valid"), before)  # for a run that reads it


@pytest.mark.parametrize("name", ["train-00000.bin", "meta.json", "tokenizer.json"])
def test_damaged_cache_entry_is_prepared_again(name, text_file, caplog):
    first = cached_corpus(str(text_file), CHARS)
    (first.path / name).unlink()
    assert cached_corpus(str(text_file), CHARS).fingerprint == first.fingerprint
    assert len(caplog.messages) == (name != "meta.json")
    assert list(first.path.parent.iterdir()) == [first.path]


def test_prepared_directory_is_opened_where_it_is(text_file, words, tmp_path):
    out = str(tmp_path / "moved")
    prepared = prepare_corpus(str(text_file), CHARS, tmp_path / "out")
    shutil.move(tmp_path / "out", out)
    for tokenizer in (CHARS, prepared.tokenizer):
        assert str(cached_corpus(out, tokenizer).path) == out
    for other in (BYTES, ByteTokenizer(), BPE):
        with pytest.raises(UserError, match="was prepared with another tokenizer"):
            cached_corpus(out, other)
    text_file.unlink()  # the shards do not need it
    cached_corpus(out, CHARS)


# damaged directories


def damage_meta(**changes):
    def damage(folder):
        path = folder / "meta.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return damage


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "train-00000.bin").unlink(), r"train-00000\.bin"),
        (
            lambda folder: os.truncate(folder / "valid-00000.bin", 7),
            r"valid-00000\.bin does not have",
        ),
        (lambda folder: (folder / "tokenizer.json").unlink(), r"tokenizer\.json is no"),
        (lambda folder: ByteTokenizer().save(folder), r"tokenizer\.json is not the one"),
        (lambda folder: (folder / "meta.json").unlink(), r"meta\.json"),
        (lambda folder: (folder / "meta.json").write_bytes(b"\xff"), "cannot be used"),
        (lambda folder: (folder / "meta.json").write_text("[]"), "cannot be used"),
        (damage_meta(plan=[99]), "version 99"),
        (damage_meta(splits={}), "'train'"),
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
    whole = np.asarray(encode_text_source(str(text_file), tokenizer, "all"))
    parts = [encode_text_source(str(text_file), tokenizer, name) for name in SPLITS]
    assert whole.dtype == np.uint8
    assert tokenizer.decode(whole) == words
    np.testing.assert_array_equal(whole, np.concatenate(parts))
    text_file.write_text("one")
    assert len(encode_text_source(str(text_file), tokenizer, "all")) == 4
    assert len(encode_text_source(str(text_file), tokenizer, "valid")) == 0
    with pytest.raises(UserError, match="characters"):
        encode_text_source(str(text_file), CharTokenizer("abc", "none"), "all")


def test_word_pieces_cross_the_cuts_of_a_text_that_is_encoded_whole(tmp_path):
    text = "Once upon a time there was a castle."
    tokenizer = train_bpe([text], 280, alphabet=None, normalization="none")
    file = tmp_path / "short.txt"
    file.write_text(text)
    whole = np.asarray(encode_text_source(str(file), tokenizer, "all"))
    np.testing.assert_array_equal(whole, tokenizer.encode(text))
    parts = [encode_text_source(str(file), tokenizer, name) for name in SPLITS]
    assert len(whole) < sum(map(len, parts))
