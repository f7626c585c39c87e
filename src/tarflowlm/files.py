"""Files that survive kills and full disks: they are replaced atomically, and errors take a line."""

import errno
import hashlib
import json
import logging
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

from filelock import FileLock, Timeout

from tarflowlm.errors import UserError

TEMPORARY = ".tmp"
"""Suffix of the files that `replacing` writes to; the one writer of a folder removes old ones."""


OTHER_CACHE = "set TARFLOWLM_CACHE to a folder that you can write to"


def cache_root() -> Path:
    """The user's cache: $TARFLOWLM_CACHE, or ~/.cache/tarflowlm."""
    place = Path(os.environ.get("TARFLOWLM_CACHE") or "~/.cache/tarflowlm")
    try:
        return place.expanduser()
    except RuntimeError:
        raise UserError(f"{place}: there is no home directory; {OTHER_CACHE}") from None


def sources_dir() -> Path:
    """The folder of downloaded raw corpora."""
    return cache_root() / "sources"


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path to write to; on success that file replaces `path`.

    A kill or a power failure leaves the old file or the new one: it is synced before the rename.
    """
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=TEMPORARY)
    os.close(descriptor)
    temporary = Path(name)
    try:
        yield temporary
        sync_file(temporary)
        temporary.chmod(0o644)  # mkstemp gives 0o600
        temporary.replace(path)
        sync_folder(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def sync_file(path: Path) -> None:
    """Return once the content of the writable file `path` is on disk."""
    with path.open("rb+") as file:  # Windows syncs only files that are open for writing
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Return once renames inside `folder` are on disk; on Windows, at once."""
    if os.name == "nt":  # it cannot open folders
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_of(path: Path) -> str:
    """The sha256 (hex) of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def for_json(item: object) -> Any:
    """A value with None instead of every number that is not finite, for which JSON has no word."""
    if isinstance(item, float) and not math.isfinite(item):
        return None
    if isinstance(item, dict):
        return {key: for_json(inner) for key, inner in item.items()}
    return [for_json(inner) for inner in item] if isinstance(item, (list, tuple)) else item


def json_line(value: Mapping[str, object]) -> str:
    """One JSON object as a line."""
    return json.dumps(for_json(value), ensure_ascii=False) + "\n"


def write_json(path: Path, value: object) -> None:
    """Write `value` to `path` as readable JSON, atomically."""
    with replacing(path) as temporary:
        text = json.dumps(value, indent=2, ensure_ascii=False)
        temporary.write_text(text + "\n", encoding="utf-8")


LARGEST_JSON = 16_000_000
"""Bytes of the largest JSON file that is read; those of a run have some thousands."""


def read_json(path: Path) -> Any:
    """The JSON value in a file. UserError if it is missing, damaged, or too large to be ours."""
    # a pipe would be waited for, and a device has no end
    if path.exists() and not (path.is_file() and path.stat().st_size <= LARGEST_JSON):
        what = f"{path} is no file of at most {LARGEST_JSON / 1e6:.0f} MB"
        raise UserError(f"{what}: restore it")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} is missing: {path.parent} is not complete") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read as JSON ({error}): restore it") from None


@contextmanager
def new_lines(path: Path) -> Iterator[TextIO]:
    """A new text file, whose lines are written at once; it is removed if it has none."""
    try:
        file = path.open("x", buffering=1, encoding="utf-8", newline="\n")
    except OSError as error:
        raise UserError(f"cannot create {path}: {error.strerror}; choose another") from None
    try:
        with full_disk_as_user_error(path, lambda: "choose another name"), file:
            yield file
    finally:
        if not path.stat().st_size:
            path.unlink()


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yield a folder that becomes `path`; on failure nothing is left."""
    if path.exists():
        raise UserError(f"{path} exists already: choose a new directory")
    # it has another name until it is complete, so that a kill leaves nothing that blocks the name
    partial = path.with_name(f".{path.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        with full_disk_as_user_error(path, lambda: "start again"):
            yield partial
            partial.rename(path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


@contextmanager
def full_disk_as_user_error(directory: Path, remedy: Callable[[], str]) -> Iterator[None]:
    """Turn an error that a full disk caused, here or in a library, into a UserError.

    `remedy()` is called after the failure, and names the next step once there is room again.
    """
    try:
        yield
    except BaseException as error:
        reason = _disk_full_reason(error)
        if reason is None:
            raise
        where = f"cannot write to {directory} ({reason})"
        raise UserError(f"{where}: make room and {remedy()}") from error


def _disk_full_reason(error: BaseException | None) -> str | None:
    """The system's words for a full disk, an exceeded quota or a too large file, else None."""
    if error is None:
        return None
    for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        # safetensors gives the number only in its message
        if getattr(error, "errno", None) == number or f"(os error {number})" in str(error):
            return os.strerror(number)
    # torch.distributed.checkpoint collects the errors of its processes
    failures = [failure for failure, _ in getattr(error, "failures", {}).values()]
    reasons = map(_disk_full_reason, (error.__cause__, error.__context__, *failures))
    return next(filter(None, reasons), None)


LOCK = ".lock"  # the lock file of a run directory

logger = logging.getLogger("tarflowlm")


@contextmanager
def held(path: Path, timeout: float = -1) -> Iterator[None]:
    """Hold the lock in file `path`, unless its file system, such as Lustre, has none."""
    lock = FileLock(path, timeout, fallback_to_soft=False)
    try:
        lock.acquire()
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
            raise
        logger.warning("%s: no locks on this file system; let only one process write", path.parent)
    try:
        yield
    finally:
        lock.release()


def waiting_lock(path: Path) -> AbstractContextManager[None]:
    """A lock of `path`, which need not exist, to hold in a `with`; waits while others hold it.

    It is for files that several processes of one user may write at once, such as a corpus.
    """
    name = hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:24]
    folder = cache_root() / "locks"
    with suppress(PermissionError):
        folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK):
        raise UserError(f"the cache {cache_root()} cannot be written to: {OTHER_CACHE}")
    return held(folder / name)


@contextmanager
def writer_lock(directory: Path) -> Iterator[None]:
    """Be the only writer of a run directory. UserError if there is another one."""
    try:
        # longer than `is_written` holds it
        with held(directory / LOCK, timeout=1.0):
            yield
    except Timeout:
        what = f"{directory} is being written by another process"
        raise UserError(f"{what}: wait for it, stop it, or choose another directory") from None


def is_written(directory: Path) -> bool | None:
    """Whether a process holds the `writer_lock` of a directory; None where nobody can tell."""
    if not (directory / LOCK).exists():
        return False
    try:
        with FileLock(directory / LOCK, timeout=0.0, fallback_to_soft=False):
            return False
    except Timeout:
        return True
    except OSError:  # it is read-only here, another user's, or has no locks
        return None
