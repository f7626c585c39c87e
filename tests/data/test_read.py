"""Reading text files: suffixes, and one line for every way a file can be wrong."""

import builtins
import gzip
import lzma
import os
import zipfile

import pytest
import zstandard

from tarflowlm.data import read_text
from tarflowlm.errors import UserError

TEXT = "héllo\r\nworld \U0001f600\x00\n" * 50
RAW = TEXT.encode("utf-8")
COMPRESSED = {
    ".gz": gzip.compress(RAW, mtime=0),
    ".xz": lzma.compress(RAW),
    ".zst": zstandard.compress(RAW),
}


@pytest.mark.parametrize("suffix", [".txt", "", ".md", ".gz", ".xz", ".zst", ".XZ"])
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
    path.write_bytes(COMPRESSED[".zst"])
    with pytest.raises(UserError, match=r"pip install 'tarflowlm\[data\]'"):
        read_text(path)
