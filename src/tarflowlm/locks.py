"""Locks between processes. The system releases them when their holder ends, however it ends.

Lock files stay on disk: if one were removed, two processes could hold two files of one name.
"""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from tarflowlm.errors import UserError
from tarflowlm.files import cache_root

LOCK = ".lock"  # the lock file of a run directory


def waiting_lock(path: Path) -> FileLock:
    """A lock of `path`, which need not exist, to hold in a `with`; waits while others hold it.

    It is for what several processes of one user may write at once, such as a corpus.
    """
    name = hashlib.sha256(str(path.resolve()).encode("utf-8")).hexdigest()[:24]
    folder = cache_root() / "locks"
    folder.mkdir(parents=True, exist_ok=True)
    return FileLock(folder / name)


@contextmanager
def writer_lock(directory: Path) -> Iterator[None]:
    """Be the only writer of a run directory. UserError where there is another."""
    try:
        # longer than `is_written` holds it
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
