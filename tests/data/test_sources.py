"""Sources of text: tales and stories, text8 from a server or the disk, OpenWebText from parquet
files, text files.
"""

import gzip
import hashlib
import importlib.util
import io
import os
import re
import zipfile
from types import SimpleNamespace

import numpy as np
import pytest

from helpers import prepared, suited_to
from tarflowlm.data import (
    TEXT8_ALPHABET,
    DataConfig,
    TokenizerConfig,
    build_tokenizer,
    normalize_text8,
)
from tarflowlm.data.bpe import train_bpe
from tarflowlm.data.library import SEPARATOR
from tarflowlm.data.parquet import OpenWebText
from tarflowlm.data.reading import read_text
from tarflowlm.data.sources import resolve_source
from tarflowlm.data.splits import SPLITS, split_of_document
from tarflowlm.data.text_files import Text8
from tarflowlm.errors import UserError
from tarflowlm.files import sources_dir

CHARS = TokenizerConfig()
OPEN = TokenizerConfig(normalize="auto")


def whole_texts(name) -> list[str]:
    """The texts of a source, not normalised."""
    return ["".join(text.blocks) for text in resolve_source(DataConfig(source=str(name))).texts()]


@pytest.mark.parametrize(
    "source", ["no-such-file.txt", "", "x" * 5000, "a\x00b", "~nobody-here/x", "."]
)
def test_unknown_sources_are_refused(source):
    with pytest.raises(
        UserError,
        match=r"give a text file, .* one of tales|folder . holds no .txt",
    ):
        prepared(source, CHARS)


def test_lines_without_a_text(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "a"}\n{"text": null, "title": "b"}\n', encoding="utf-8")
    assert whole_texts(file) == ["a"]
    file.write_text('{"text": "a\\ud800", "title": "b"}\n', encoding="utf-8")
    with pytest.raises(UserError, match=r"line 1 of .*: mend it"):
        whole_texts(file)
    # by its suffix, in any folder
    inner = tmp_path / "C#" / "inner"
    inner.mkdir(parents=True)
    (inner / "b.jsonl").write_text('{"text": "b"}\n', encoding="utf-8")
    assert whole_texts(f"{tmp_path}/C##.jsonl") == ["b"]


@pytest.mark.parametrize(
    ("line", "remedy"),
    [
        ('{"body": "Once"}', "#body"),
        ('{"id": 3, "a": "x", "my-text": "Once"}', "#a or .*#my-text"),
        ('{"full text": "Once"}', "#full text"),
        # a value, not a name
        ('{"kind": "text", "body": "Once"}', "#kind or .*#body"),
        # texts, but of no field of the line
        ('{"meta": {"title": "Once"}, "n": 3}', "mend it"),
        ('["body", "Once"]', "mend it"),
        ('{"text": 3, "body": "Once"}', "#body"),
        ('{"body": "Once"', "mend it"),
    ],
)
def test_a_line_without_a_text_names_the_fields_that_have_one(tmp_path, line, remedy):
    file = tmp_path / "a.jsonl"
    file.write_text(f"{line}\n", encoding="utf-8")
    with pytest.raises(UserError, match=rf"under 'text': .*{remedy}$"):
        whole_texts(file)


def test_a_folder_of_texts_and_tables_is_no_text(tmp_path):
    for name in ("README.txt", "d.parquet"):
        (tmp_path / name).write_text("a", encoding="utf-8")
    with pytest.raises(UserError, match=r"parquet files beside texts: .*#\.txt"):
        resolve_source(DataConfig(source=str(tmp_path)))


def test_files_of_a_folder_that_are_not_read_are_told(tmp_path, caplog):
    caplog.set_level("INFO")
    for name in ("a.md", "b.md", ".hidden.md", "notes.txt"):
        (tmp_path / name).write_text("Once upon a time.\n" * 20, encoding="utf-8")
    suited_to(tmp_path, TokenizerConfig(normalize="auto"))
    assert f"not read: 2 .md files of {tmp_path}; {tmp_path}#.md reads those" in caplog.text
    caplog.clear()
    suited_to(f"{tmp_path}#.md", TokenizerConfig(normalize="auto"))
    assert "not read:" not in caplog.text
    # where nothing is left, the suffix is the remedy
    (tmp_path / "notes.txt").write_text("", encoding="utf-8")
    with pytest.raises(UserError, match=r"leaves nothing of .*: name the suffix .*#\.md$"):
        prepared(tmp_path, CHARS)


def test_a_folder_of_other_texts_is_read_by_their_suffix(tmp_path):
    (tmp_path / "inner").mkdir()
    (tmp_path / ".git").mkdir()
    files = {"b.py": "b = 1\n", "inner/a.py": "a = 2\n", ".git/c.py": "c", "d.bin": "\x00"}
    for name, text in files.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    source = resolve_source(DataConfig(source=f"{tmp_path}#.py"))
    found = {text.key: "".join(text.blocks) for text in source.texts()}
    assert found == {"b.py": "b = 1\n", "inner/a.py": "a = 2\n"}
    assert list(found) == ["b.py", "inner/a.py"]
    assert source.has_documents
    with pytest.raises(
        UserError, match=r"no \.txt, .*: name the suffix of its texts, say .*#\.py$"
    ):
        prepared(str(tmp_path), CHARS)
    with pytest.raises(UserError, match=r"holds no \.rs files"):
        prepared(f"{tmp_path}#.rs", CHARS)
    with pytest.raises(UserError, match="/dev/null is no regular file"):
        prepared("/dev/null", CHARS)


def test_hidden_files_are_left_out_and_names_that_are_not_utf8_refused(tmp_path):
    (tmp_path / "a.txt").write_text("a", encoding="utf-8")
    (tmp_path / "._a.txt").write_bytes(b"\xff\xfe")
    assert whole_texts(tmp_path) == ["a"]
    try:
        (tmp_path / os.fsdecode(b"caf\xe9.txt")).write_text("b", encoding="utf-8")
    except OSError:
        pytest.skip("this file system has names in UTF-8 alone")
    with pytest.raises(UserError, match=r"caf.udce9\.txt' is not UTF-8: rename it"):
        resolve_source(DataConfig(source=str(tmp_path)))


def test_folders_and_json_lines(tmp_path):
    (tmp_path / "b.txt").write_text("two", encoding="utf-8")
    lines = '{"text": "one", "body": "x\\ny"}\n\n{"text": "ü", "body": "z"}'
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (tmp_path / "c.md").write_text("left out", encoding="utf-8")
    assert whole_texts(tmp_path) == ["one", "ü", "two"]
    assert whole_texts(f"{tmp_path / 'a.jsonl.gz'}#body") == ["x\ny", "z"]
    match = r"line 1 of .*a\.jsonl\.gz .* under 'title': .* a.jsonl.gz#text or a.jsonl.gz#body$"
    with pytest.raises(UserError, match=match):
        prepared(f"{tmp_path / 'a.jsonl.gz'}#title", CHARS)


# tales


def test_tales_are_the_text_that_their_page_describes():
    tales = resolve_source(DataConfig(source="tales"))
    [file] = tales.files
    documents = whole_texts("tales")
    text = "".join(f"{document}\n{SEPARATOR}\n" for document in documents)
    page = (file.parent / "README.md").read_text(encoding="utf-8")
    for content in (text.encode(), file.read_bytes()):
        assert hashlib.sha256(content).hexdigest() in page
    _, *books = (file.parent / "books.tsv").read_text(encoding="utf-8").splitlines()
    listed = sum(int(book.split("\t")[-2]) for book in books)
    assert listed == len(documents) == text.count(SEPARATOR) == 2783


@pytest.mark.slow
def test_a_tale_is_in_one_split_by_its_title():
    found = resolve_source(DataConfig(source="tales"))
    splits = {split: set() for split in SPLITS}
    for split, text, ends in found.pieces():
        assert ends
        title = text.partition("\n")[0]
        assert split == split_of_document(title)
        splits[split].add(text)
    assert set().union(*splits.values()) == set(whole_texts("tales"))
    sizes = {split: sum(map(len, texts)) for split, texts in splits.items()}
    assert 0.88 < sizes["train"] / sum(sizes.values()) < 0.92
    assert min(sizes.values()) / sum(sizes.values()) > 0.04


@pytest.mark.slow
def test_tales_in_letters_are_one_text():
    pieces = [piece.text for piece in resolve_source(DataConfig(source="tales"), "text8").pieces()]
    assert set("".join(pieces)) <= set(TEXT8_ALPHABET)
    assert all(piece.startswith(" ") and not piece.endswith(" ") for piece in pieces)


# stories


def described(page: str) -> dict[str, list[str]]:
    """The rows of the page's table, by split: stories, characters, words, bytes and sha256."""
    rows = re.findall(r"^\| `stories_(\w+)\.txt\.xz` \| (.*) \|$", page, re.MULTILINE)
    return {split: row.replace(",", "").replace("`", "").split(" | ") for split, row in rows}


@pytest.mark.slow
def test_stories_are_the_text_that_their_page_describes():
    stories = resolve_source(DataConfig(source="stories"))
    rows = described((stories.path / "README.md").read_text(encoding="utf-8"))
    found = {split: [] for split in SPLITS}
    for split, text, ends in stories.pieces():
        assert ends
        found[split].append(text)
    assert {split: len(documents) for split, documents in found.items()} == {
        "train": 44_282,
        "valid": 1_112,
        "test": 3_337,
    }
    for split, documents in found.items():
        whole = (f"\n{SEPARATOR}\n".join(documents) + "\n").encode()
        words = sum(len(document.split()) for document in documents)
        counts = [len(documents), sum(map(len, documents)), words, len(whole)]
        assert rows[split] == [*map(str, counts), hashlib.sha256(whole).hexdigest()]
    whole = [document for documents in found.values() for document in documents]
    assert len(set(whole)) == len(whole)
    assert sorted(whole_texts("stories")) == sorted(whole)
    assert len(set("".join(whole)) - {"\n"}) == 85


def test_stories_keep_the_splits_that_they_came_with():
    stories = resolve_source(DataConfig(source="stories"))
    assert {file.name: stories.placed("", file).split for file in stories.files} == {
        f"stories_{split}.txt.xz": split for split in SPLITS
    }
    assert [size for _, size in stories.state()] == [file.stat().st_size for file in stories.files]
    page = (stories.path / "README.md").read_text(encoding="utf-8")
    assert "CDLA-Sharing-1.0" in page
    assert "arXiv 2305.07759" in page
    licence = (stories.path / "LICENSE").read_text(encoding="utf-8")
    assert licence.startswith("Community Data License Agreement - Sharing - Version 1.0")
    assert all(f"Section {number}. " in licence for number in range(1, 8))


@pytest.mark.slow
def test_stories_are_prepared_offline_and_each_ends(no_network, tmp_path):
    config = TokenizerConfig(kind="byte", normalize="none")
    corpus = prepared("stories", config, tmp_path / "out")
    for file in resolve_source(DataConfig(source="stories")).files:
        split = file.name.removesuffix(".txt.xz").removeprefix("stories_")
        ids = np.asarray(corpus.split(split))
        # an end is decoded as an empty line, and no story has one
        ended = read_text(file).replace(f"\n{SEPARATOR}\n", "\n\n") + "\n"
        assert corpus.tokenizer.decode(ids) == ended
        assert ids[-1] == corpus.tokenizer.end
        stories = ended.split("\n\n")[:-1]
        assert np.count_nonzero(ids == corpus.tokenizer.end) == len(stories)
        assert corpus.num_characters(split) == sum(map(len, stories))
    # runs know their training text by it
    fingerprint = "9c44c1efcfae00c71319a179b9c23c5b943b5112b8886002c8159f650d3638ca"
    assert corpus.fingerprint == fingerprint


# text8


def zipped(text: str) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("text8", text)
    return buffer.getvalue()


@pytest.fixture
def served(words, monkeypatch) -> dict[str, bytes | Exception]:
    """What the address of text8, here `words`, answers, or how it fails; nothing without entry."""
    answers: dict[str, bytes | Exception] = {Text8.url: zipped(words)}

    def urlopen(url, timeout):
        if isinstance(answers[url], Exception):
            raise answers[url]
        return io.BytesIO(answers[url])

    monkeypatch.setattr("urllib.request.urlopen", urlopen)
    monkeypatch.setattr(Text8, "md5", hashlib.md5(words.encode()).hexdigest())
    return answers


def test_text8_is_fetched_once_and_cut_90_5_5(served, words, tmp_path):
    corpus = prepared("text8", CHARS, tmp_path / "out")
    n = len(words)
    sizes = [corpus.num_characters(name) for name in SPLITS]
    assert sizes == [n * 90 // 100, n * 95 // 100 - n * 90 // 100, n - n * 95 // 100]
    assert corpus.tokenizer.decode(corpus.split("train")[:100]) == words[:100]
    assert [path.name for path in sources_dir().iterdir()] == ["text8"]
    served.clear()
    cached = prepared("text8", CHARS)
    assert cached.fingerprint == corpus.fingerprint
    (sources_dir() / "text8").unlink()
    assert prepared("text8", CHARS).path == cached.path  # the tokens need no text


def test_text8_with_another_content_is_refused(served, words):
    served[Text8.url] = zipped(words[:-1])
    with pytest.raises(UserError, match=r"text8 is not text8.*: remove it") as caught:
        Text8().obtain()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("answer", [OSError("Name or service not known"), b""])
def test_unreachable_text8_is_one_line(served, answer):
    served[Text8.url] = answer
    with pytest.raises(UserError, match=r"text8\.zip \(.*put text8, unpacked, into") as caught:
        prepared("text8", CHARS)
    assert "\n" not in str(caught.value)


# OpenWebText


def by_split(documents: list[str]) -> dict[str, list[str]]:
    held = {split: [] for split in SPLITS}
    last = len(documents) // 80  # of a part of OpenWebText
    for document in documents[:-last]:
        held[split_of_document(document, OpenWebText.shares)].append(document)
    held["valid"] += documents[-last:]
    return held


@pytest.mark.slow
def test_openwebtext_documents_are_each_in_one_split_encoded_alone(in_parts, tmp_path):
    documents = in_parts
    tokenizer = train_bpe([" ".join(documents)], 500, alphabet=None, normalization="none")
    corpus = prepared("openwebtext", tokenizer, tmp_path / "out")
    for split, held in by_split(documents).items():
        assert held
        ids = np.asarray(corpus.split(split))
        ended = [document + SEPARATOR for document in held if document]
        assert ids.tolist() == tokenizer.encode_each(ended).tolist()
        assert corpus.num_characters(split) == sum(map(len, ended))
    spaced = prepared("openwebtext", CHARS, tmp_path / "text8")
    for split, held in by_split(documents).items():
        text = spaced.tokenizer.decode(np.asarray(spaced.split(split)))
        assert text == normalize_text8(SEPARATOR.join(held))
    config = TokenizerConfig(kind="bpe", vocab_size=300, normalize="none")
    trained = prepared("openwebtext", config, tmp_path / "bpe").tokenizer
    train = by_split(documents)["train"]
    expected = build_tokenizer(config, train, has_documents=True)
    assert trained.fingerprint == expected.fingerprint


def test_openwebtext_is_fetched_once(in_parts, tmp_path, monkeypatch):
    folder = sources_dir() / "openwebtext"
    expected = prepared("openwebtext", CHARS, tmp_path / "ours").fingerprint
    folder.rename(tmp_path / "theirs")

    def snapshot_download(name, *, repo_type, revision, allow_patterns, local_dir):
        assert revision == "abc"
        (tmp_path / "theirs").rename(local_dir / "plain_text")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    info = SimpleNamespace(sha="abc")
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", lambda api, name: info)
    folder.with_name("openwebtext.partial").mkdir()
    for name in ("first", "second"):
        assert prepared("openwebtext", CHARS, tmp_path / name).fingerprint == expected


def test_openwebtext_offline_names_the_remedy(tmp_path, no_network):
    pytest.importorskip("pyarrow")
    with pytest.raises(UserError, match=r"not known.*Skylion007/openwebtext into") as caught:
        prepared("openwebtext", CHARS, tmp_path / "out")
    assert "\n" not in str(caught.value)


def test_openwebtext_without_its_package_names_the_remedy(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install .*pyarrow"):
        prepared("openwebtext", CHARS, tmp_path / "out")
