"""Prepared corpora: their content, killed preparations, the cache, and damaged directories."""

import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from helpers import encoded, prepared
from tarflowlm.data import (
    ByteTokenizer,
    CharTokenizer,
    TokenizerConfig,
    load_tokenizer,
    open_corpus,
)
from tarflowlm.data.bpe import train_bpe
from tarflowlm.data.splits import SPLITS
from tarflowlm.errors import Progress, UserError

CHARS = TokenizerConfig()
BYTES = TokenizerConfig(kind="byte", normalize="none")
BPE = TokenizerConfig(kind="bpe", vocab_size=40)


@pytest.mark.parametrize("config", [CHARS, BYTES, BPE], ids=["char", "byte", "bpe"])
def test_splits_are_the_text_cut_in_three(config, text_file, words, tmp_path):
    corpus = prepared(str(text_file), config, tmp_path / "out")
    decoded = {name: corpus.tokenizer.decode(np.asarray(corpus.split(name))) for name in SPLITS}
    assert "".join(decoded.values()) == words
    for name, percent in (("train", 90), ("valid", 5), ("test", 5)):
        assert abs(len(decoded[name]) - len(words) * percent / 100) <= 1
        assert corpus.num_characters(name) == len(decoded[name])
        assert corpus.num_tokens(name) == len(corpus.split(name))
    names = {"meta.json", "tokenizer.json", *(f"{split}.bin" for split in SPLITS)}
    assert {path.name for path in (tmp_path / "out").iterdir()} == names
    assert load_tokenizer(tmp_path / "out").fingerprint == corpus.tokenizer.fingerprint


def test_other_directories_are_not_overwritten(text_file, words, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    first = prepared(str(text_file), CHARS, out)  # an empty directory is fine
    assert prepared(str(text_file), CHARS, out).meta == first.meta
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
            prepared(str(source), config, occupied)
    text_file.write_text(words + " more")
    with pytest.raises(UserError, match="holds something else"):
        prepared(str(text_file), CHARS, out)


class Stopped(Exception):
    pass


class Stopping(Progress):
    """Stops a preparation as it begins to encode."""

    def stage(self, name, total=None, done=0):
        if name.startswith("encoding"):
            raise Stopped


def test_a_stopped_preparation_leaves_nothing_and_a_killed_one_starts_again(text_file, tmp_path):
    with pytest.raises(Stopped):
        prepared(text_file, CHARS, tmp_path / "out", progress=Stopping())
    assert list(tmp_path.iterdir()) == [text_file]
    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.partial" / "train.bin").touch()
    prepared(text_file, CHARS, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "words.txt"]


def test_of_several_at_once_one_prepares(text_file, tmp_path):
    with ThreadPoolExecutor(3) as threads:
        made = list(threads.map(prepared, [text_file] * 3, [CHARS] * 3, [tmp_path / "out"] * 3))
    assert len({(one.path / "meta.json").stat().st_mtime_ns for one in made}) == 1
    assert len({one.fingerprint for one in made}) == 1


# the cache


def test_cache_is_used_and_told_apart_by_tokenizer(text_file):
    first = prepared(str(text_file), CHARS)
    assert Path(os.environ["TARFLOWLM_CACHE"]) in first.path.parents
    stamp = (first.path / "meta.json").stat().st_mtime_ns
    assert prepared(str(text_file), CHARS).path == first.path
    assert prepared(str(text_file), first.tokenizer).path == first.path
    assert (first.path / "meta.json").stat().st_mtime_ns == stamp
    assert prepared(str(text_file), BPE).tokenizer.vocab_size == 40


def test_a_cache_that_cannot_be_written_to_is_read(text_file, tmp_path, monkeypatch):
    first = prepared(str(text_file), CHARS)
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert prepared(str(text_file), CHARS).path == first.path
    with pytest.raises(UserError, match="cannot be written to: set TARFLOWLM_CACHE"):
        prepared(str(text_file), BPE)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["words.txt"]


def test_changed_source_is_another_entry(text_file, words):
    first = prepared(str(text_file), CHARS)
    before = np.asarray(first.split("valid")).copy()
    text_file.write_text(words[::-1].strip())
    second = prepared(str(text_file), CHARS)
    assert second.path != first.path
    assert second.tokenizer.decode(second.split("train")[:20]) == " " + words[::-1].strip()[:19]
    np.testing.assert_array_equal(first.split("valid"), before)  # for a run that reads it


@pytest.mark.parametrize("name", ["train.bin", "meta.json", "tokenizer.json"])
def test_damaged_cache_entry_is_prepared_again(name, text_file, caplog):
    first = prepared(str(text_file), CHARS)
    (first.path / name).unlink()
    assert prepared(str(text_file), CHARS).fingerprint == first.fingerprint
    assert len(caplog.messages) == (name != "meta.json")
    assert list(first.path.parent.iterdir()) == [first.path]


def test_prepared_directory_is_opened_where_it_is(text_file, words, tmp_path):
    out = str(tmp_path / "moved")
    moved = prepared(str(text_file), CHARS, tmp_path / "out")
    shutil.move(tmp_path / "out", out)
    for tokenizer in (CHARS, moved.tokenizer):
        assert str(prepared(out, tokenizer).path) == out
    for other in (BYTES, ByteTokenizer(), BPE):
        with pytest.raises(UserError, match="was prepared with another tokenizer"):
            prepared(out, other)
    # no configuration describes a tokenizer that was given
    given = prepared(str(text_file), ByteTokenizer(), tmp_path / "given")
    left_open = prepared(str(given.path), TokenizerConfig(normalize="auto"))
    assert left_open.fingerprint == given.fingerprint
    text_file.unlink()  # the tokens do not need it
    prepared(out, CHARS)


# damaged directories


def damage_meta(**changes):
    def damage(folder):
        path = folder / "meta.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return damage


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "train.bin").unlink(), r"train\.bin"),
        (
            lambda folder: os.truncate(folder / "valid.bin", 7),
            r"valid\.bin does not have",
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
    prepared(str(text_file), CHARS, tmp_path / "out")
    damage(tmp_path / "out")
    with pytest.raises(UserError, match=message) as caught:
        open_corpus(tmp_path / "out")
    assert "\n" not in str(caught.value)


# another text


def test_another_text_is_encoded_with_a_given_tokenizer(text_file, words):
    tokenizer = CharTokenizer("zyxwvutsrqponmlkjihgfedcba ", "text8")
    text_file.write_text(words.upper())
    whole = np.asarray(encoded(str(text_file), tokenizer, "all"))
    parts = [encoded(str(text_file), tokenizer, name) for name in SPLITS]
    assert whole.dtype == np.uint8
    assert tokenizer.decode(whole) == words
    np.testing.assert_array_equal(whole, np.concatenate(parts))
    text_file.write_text("one")
    assert len(encoded(str(text_file), tokenizer, "all")) == 4
    assert len(encoded(str(text_file), tokenizer, "valid")) == 0
    with pytest.raises(UserError, match="characters"):
        encoded(str(text_file), CharTokenizer("abc", "none"), "all")


def test_word_pieces_cross_the_cuts_of_a_text_that_is_encoded_whole(tmp_path):
    text = "Once upon a time there was a castle."
    tokenizer = train_bpe([text], 280, alphabet=None, normalization="none")
    file = tmp_path / "short.txt"
    file.write_text(text)
    whole = np.asarray(encoded(str(file), tokenizer, "all"))
    np.testing.assert_array_equal(whole, tokenizer.encode(text))
    parts = [encoded(str(file), tokenizer, name) for name in SPLITS]
    assert len(whole) < sum(map(len, parts))
