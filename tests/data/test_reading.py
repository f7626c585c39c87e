"""Text files are read whatever their suffix, and cut between words."""

import gzip
import lzma
import re

import pytest

from tarflowlm.data import read_text
from tarflowlm.data.reading import text_pieces
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
    monkeypatch.setattr("tarflowlm.data.reading.BLOCK", 16)  # characters that cross blocks
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
