"""A replaced file is the old one or the new one, a lock has one holder, and a full disk is one line."""

import contextlib
import errno
import json
import os
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tarflowlm import files
from tarflowlm.errors import UserError
from tarflowlm.files import (
    LOCK,
    NewLines,
    full_disk_as_user_error,
    read_json,
    replacing,
    sync_folder,
    waiting_lock,
    write_json,
    writer_lock,
)


def names(folder: Path) -> list[str]:
    """What is in a folder, lock files left out: not every version of filelock keeps them."""
    return sorted(path.name for path in folder.iterdir() if path.suffix != LOCK and path.name != LOCK)


def test_the_new_content_takes_the_place_of_the_old(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old", encoding="utf-8")
    with replacing(path) as temporary:
        temporary.write_text("new", encoding="utf-8")
        assert path.read_text(encoding="utf-8") == "old"
        assert temporary.parent == path.parent
    assert path.read_text(encoding="utf-8") == "new"
    assert names(tmp_path) == ["a.txt"]


def test_others_may_read_the_result(tmp_path):
    with replacing(tmp_path / "a.txt") as temporary:
        temporary.write_text("new", encoding="utf-8")
    assert stat.S_IMODE((tmp_path / "a.txt").stat().st_mode) == 0o644


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("existed", [True, False])
def test_a_failing_writer_leaves_things_as_they_were(tmp_path, error, existed):
    path = tmp_path / "a.txt"
    if existed:
        path.write_text("old", encoding="utf-8")
    before = names(tmp_path)

    def write_and_fail():
        with replacing(path) as temporary:
            temporary.write_text("half of the n", encoding="utf-8")
            raise error

    with pytest.raises(error):
        write_and_fail()
    assert names(tmp_path) == before
    assert not existed or path.read_text(encoding="utf-8") == "old"


@pytest.mark.parametrize("step", ["sync_file", "chmod", "replace"])
def test_a_failing_step_leaves_things_as_they_were(tmp_path, monkeypatch, step):
    path = tmp_path / "a.txt"
    path.write_text("old", encoding="utf-8")

    def fails(*args):
        raise OSError("no space left on device")

    monkeypatch.setattr(files if step == "sync_file" else Path, step, fails)
    with pytest.raises(OSError, match="no space"), replacing(path) as temporary:
        temporary.write_text("new", encoding="utf-8")
    monkeypatch.undo()
    assert path.read_text(encoding="utf-8") == "old"
    assert names(tmp_path) == ["a.txt"]


def test_the_data_is_synced_before_the_rename_and_the_folder_after(tmp_path, monkeypatch):
    done = []
    fsync, replace = os.fsync, Path.replace

    def logged_fsync(descriptor):
        done.append("folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file")
        fsync(descriptor)

    def logged_replace(self, target):
        done.append("rename")
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", logged_fsync)
    monkeypatch.setattr(Path, "replace", logged_replace)
    with replacing(tmp_path / "a.txt") as temporary:
        temporary.write_text("new", encoding="utf-8")
    assert done == ["file", "rename", "folder"]


def test_folders_are_not_synced_where_they_cannot_be_opened(tmp_path, monkeypatch):
    def refused(*_):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "open", refused)
    with pytest.raises(PermissionError):
        sync_folder(tmp_path)
    monkeypatch.setattr(os, "name", "nt")
    sync_folder(tmp_path)


def test_a_folder_that_is_missing_is_an_error_of_the_system(tmp_path):
    with pytest.raises(FileNotFoundError), replacing(tmp_path / "missing" / "a.txt"):
        pass


def test_json_comes_back_as_it_was(tmp_path):
    value = {"text": "naïve ∑ 語", "list": [1, 2.5, None, True], "nested": {"a": {}}}
    write_json(tmp_path / "a.json", value)
    assert read_json(tmp_path / "a.json") == value
    # readable by people, too
    assert "naïve ∑ 語" in (tmp_path / "a.json").read_text(encoding="utf-8")


def test_a_value_json_cannot_hold_leaves_the_old_file(tmp_path):
    write_json(tmp_path / "a.json", {"old": 1})
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", {"new": object()})
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == {"old": 1}
    assert names(tmp_path) == ["a.json"]


@pytest.mark.parametrize(
    "content", [b"", b"{", b'{"a": 1', b"\xff\xfe\x00", b"[" * 100_000, b"nonsense"], ids=lambda c: repr(c[:8])
)
def test_what_is_not_json_is_named(tmp_path, content):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(UserError, match=r"a\.json cannot be read as JSON"):
        read_json(tmp_path / "a.json")


def test_missing_json_and_folders_are_named(tmp_path):
    with pytest.raises(UserError, match=r"a\.json is missing"):
        read_json(tmp_path / "a.json")
    (tmp_path / "a.json").mkdir()
    with pytest.raises(UserError, match=r"a\.json cannot be read"):
        read_json(tmp_path / "a.json")


# locks


@pytest.fixture
def other_process() -> Iterator[Callable[[str, Path], subprocess.Popen]]:
    """Starts a process that takes the lock of that function and path, says so, and holds it until its stdin ends."""
    with contextlib.ExitStack() as stack:

        def start(lock: str, path: Path) -> subprocess.Popen:
            code = (
                f"import sys, pathlib; from tarflowlm.files import {lock}\n"
                f"with {lock}(pathlib.Path({str(path)!r})):\n    print('locked', flush=True); sys.stdin.read()"
            )
            process = subprocess.Popen(
                [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
            stack.enter_context(process)
            stack.callback(process.kill)
            return process

        yield start


def test_the_second_writer_is_refused_and_told_who_is_first(tmp_path):
    with writer_lock(tmp_path):
        with pytest.raises(UserError, match=f"is being written by process {os.getpid()} on "), writer_lock(tmp_path):
            pass
        # and is still held
        with pytest.raises(UserError, match=f"by process {os.getpid()} on "), writer_lock(tmp_path):
            pass
    with writer_lock(tmp_path):
        pass
    assert names(tmp_path) == []


def test_a_writer_lock_is_released_after_an_error(tmp_path):
    with pytest.raises(KeyError), writer_lock(tmp_path):
        raise KeyError
    with writer_lock(tmp_path):
        pass


@pytest.mark.parametrize("ends", ["by itself", "killed"])
def test_a_writer_in_another_process_is_named_until_it_ends(ends, tmp_path, other_process):
    process = other_process("writer_lock", tmp_path)
    assert process.stdout.readline() == "locked\n"
    with pytest.raises(UserError, match=f"is being written by process {process.pid} on "), writer_lock(tmp_path):
        pass
    process.kill() if ends == "killed" else process.communicate("")
    process.wait()
    assert names(tmp_path) == ([] if ends == "by itself" else [f"{LOCK}.holder"])
    with writer_lock(tmp_path):
        # the name that a killed process left is replaced
        assert (tmp_path / f"{LOCK}.holder").read_text(encoding="utf-8").startswith(f"process {os.getpid()} on ")
    assert names(tmp_path) == []


def test_a_holder_that_has_not_yet_written_its_name_is_another_process(tmp_path):
    with writer_lock(tmp_path):
        (tmp_path / f"{LOCK}.holder").unlink()
        with pytest.raises(UserError, match="is being written by another process: "), writer_lock(tmp_path):
            pass


def test_a_waiting_lock_is_held_by_one_thread_at_a_time(tmp_path):
    inside, seen = 0, []

    def work():
        nonlocal inside
        for _ in range(20):
            with waiting_lock(tmp_path / "x"):
                inside += 1
                seen.append(inside)
                time.sleep(0.0005)
                inside -= 1

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == [1] * 80
    assert names(tmp_path) == []


def test_a_waiting_lock_waits_for_another_process_and_outlives_its_death(tmp_path, other_process):
    first = other_process("waiting_lock", tmp_path / "x")
    assert first.stdout.readline() == "locked\n"
    second = other_process("waiting_lock", tmp_path / "x")
    said = []
    reader = threading.Thread(target=lambda: said.append(second.stdout.readline()))
    reader.start()
    reader.join(timeout=2)
    assert said == []
    first.kill()
    reader.join(timeout=60)
    assert said == ["locked\n"]


# full disks


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
@pytest.mark.parametrize(
    "failure",
    [
        lambda number: OSError(number, os.strerror(number)),
        lambda number: RuntimeError(f"SafetensorError: I/O error: it failed (os error {number})"),
    ],
    ids=["system", "safetensors"],
)
def test_a_full_disk_names_the_place_the_reason_and_the_remedy(tmp_path, number, failure):
    message = f"cannot write to {tmp_path} ({os.strerror(number)}): what was saved before is kept; make room and wait"
    with pytest.raises(UserError) as raised, full_disk_as_user_error(tmp_path, lambda: "wait"):
        raise failure(number)
    assert str(raised.value) == message
    with pytest.raises(UserError) as raised, full_disk_as_user_error(tmp_path, lambda: "wait"):
        raise ValueError("wrapped by a library") from failure(number)
    assert str(raised.value) == message


@pytest.mark.parametrize("error", [OSError(errno.EACCES, "no"), ValueError("no"), KeyboardInterrupt()], ids=repr)
def test_other_errors_are_not_taken_for_a_full_disk(tmp_path, error):
    with pytest.raises(type(error)) as raised, full_disk_as_user_error(tmp_path, lambda: "wait"):
        raise error
    assert raised.value is error


class FullAfter:
    """A file on a disk with room for some bytes more, or whose writer is interrupted then."""

    def __init__(self, file, room: int, error: BaseException) -> None:
        self.file, self.room, self.error = file, room, error

    def __getattr__(self, name: str):
        return getattr(self.file, name)

    def write(self, data: bytes) -> int:
        if not self.room:
            raise self.error
        written = self.file.write(data[: self.room])
        self.room -= written
        return written


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_new_lines_are_whole_or_not_there(tmp_path, error):
    path = tmp_path / "lines.jsonl"
    expected = (UserError, r"No space left.*is kept") if isinstance(error, OSError) else (KeyboardInterrupt, None)
    with NewLines(path) as lines:
        lines.write("one\n")
        lines.write("two\nthree\n")
        lines._file = FullAfter(lines._file, 6, error)
        with pytest.raises(expected[0], match=expected[1]):
            lines.write("four\nfive\n")
    assert path.read_text(encoding="utf-8") == "one\ntwo\nthree\n"


def test_new_lines_need_a_new_file_and_leave_none_without_lines(tmp_path):
    path = tmp_path / "lines.jsonl"
    with NewLines(path):
        assert path.exists()
    assert not path.exists()
    path.write_text("mine", encoding="utf-8")
    with pytest.raises(UserError, match="exists: choose another name"):
        NewLines(path)
    with pytest.raises(UserError, match=r"cannot create .*missing"):
        NewLines(tmp_path / "missing" / "lines.jsonl")
    assert path.read_text(encoding="utf-8") == "mine"
