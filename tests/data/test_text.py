"""Text files are read whatever their suffix, cut between words, and normalised as the reference does."""

import builtins
import gzip
import lzma
import os
import re
import zipfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tarflowlm.data import TEXT8_ALPHABET, normalize_text8, read_text
from tarflowlm.data.text import text_pieces
from tarflowlm.errors import UserError

try:
    from zstandard import compress
except ImportError:
    compress = None

TEXT = "héllo\r\nworld \U0001f600\x00\n" * 50
RAW = TEXT.encode("utf-8")
COMPRESSED = {
    ".gz": gzip.compress(RAW, mtime=0),
    ".xz": lzma.compress(RAW),
    **({".zst": compress(RAW)} if compress else {}),
}


@pytest.mark.parametrize("suffix", [".txt", "", ".md", ".XZ", *COMPRESSED])
def test_text_comes_back_unchanged(suffix, tmp_path):
    path = tmp_path / f"text{suffix}"
    path.write_bytes(COMPRESSED.get(suffix.lower(), RAW))
    assert read_text(path) == read_text(str(path)) == TEXT


def test_a_byte_order_mark_is_dropped(tmp_path):
    path = tmp_path / "bom.txt"
    path.write_bytes(b"\xef\xbb\xbfabc")
    assert read_text(path) == "abc"


def test_several_frames_are_read_in_full(tmp_path):
    for suffix, data in COMPRESSED.items():
        path = tmp_path / f"twice{suffix}"
        path.write_bytes(data + data)
        assert read_text(path) == TEXT + TEXT


@pytest.mark.parametrize("suffix", list(COMPRESSED))
@pytest.mark.parametrize("damage", ["cut", "foreign", "empty"])
def test_damaged_compressed_files_are_refused(suffix, damage, tmp_path):
    data = {"cut": COMPRESSED[suffix][:-12], "foreign": RAW, "empty": b""}[damage]
    path = tmp_path / f"bad{suffix}"
    path.write_bytes(data)
    message = "is empty|not a complete" if damage == "empty" else f"not a complete {suffix} file"
    with pytest.raises(UserError, match=message) as caught:
        read_text(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_wrong_paths_are_refused(tmp_path):
    with pytest.raises(UserError, match="is a directory"):
        read_text(tmp_path)
    with pytest.raises(UserError, match="does not exist"):
        read_text(tmp_path / "none.txt")
    with pytest.raises(UserError, match="does not exist"):
        read_text("x" * 5000)
    (tmp_path / "empty.txt").touch()
    with pytest.raises(UserError, match="is empty"):
        read_text(tmp_path / "empty.txt")


@pytest.mark.parametrize("suffix", [".txt", ".bin", ".pdf"])
def test_other_encodings_are_refused(suffix, tmp_path):
    path = tmp_path / f"latin{suffix}"
    path.write_bytes("naïve".encode("latin-1"))
    with pytest.raises(UserError, match=r"not UTF-8 text \(byte 2 is 0xef\)"):
        read_text(path)


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="needs a file that its owner cannot read")
def test_unreadable_files_are_refused(tmp_path):
    path = tmp_path / "secret.txt"
    path.write_text("x")
    path.chmod(0)
    with pytest.raises(UserError, match="cannot read"):
        read_text(path)


def test_zip_archives_of_one_file(tmp_path):
    path = tmp_path / "text8.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("text8", TEXT)
    assert read_text(path) == TEXT
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("more", TEXT)
    with pytest.raises(UserError, match="holds 2 files"):
        read_text(path)
    path.write_bytes(b"no zip")
    with pytest.raises(UserError, match="not a complete"):
        read_text(path)


def test_zst_without_the_package_names_the_remedy(tmp_path, monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "zstandard":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    path = tmp_path / "text.zst"
    path.write_bytes(b"unread")
    with pytest.raises(UserError, match=r"pip install 'tarflowlm\[data\]'"):
        read_text(path)


# cutting

WORDS = "It's the Cat, the cats' 12 hats \u2014 caf\u00e9 na\u00efve \U0001f600!\n\n  And so on;\tmore. " * 20


def test_pieces_are_cut_between_words():
    text = "one two, three  four 5 \u4e2d\u6587\nsix" * 3
    pieces = list(text_pieces(text, 5))
    assert "".join(pieces) == text
    assert len(pieces) == 9
    assert all(re.match(r"[ \n]\w", piece) for piece in pieces[1:])
    assert all(re.search(r"\w$", piece) for piece in pieces)
    assert list(text_pieces("", 5)) == []


@pytest.mark.parametrize("size", [1, 3, 40, 10_000])
def test_pieces_do_not_depend_on_blocks(size):
    text = WORDS + "x" * 500 + " and_so 1 on" * 50 + "." * 900 + WORDS
    whole = list(text_pieces(text, size))
    assert "".join(whole) == text
    for block in (1, 2, 7, 100):
        blocks = (text[i : i + block] for i in range(0, len(text), block))
        assert list(text_pieces(blocks, size)) == whole


def test_text_without_words_is_cut_after_a_while():
    pieces = list(text_pieces("." * 1000, 10))
    assert [len(piece) for piece in pieces] == [160] * 6 + [40]


# normalising

NAMES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
DIGITS = str.maketrans({str(i): f" {word} " for i, word in enumerate(NAMES)})
UPPER = str.maketrans("ABCDEFGHIJKLMNOPQRSTUVWXYZ", "abcdefghijklmnopqrstuvwxyz")


def reference(text: str) -> str:
    text = text.replace("<|endoftext|>", " ").translate(UPPER).translate(DIGITS)
    return " " + re.sub("[^a-z]+", " ", text).strip()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", " "),
        (" \n\t.", " "),
        ("The Cat!", " the cat"),
        ("in 1984,", " in one nine eight four"),
        ("naïve Ünder", " na ve nder"),
        ("a<|endoftext|>b", " a b"),
        ("x\ud800y \x00 \U0001f600z", " x y z"),
        ("\u0130\u212a", " "),  # str.lower() would turn these into an ASCII i and k
    ],
)
def test_text8_examples(text, expected):
    assert normalize_text8(text) == expected


@settings(derandomize=True, max_examples=200, deadline=None)
@given(st.text(st.one_of(st.characters(), st.sampled_from("aZ 09.\n<|endoftext|>")), max_size=60))
def test_text8_equals_the_two_line_reference_and_is_idempotent(text):
    result = normalize_text8(text)
    assert result == reference(text)
    assert normalize_text8(result) == result
    assert set(result) <= set(TEXT8_ALPHABET)


def test_english27_is_its_own_normal_form(english27):
    assert normalize_text8(english27) == english27
