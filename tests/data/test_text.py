"""Text files are read whatever their suffix, cut between words, and normalised like the
reference.
"""

import gzip
import lzma
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tarflowlm.data import TEXT8_ALPHABET, normalize_text8, read_text
from tarflowlm.data.text import text_pieces
from tarflowlm.errors import UserError

WINDOWS = "héllo\r\nwo\rrld \U0001f600\x00\n" * 50
TEXT = WINDOWS.replace("\r\n", "\n")
RAW = WINDOWS.encode("utf-8")
COMPRESSED = {".gz": gzip.compress(RAW, mtime=0), ".xz": lzma.compress(RAW)}


@pytest.mark.parametrize("suffix", [".txt", "", ".XZ", *COMPRESSED])
def test_text_comes_back_with_plain_line_ends(suffix, tmp_path, monkeypatch):
    path = tmp_path / f"text{suffix}"
    path.write_bytes(COMPRESSED.get(suffix.lower(), RAW))
    assert read_text(path) == read_text(str(path)) == TEXT
    monkeypatch.setattr("tarflowlm.data.text.BLOCK", 16)  # characters that cross blocks
    assert read_text(path) == TEXT


def test_byte_order_mark_is_dropped(tmp_path):
    (tmp_path / "bom.txt").write_bytes(b"\xef\xbb\xbfabc\xef\xbb\xbf")
    assert read_text(tmp_path / "bom.txt") == "abc\ufeff"


@pytest.mark.parametrize("suffix", list(COMPRESSED))
@pytest.mark.parametrize("damage", ["cut", "foreign", "empty"])
def test_damaged_compressed_files_are_refused(suffix, damage, tmp_path):
    path = tmp_path / f"bad{suffix}"
    path.write_bytes({"cut": COMPRESSED[suffix][:-12], "foreign": RAW, "empty": b""}[damage])
    with pytest.raises(UserError, match=r"is empty|is damaged or not a") as caught:
        read_text(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["none.txt", "x" * 5000, "folder", "empty.txt", "latin.txt"])
def test_unreadable_files_are_one_line(name, tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "empty.txt").touch()
    (tmp_path / "latin.txt").write_bytes("naïve".encode("latin-1"))
    with pytest.raises(UserError) as caught:
        read_text(tmp_path / name)
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


# cutting

WORDS = (
    "It's the Cat, the cats' 12 hats \u2014 caf\u00e9 na\u00efve \U0001f600!\n\n  And so;\tmore. "
    * 20
)


def test_pieces_are_cut_between_words():
    text = "one two, three  four 5 \u4e2d\u6587\nsix" * 3
    pieces = list(text_pieces([text], 5))
    assert "".join(pieces) == text
    assert len(pieces) == 9
    assert all(re.match(r"[ \n]\w", piece) for piece in pieces[1:])
    assert all(re.search(r"\w$", piece) for piece in pieces)
    assert list(text_pieces([""], 5)) == []


@pytest.mark.parametrize("size", [1, 3, 40, 10_000])
def test_pieces_do_not_depend_on_blocks(size):
    text = WORDS + "x" * 500 + " and_so 1 on" * 50 + "." * 900 + WORDS
    whole = list(text_pieces([text], size))
    assert "".join(whole) == text
    for block in (1, 2, 7, 100):
        blocks = (text[i : i + block] for i in range(0, len(text), block))
        assert list(text_pieces(blocks, size)) == whole


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
        ("in 1984,", " in one nine eight four"),
        ("naïve Ünder", " na ve nder"),
        ("a<|endoftext|>b", " a b"),
        ("x\ud800y \x00 \x0b\U0001f600z", " x y z"),
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
