"""Locks between processes. The system releases them when their holder ends, however it ends.

Lock files stay on disk: if one were removed, two processes could hold two files of one name.
"""

import hashlib
import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from errno import ENOLCK, ENOSYS, EOPNOTSUPP
from pathlib import Path

from filelock import FileLock, Timeout

from tarflowlm.errors import UserError
from tarflowlm.files import cache_root

LOCK = ".lock"  # the lock file of a run directory

logger = logging.getLogger("tarflowlm")


@contextmanager
def held(path: Path, timeout: float = -1) -> Iterator[None]:
    """Hold the lock in file `path`, unless its file system, such as Lustre, has none."""
    lock = FileLock(path, timeout, fallback_to_soft=False)
    try:
        lock.acquire()
    except OSError as error:
        if error.errno not in (ENOSYS, ENOLCK, EOPNOTSUPP):
            raise
        logger.warning("%s: no locks on this file system; let only one process write", path.parent)
    try:
        yield
    finally:
        lock.release()


def waiting_lock(path: Path) -> AbstractContextManager[None]:
    """A lock of `path`, which need not exist, to hold in a `with`; waits while others hold it.

    It is for what several processes of one user may write at once, such as a corpus.
    """
    name = hashlib.sha256(str(path.resolve()).encode("utf-8")).hexdigest()[:24]
    folder = cache_root() / "locks"
    folder.mkdir(parents=True, exist_ok=True)
    return held(folder / name)


@contextmanager
def writer_lock(directory: Path) -> Iterator[None]:
    """Be the only writer of a run directory. UserError where there is another."""
    try:
        # longer than `is_written` holds it
        with held(directory / LOCK, timeout=1.0):
            yield
    except Timeout:
        what = f"{directory} is being written by another process"
        raise UserError(f"{what}: wait for it, stop it, or choose another directory") from None


def is_written(directory: Path) -> bool:
    """Whether a process holds the `writer_lock` of a directory."""
    if not (directory / LOCK).exists():
        return False
    try:
        with FileLock(directory / LOCK, timeout=0.0, fallback_to_soft=False):
            return False
    except Timeout:
        return True
    except OSError:  # the folder is read-only, so that nobody is writing, or has no locks
        return False
