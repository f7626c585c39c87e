"""Files that survive kills, other processes and full disks: atomic replacement, locks, one-line errors."""

import errno
import json
import os
import re
import socket
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from tarflowlm.errors import UserError

TEMPORARY = ".tmp"
"""Suffix of the files that `replacing` writes to."""
LOCK = ".lock"
"""The lock file of a directory, and the prefix of the file that names its holder."""
_HOLDER = f"{LOCK}.holder"
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


# atomic files


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a temporary path to write to; on success the file replaces `path`, on failure it is removed.

    The temporary file is in the same folder and is synced before the rename, so a kill or a power failure leaves
    the old file or the new one. OSError from the system, such as a missing folder, passes through.
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


def remove_leftovers(folder: Path) -> None:
    """Remove the temporary files of a killed `replacing`. Only for the one process that writes to `folder`."""
    for leftover in folder.glob(f".*{TEMPORARY}"):
        leftover.unlink()


def sync_file(path: Path) -> None:
    """Return once the content of `path` is on disk. The file must be writable."""
    with path.open("rb+") as file:  # Windows syncs only files that are open for writing
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Return once renames inside `folder` are on disk; does nothing where a system cannot open folders (Windows)."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except PermissionError:
        if os.name == "nt":
            return
        raise
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, value: Any) -> None:
    """Write `value` to `path` as readable JSON, atomically. TypeError for a value that JSON cannot hold."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_json(path: Path) -> Any:
    """The JSON value in a file of a run directory. UserError, naming the file, if it is missing or not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} is missing: {path.parent} is not a complete run directory") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read as JSON ({error}): restore it or train again") from None


# locks: the system releases them when the process that holds them ends, however it ends
#
# Lock files stay on disk. If one were removed, two processes could lock two files of the same name: one holds the
# removed file while another creates and locks a new one. (filelock itself removes them on Windows, and in versions
# 3.21 to 3.28 everywhere.)


@contextmanager
def waiting_lock(path: Path) -> Iterator[None]:
    """Holds the lock of `path`, the file `.<name>.lock` beside it; waits while another process or thread holds it.

    For files that several processes may write at once, such as a cache entry. Not reentrant. The folder of `path`
    must exist, `path` itself need not.
    """
    lock = FileLock(path.with_name(f".{path.name}{LOCK}"))
    with _locks_as_user_error(path.parent):
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


@contextmanager
def writer_lock(directory: Path) -> Iterator[None]:
    """Makes this process the only writer of the run directory `directory`.

    If another process holds the lock it does not wait, since a run may take days: UserError, naming that process.
    """
    lock, holder = FileLock(directory / LOCK, timeout=0), directory / _HOLDER
    try:
        with _locks_as_user_error(directory):
            lock.acquire()
    except Timeout:
        who = _read_holder(holder)
        raise UserError(
            f"{directory} is being written by {who}: wait for it, stop it, or choose another directory"
        ) from None
    try:
        # in a separate file: a locked file cannot be read on Windows, and some versions of filelock truncate it
        holder.write_text(f"process {os.getpid()} on {socket.gethostname()}\n", encoding="utf-8")
        yield
    finally:
        with suppress(OSError):
            holder.unlink()
        lock.release()


def writer_of(directory: Path) -> str | None:
    """Which process holds the `writer_lock` of a directory, in words; None if none does. Changes no file."""
    holder = directory / _HOLDER
    if not holder.exists():
        return None
    lock = FileLock(directory / LOCK, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        return _read_holder(holder)
    except (OSError, NotImplementedError):
        # a folder that is only to be read, or without locks: what the file says may be of a process that was killed
        return None
    lock.release()
    return None


@contextmanager
def _locks_as_user_error(folder: Path) -> Iterator[None]:
    """UserError where the file system of `folder` knows no locks, as some network ones."""
    try:
        yield
    except NotImplementedError:
        raise UserError(f"{folder}: its file system has no locks; choose a folder on another one") from None


def _read_holder(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip() or "another process"
    except (OSError, ValueError):  # it holds the lock and has not yet written its name
        return "another process"


# full disks


@contextmanager
def full_disk_as_user_error(directory: Path, remedy: Callable[[], str]) -> Iterator[None]:
    """Turns any error that a full disk caused, here or in a library, into a UserError about writing to `directory`.

    `remedy()` is called after the failure and says what to do once there is room. Other errors pass through.
    """
    try:
        yield
    except BaseException as error:
        reason = _disk_full_reason(error)
        if reason is None:
            raise
        raise UserError(
            f"cannot write to {directory} ({reason}): what was saved before is kept; make room and {remedy()}"
        ) from error


def _disk_full_reason(error: BaseException | None) -> str | None:
    """The system's message if `error` comes from a full disk, an exceeded quota or a too large file, else None."""
    if error is None:
        return None
    # safetensors gives the error number only in its message
    in_text = re.search(r"\(os error (\d+)\)", str(error))
    number = error.errno if isinstance(error, OSError) else int(in_text[1]) if in_text else None
    if number in _DISK_FULL:
        return os.strerror(number)
    # torch.distributed.checkpoint collects the errors of its processes
    failures = [failure for failure, _ in getattr(error, "failures", {}).values()]
    inner = (_disk_full_reason(e) for e in (error.__cause__, error.__context__, *failures))
    return next((reason for reason in inner if reason is not None), None)
