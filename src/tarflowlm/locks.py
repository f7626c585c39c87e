"""Locks between processes. The system releases them when their holder ends, however it ends.

Lock files stay on disk: if one were removed, two processes could hold two files of one name.
"""

import hashlib
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from tarflowlm.errors import UserError
from tarflowlm.files import cache_root

LOCK = ".lock"  # the lock file of a run directory
_HOLDER = ".lock.holder"  # the file beside it, which names the process


def _lock_of(path: Path, timeout: float = -1) -> FileLock:
    """The lock of a path, which need not exist; its file is in the cache, where nobody sees it."""
    name = hashlib.sha256(str(path.resolve()).encode("utf-8")).hexdigest()[:24]
    folder = cache_root() / "locks"
    folder.mkdir(parents=True, exist_ok=True)
    return FileLock(folder / name, timeout=timeout)


@contextmanager
def waiting_lock(path: Path) -> Iterator[None]:
    """Hold the lock of `path`, and wait while another process or thread holds it.

    For what several processes of one user may write at once, such as a corpus. Not reentrant.
    """
    with _lock_of(path):
        yield


def remove_entry(path: Path) -> None:
    """Remove a file or folder. UserError where a process holds its `waiting_lock`."""
    try:
        with _lock_of(path, timeout=0.0):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    except Timeout:
        raise UserError(f"{path} is being prepared by another process: wait for it") from None


@contextmanager
def writer_lock(directory: Path) -> Iterator[None]:
    """Be the only writer of a run directory.

    UserError, naming the other process, where there is one: a run may take days.
    """
    lock = FileLock(directory / LOCK, timeout=0.0)
    holder = directory / _HOLDER
    try:
        lock.acquire()
    except Timeout:
        what = f"{directory} is being written by {_read_holder(holder)}"
        raise UserError(f"{what}: wait for it, stop it, or choose another directory") from None
    try:
        # a file of its own: Windows cannot read a locked one, some versions of filelock empty it
        holder.write_text(f"process {os.getpid()} on {socket.gethostname()}\n", encoding="utf-8")
        yield
    finally:
        with suppress(OSError):
            holder.unlink()
        lock.release()


def writer_of(directory: Path) -> str | None:
    """The process that holds the `writer_lock` of a directory, in words, or None."""
    if not (directory / _HOLDER).exists():
        return None
    try:
        with FileLock(directory / LOCK, timeout=0.0):
            return None
    except Timeout:
        return _read_holder(directory / _HOLDER)
    except (OSError, NotImplementedError):
        # nobody can be writing to a folder that is read-only: its writer was killed
        return None


def _read_holder(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip() or "another process"
    except (OSError, ValueError):  # it holds the lock and has not written its name yet
        return "another process"
