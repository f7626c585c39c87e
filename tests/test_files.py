"""Atomic replacement, and full disks reported in one line."""

import errno
import os
from pathlib import Path

import pytest

from tarflowlm import files
from tarflowlm.errors import UserError
from tarflowlm.files import new_lines, read_json, replacing, write_json


@pytest.mark.parametrize(
    "failure", [None, ValueError, KeyboardInterrupt, "sync_file", "chmod", "replace"]
)
@pytest.mark.parametrize("existed", [True, False])
def test_replacing_gives_the_new_file_or_leaves_the_old_one(
    tmp_path, monkeypatch, failure, existed
):
    path = tmp_path / "a.txt"
    if existed:
        path.write_text("old", encoding="utf-8")

    def fails(*_):
        raise OSError("no space left on device")

    def replace() -> None:
        with replacing(path) as temporary:
            temporary.write_text("new", encoding="utf-8")
            if isinstance(failure, type):
                raise failure

    if failure is None:
        replace()
        assert (path.read_text(encoding="utf-8"), path.stat().st_mode & 0o777) == ("new", 0o644)
        return
    if isinstance(failure, str):
        monkeypatch.setattr(files if failure == "sync_file" else Path, failure, fails)
    with pytest.raises(failure if isinstance(failure, type) else OSError):
        replace()
    monkeypatch.undo()
    assert list(tmp_path.iterdir()) == ([path] if existed else [])
    assert not existed or path.read_text(encoding="utf-8") == "old"


def test_json_round_trip_and_unreadable_json(tmp_path):
    path, value = tmp_path / "a.json", {"text": "naïve ∑ 語", "list": [1, 2.5, None, True]}
    write_json(path, value)
    assert read_json(path) == value
    with pytest.raises(TypeError):
        write_json(path, {"new": object()})
    assert read_json(path) == value
    for content in (b"", b"{", b"\xff\xfe\x00", b"[" * 100_000):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"a\.json cannot be read as JSON"):
            read_json(path)
    with pytest.raises(UserError, match=r"b\.json is missing"):
        read_json(tmp_path / "b.json")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes")
def test_a_pipe_and_a_file_without_end_are_no_json(tmp_path):
    os.mkfifo(tmp_path / "pipe.json")
    (tmp_path / "device.json").symlink_to("/dev/zero")
    with (tmp_path / "large.json").open("wb") as file:
        file.truncate(1 << 34)
    for name in ("pipe", "device", "large"):
        with pytest.raises(UserError, match=f"{name}.json is no file of at most 16 MB"):
            read_json(tmp_path / f"{name}.json")


@pytest.mark.parametrize(
    "failure",
    [OSError(errno.ENOSPC, "full"), RuntimeError(f"I/O error: (os error {errno.EDQUOT})")],
)
def test_full_disk_is_one_line_with_a_remedy(tmp_path, failure):
    full = files.full_disk_as_user_error(tmp_path, lambda: "wait")
    with pytest.raises(UserError, match=r"cannot write to .*make room and wait"), full:
        raise failure


def test_lines_go_into_a_new_file_which_is_removed_where_there_are_none(tmp_path):
    path = tmp_path / "samples.jsonl"
    with new_lines(path):
        pass
    assert not path.exists()
    with new_lines(path) as lines:
        lines.write("one\n")
        assert path.read_text(encoding="utf-8") == "one\n"
    with pytest.raises(UserError, match="choose another"), new_lines(path):
        pass
    assert path.read_text(encoding="utf-8") == "one\n"
