"""Locks between processes. The system releases them when their holder ends, however it ends.

Lock files stay on disk: if one were removed, two processes could hold two files of one name.
"""

import hashlib
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from tarflowlm.errors import UserError
from tarflowlm.files import cache_root

LOCK = ".lock"  # the lock file of a run directory


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
    """Be the only writer of a run directory. UserError where there is another."""
    try:
        # longer than `is_written` holds it; a run may take days
        held = FileLock(directory / LOCK).acquire(timeout=1.0)
    except Timeout:
        what = f"{directory} is being written by another process"
        raise UserError(f"{what}: wait for it, stop it, or choose another directory") from None
    with held:
        yield


def is_written(directory: Path) -> bool:
    """Whether a process holds the `writer_lock` of a directory."""
    if not (directory / LOCK).exists():
        return False
    try:
        with FileLock(directory / LOCK, timeout=0.0):
            return False
    except Timeout:
        return True
    except (OSError, NotImplementedError):  # nobody can be writing to a folder that is read-only
        return False
