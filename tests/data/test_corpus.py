"""Prepared corpora: content, atomicity, and every way a directory can be wrong."""

import json
import lzma
import os
import shutil

import numpy as np
import pytest

from tarflowlm.data import (
    ByteTokenizer,
    CharTokenizer,
    TokenizerConfig,
    encode_text_source,
    load_tokenizer,
    open_corpus,
    prepare_corpus,
)
from tarflowlm.data.shards import ShardWriter, token_dtype
from tarflowlm.errors import UserError

CHARS = TokenizerConfig()
BYTES = TokenizerConfig(kind="byte", normalize="none")
BPE = TokenizerConfig(kind="bpe", vocab_size=40)


@pytest.mark.parametrize("config", [CHARS, BYTES, BPE], ids=["char", "byte", "bpe"])
def test_the_splits_are_the_text_cut_in_three(config, text_file, words, tmp_path):
    corpus = prepare_corpus(str(text_file), config, tmp_path / "out")
    decoded = {name: corpus.tokenizer.decode(np.asarray(corpus.split(name))) for name in ("train", "valid", "test")}
    assert "".join(decoded.values()) == words
    for name, percent in (("train", 90), ("valid", 5), ("test", 5)):
        assert abs(len(decoded[name]) - len(words) * percent / 100) <= 1
        assert corpus.num_characters(name) == len(decoded[name])
        assert corpus.num_tokens(name) == len(corpus.split(name))
        ids = np.asarray(corpus.split(name))
        assert corpus.tokenizer.characters_per_token[ids].sum() == corpus.num_characters(name)
    corpus.verify()
    corpus.check_source()
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "meta.json",
        "test-00000.bin",
        "tokenizer.json",
        "train-00000.bin",
        "valid-00000.bin",
    ]
    assert load_tokenizer(tmp_path / "out").fingerprint == corpus.tokenizer.fingerprint


def test_bpe_is_trained_on_the_training_split_alone(text_file, words, tmp_path):
    corpus = prepare_corpus(str(text_file), BPE, tmp_path / "out")
    text_file.write_text(words[: len(words) * 95 // 100] + "q" * (len(words) - len(words) * 95 // 100))
    other = prepare_corpus(str(text_file), BPE, tmp_path / "other")
    assert corpus.tokenizer.fingerprint == other.tokenizer.fingerprint


def test_text_is_normalised_before_it_is_cut(tmp_path):
    path = tmp_path / "cased.txt"
    path.write_text("The Year 1984, naïve! " * 50, encoding="utf-8")
    corpus = prepare_corpus(str(path), CHARS, tmp_path / "out")
    text = corpus.tokenizer.decode(corpus.split("train")[:40])
    assert text == " the year one nine eight four na ve the "


def test_small_shards_hold_the_same_tokens(text_file, tmp_path):
    whole = prepare_corpus(str(text_file), BPE, tmp_path / "whole")
    parts = prepare_corpus(str(text_file), BPE, tmp_path / "parts", shard_tokens=1000)
    assert (tmp_path / "parts" / "train-00003.bin").exists()
    for name in ("train", "valid", "test"):
        np.testing.assert_array_equal(np.asarray(whole.split(name)), np.asarray(parts.split(name)))


@pytest.mark.parametrize(("size", "dtype"), [(256, "u1"), (257, "<u2"), (65536, "<u2"), (65537, "<u4")])
def test_ids_are_stored_in_the_smallest_type(size, dtype):
    assert token_dtype(size) == np.dtype(dtype)


def test_meta_tells_where_the_text_came_from(text_file, tmp_path):
    prepare_corpus(str(text_file), CHARS, tmp_path / "out")
    meta = json.loads((tmp_path / "out" / "meta.json").read_text())
    assert (meta["format"], meta["version"], meta["vocab_size"]) == ("tarflowlm-corpus", 1, 27)
    (file,) = meta["files"]
    assert file["path"] == str(text_file.resolve())
    assert file["size"] == text_file.stat().st_size
    assert file["mtime_ns"] == text_file.stat().st_mtime_ns
    assert len(file["sha256"]) == 64


def test_progress_reaches_the_end_of_every_stage(text_file, tmp_path):
    calls = []
    prepare_corpus(str(text_file), BPE, tmp_path / "out", progress=lambda *call: calls.append(call))
    # the text is counted, learnt from (which counts it again), and encoded
    stages = list(dict.fromkeys(stage for stage, _, _ in calls))
    assert stages == ["count", "bpe", "encode"]
    for stage in ("bpe", "encode"):
        done, total = [call[1:] for call in calls if call[0] == stage][-1]
        assert done == total > 0


def test_a_finished_directory_is_opened_again(text_file, tmp_path):
    first = prepare_corpus(str(text_file), CHARS, tmp_path / "out")
    stamp = (tmp_path / "out" / "meta.json").stat().st_mtime_ns
    again = prepare_corpus(str(text_file), CHARS, tmp_path / "out")
    assert again.meta == first.meta
    assert (tmp_path / "out" / "meta.json").stat().st_mtime_ns == stamp


def test_other_directories_are_not_overwritten(text_file, words, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    prepare_corpus(str(text_file), CHARS, out)  # an empty directory is fine
    with pytest.raises(UserError, match=r"prepared with CharTokenizer.*, not with kind='byte'"):
        prepare_corpus(str(text_file), BYTES, out)
    other = tmp_path / "other.txt"
    other.write_text(words)
    with pytest.raises(UserError, match="holds something else"):
        prepare_corpus(str(other), CHARS, out)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    for occupied in (tmp_path / "mine", other):
        with pytest.raises(UserError, match="holds something else"):
            prepare_corpus(str(text_file), CHARS, occupied)
    text_file.write_text(words + " more")
    with pytest.raises(UserError, match=r"as it was before .*words\.txt changed"):
        prepare_corpus(str(text_file), CHARS, out)


def test_a_failure_leaves_nothing_behind(text_file, tmp_path, monkeypatch):
    before = sorted(tmp_path.iterdir())

    def fail(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(ShardWriter, "write", fail)
    with pytest.raises(KeyboardInterrupt):
        prepare_corpus(str(text_file), CHARS, tmp_path / "out")
    assert sorted(path for path in tmp_path.iterdir() if path.suffix != ".lock") == before
    (tmp_path / "cased.txt").write_text("Upper Case " * 100)
    with pytest.raises(UserError, match="not in the tokenizer"):
        prepare_corpus(str(tmp_path / "cased.txt"), TokenizerConfig(normalize="none"), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert {path.name for path in tmp_path.iterdir() if path.name.startswith(".")} <= {".out.lock"}


def test_an_unwritable_place_is_one_line(text_file):
    with pytest.raises(UserError, match="cannot write to"):
        prepare_corpus(str(text_file), CHARS, text_file / "below" / "out")


@pytest.mark.parametrize("text", ["a", "1", "....... " * 100])
def test_texts_without_three_splits_are_refused(text, tmp_path):
    path = tmp_path / "short.txt"
    path.write_text(text)
    with pytest.raises(UserError, match="too short"):
        prepare_corpus(str(path), CHARS, tmp_path / "out")


def test_changed_sources_are_noticed(text_file, words, tmp_path):
    corpus = prepare_corpus(str(text_file), CHARS, tmp_path / "out")
    os.utime(text_file, ns=(1, 1))
    corpus.check_source()  # touched, but the same
    text_file.write_text("x" + words[1:])  # same size
    with pytest.raises(UserError, match=r"words\.txt changed since the corpus .*out was prepared"):
        open_corpus(tmp_path / "out").check_source()
    text_file.unlink()
    corpus.check_source()
    assert corpus.tokenizer.decode(corpus.split("train")[:20]) == words[:20]


def test_a_prepared_directory_can_be_moved(text_file, tmp_path):
    corpus = prepare_corpus(str(text_file), CHARS, tmp_path / "out")
    shutil.move(tmp_path / "out", tmp_path / "moved")
    np.testing.assert_array_equal(
        open_corpus(tmp_path / "moved").split("test"),
        corpus.tokenizer.encode(text_file.read_text()[-corpus.num_characters("test") :]),
    )


def damage_meta(**changes):
    def damage(folder):
        path = folder / "meta.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return damage


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "train-00000.bin").unlink(), r"train-00000\.bin is missing"),
        (lambda folder: os.truncate(folder / "valid-00000.bin", 7), r"valid-00000\.bin has 7 bytes where"),
        (lambda folder: (folder / "tokenizer.json").unlink(), r"tokenizer\.json does not exist"),
        (lambda folder: ByteTokenizer().save(folder), r"tokenizer\.json is not the one"),
        (lambda folder: (folder / "meta.json").unlink(), r"no prepared corpus: it has no meta\.json"),
        (lambda folder: (folder / "meta.json").write_text("{"), r"cannot read .*meta\.json"),
        (lambda folder: (folder / "meta.json").write_bytes(b"\xff"), r"cannot read .*meta\.json"),
        (lambda folder: (folder / "meta.json").write_text("[]"), "not of a tarflowlm corpus"),
        (damage_meta(version=99), "format version 99"),
        (damage_meta(splits={}), "damaged"),
        (damage_meta(splits=3), "damaged"),
        (damage_meta(files=[{}]), "damaged"),
    ],
)
def test_damaged_directories_are_refused(damage, message, text_file, tmp_path):
    prepare_corpus(str(text_file), CHARS, tmp_path / "out")
    damage(tmp_path / "out")
    with pytest.raises(UserError, match=message) as caught:
        open_corpus(tmp_path / "out")
    assert "\n" not in str(caught.value)


def test_verify_finds_a_changed_byte(text_file, tmp_path):
    corpus = prepare_corpus(str(text_file), CHARS, tmp_path / "out")
    shard = tmp_path / "out" / "valid-00000.bin"
    data = bytearray(shard.read_bytes())
    data[5] ^= 1
    shard.write_bytes(data)
    with pytest.raises(UserError, match=r"valid-00000\.bin is damaged"):
        corpus.verify()


def test_unknown_splits_are_refused(text_file, tmp_path):
    corpus = prepare_corpus(str(text_file), CHARS, tmp_path / "out")
    with pytest.raises(UserError, match="split 'dev' is not one of train, valid, test"):
        corpus.split("dev")
    with pytest.raises(UserError, match="split 'dev' is not one of train, valid, test, all"):
        encode_text_source(str(text_file), corpus.tokenizer, ["dev"])


def test_another_text_is_encoded_with_a_given_tokenizer(text_file, words, tmp_path):
    tokenizer = CharTokenizer("zyxwvutsrqponmlkjihgfedcba ", "text8")
    text_file.write_text(words.upper())
    tokens = encode_text_source(str(text_file), tokenizer, ["train", "valid", "test", "all"])
    whole = np.asarray(tokens["all"])
    assert whole.dtype == np.uint8
    assert tokenizer.decode(whole) == words
    np.testing.assert_array_equal(whole, np.concatenate([tokens[name] for name in ("train", "valid", "test")]))
    with pytest.raises(UserError, match="characters"):
        encode_text_source(str(text_file), CharTokenizer("abc", "none"))


def test_a_directory_serves_only_its_own_tokenizer(text_file, tmp_path):
    corpus = prepare_corpus(str(text_file), CHARS, tmp_path / "out")
    tokens = encode_text_source(str(tmp_path / "out"), corpus.tokenizer, ["valid", "all"])
    np.testing.assert_array_equal(tokens["valid"], corpus.split("valid"))
    assert len(tokens["all"]) == sum(corpus.num_tokens(name) for name in ("train", "valid", "test"))
    with pytest.raises(UserError, match="prepared with CharTokenizer"):
        encode_text_source(str(tmp_path / "out"), ByteTokenizer())


def test_the_shared_corpus_is_cut_90_5_5(english27, tmp_path):
    path = tmp_path / "english27.txt.xz"
    path.write_bytes(lzma.compress(english27.encode(), preset=0))
    corpus = prepare_corpus(str(path), CHARS, tmp_path / "out")
    n = len(english27)
    sizes = [corpus.num_characters(name) for name in ("train", "valid", "test")]
    assert sizes == [n * 90 // 100, n * 95 // 100 - n * 90 // 100, n - n * 95 // 100]
    assert corpus.tokenizer.decode(corpus.split("train")[:50]) == english27[:50]
