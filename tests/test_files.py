"""Atomic replacement, locks with one holder, and full disks reported in one line."""

import errno
import os
import subprocess
import sys
import threading
import time
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
    waiting_lock,
    write_json,
    writer_lock,
    writer_of,
)


def names(folder: Path) -> list[str]:
    """File names in a folder without lock files, which some versions of filelock remove."""
    return sorted(path.name for path in folder.iterdir() if path.suffix != LOCK and path.name != LOCK)


@pytest.mark.parametrize("failure", [None, ValueError, KeyboardInterrupt, "sync_file", "chmod", "replace"])
@pytest.mark.parametrize("existed", [True, False])
def test_replacing_gives_the_new_file_or_leaves_the_old_one(tmp_path, monkeypatch, failure, existed):
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
        with pytest.raises(UserError, match=f"is being written by process {os.getpid()} on "), writer_lock(tmp_path):
            pass
    assert writer_of(tmp_path) is None
    with pytest.raises(KeyError), writer_lock(tmp_path):
        raise KeyError
    with writer_lock(tmp_path):
        pass
    assert names(tmp_path) == []


@pytest.mark.slow
def test_locks_of_a_killed_process_are_free(tmp_path):
    code = (
        "import sys, pathlib; from tarflowlm.files import writer_lock, waiting_lock\n"
        f"folder = pathlib.Path({str(tmp_path)!r})\n"
        "with writer_lock(folder), waiting_lock(folder / 'x'): print('locked', flush=True); sys.stdin.read()"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", code], **pipes, text=True) as process:
        assert process.stdout.readline() == "locked\n"
        with pytest.raises(UserError, match=f"by process {process.pid} on "), writer_lock(tmp_path):
            pass
        process.kill()
        process.wait()
    assert writer_of(tmp_path) is None
    with writer_lock(tmp_path), waiting_lock(tmp_path / "x"):
        pass


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

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == [1] * 40


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_full_disk_is_one_line_with_place_reason_and_remedy(tmp_path, number):
    message = f"cannot write to {tmp_path} ({os.strerror(number)}): what was saved before is kept; make room and wait"
    system, library = OSError(number, "full"), RuntimeError(f"SafetensorError: I/O error: (os error {number})")
    for failure in (system, library):
        with pytest.raises(UserError) as raised, full_disk_as_user_error(tmp_path, lambda: "wait"):
            raise failure
        assert str(raised.value) == message
    with pytest.raises(UserError), full_disk_as_user_error(tmp_path, lambda: "wait"):
        raise ValueError("wrapped by a library") from system
    for other in (OSError(errno.EACCES, "no"), ValueError("no"), KeyboardInterrupt()):
        with pytest.raises(type(other)), full_disk_as_user_error(tmp_path, lambda: "wait"):
            raise other


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
def test_new_lines_are_whole_or_absent(tmp_path, error):
    path = tmp_path / "lines.jsonl"
    with NewLines(path) as lines:
        lines.write("one\n")
        lines._file = FullAfter(lines._file, 6, error)
        with pytest.raises(UserError if isinstance(error, OSError) else KeyboardInterrupt):
            lines.write("four\nfive\n")
    assert path.read_text(encoding="utf-8") == "one\n"
    with pytest.raises(UserError, match="cannot create"):
        NewLines(path)
    with NewLines(tmp_path / "none.jsonl"):
        pass
    assert not (tmp_path / "none.jsonl").exists()
