"""Atomic replacement, locks with one holder, and full disks reported in one line."""

import errno
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tarflowlm import files
from tarflowlm.errors import UserError
from tarflowlm.files import (
    NewLines,
    read_json,
    replacing,
    waiting_lock,
    write_json,
    writer_lock,
    writer_of,
)


def names(folder: Path) -> list[str]:
    """File names in a folder without lock files, which some versions of filelock remove."""
    return sorted(
        path.name for path in folder.iterdir() if files.LOCK not in (path.suffix, path.name)
    )


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
    assert names(tmp_path) == (["a.txt"] if existed else [])
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


def test_writer_lock_refuses_a_second_writer_and_names_the_first(tmp_path):
    with writer_lock(tmp_path):
        assert writer_of(tmp_path).startswith(f"process {os.getpid()} on ")
        with (
            pytest.raises(UserError, match=f"is being written by process {os.getpid()} on "),
            writer_lock(tmp_path),
        ):
            pass
    assert writer_of(tmp_path) is None
    with pytest.raises(KeyError), writer_lock(tmp_path):
        raise KeyError
    with writer_lock(tmp_path):
        pass
    assert names(tmp_path) == []


def test_waiting_lock_is_held_by_one_thread_at_a_time(tmp_path):
    inside, seen = 0, []

    def work():
        nonlocal inside
        for _ in range(10):
            with waiting_lock(tmp_path / "x"):
                inside += 1
                seen.append(inside)
                time.sleep(0.0005)
                inside -= 1

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: work(), range(4)))
    assert seen == [1] * 40


@pytest.mark.parametrize(
    "failure",
    [OSError(errno.ENOSPC, "full"), RuntimeError(f"I/O error: (os error {errno.EDQUOT})")],
)
def test_full_disk_is_one_line_with_a_remedy(tmp_path, failure):
    full = files.full_disk_as_user_error(tmp_path, lambda: "wait")
    with pytest.raises(UserError, match=r"cannot write to .*make room and wait"), full:
        raise failure


def test_lines_go_into_a_new_file_or_an_empty_one(tmp_path):
    path = tmp_path / "samples.jsonl"
    path.touch()  # left by a kill
    with NewLines(path) as lines:
        lines.write("one\n")
    assert path.read_text(encoding="utf-8") == "one\n"
    with pytest.raises(UserError, match="choose another name"):
        NewLines(path)
