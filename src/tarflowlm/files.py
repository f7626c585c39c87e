"""Files that survive kills, other processes and full disks: atomic replacement, locks, one-line
errors. JSON of frozen dataclasses is strict: unknown and missing keys are errors, and types are
checked.
"""

import dataclasses
import errno
import json
import os
import re
import shutil
import socket
import tempfile
import types
import typing
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from filelock import FileLock, Timeout

from tarflowlm.errors import UserError

TEMPORARY = ".tmp"  # suffix of the files that `replacing` writes to
LOCK = ".lock"  # the lock file of a directory, and the prefix of the file that names its holder
_HOLDER = f"{LOCK}.holder"


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a temporary path to write to; on success the file replaces `path`, on failure it is
    removed. It is in the same folder and synced before the rename: a kill or power failure leaves
    the old file or the new one.
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
    """Remove the temporary files of a killed `replacing`. Only for the one process that writes to
    `folder`.
    """
    for leftover in folder.glob(f".*{TEMPORARY}"):
        leftover.unlink()


def sync_file(path: Path) -> None:
    """Return once the content of `path` is on disk. The file must be writable."""
    with path.open("rb+") as file:  # Windows syncs only files that are open for writing
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Return once renames inside `folder` are on disk; does nothing on Windows, where folders
    cannot be opened.
    """
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, value: Any) -> None:
    """Write `value` to `path` as readable JSON, atomically."""
    with replacing(path) as temporary:
        temporary.write_text(
            json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
        )


def read_json(path: Path) -> Any:
    """The JSON value in a file of a run directory."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"{path} is missing: {path.parent} is not a complete run directory"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(
            f"{path} cannot be read as JSON ({error}): restore it or train again"
        ) from None


class NewLines:
    """A new file that grows by whole lines: an interrupted write leaves no torn line, an empty file
    is removed.
    """

    def __init__(self, path: Path) -> None:
        self.path, self._size = path, 0
        try:
            # an empty one was left by a kill
            is_left = path.is_file() and not path.stat().st_size
            self._file = path.open("r+b" if is_left else "xb", buffering=0)
        except OSError as error:
            what = f"cannot create {path}: {error.strerror or error}"
            raise UserError(f"{what}; choose another name, or check the folder") from None

    def write(self, lines: str) -> None:
        """Append text that ends with a line break. Where this fails, the earlier lines are kept."""
        size = self._size + len(data := lines.encode("utf-8"))
        try:
            while data:
                data = data[self._file.write(data) :]
        except BaseException as error:
            with suppress(OSError):
                self._file.truncate(self._size)
            if isinstance(error, OSError):
                what = f"cannot write to {self.path} ({error.strerror or error})"
                raise UserError(f"{what}: its lines are kept; make room") from None
            raise
        self._size = size

    def __enter__(self) -> "NewLines":
        return self

    def __exit__(self, *_raised: object) -> None:
        self._file.close()
        if not self._size:
            self.path.unlink(missing_ok=True)


# Locks. The system releases them when the process that holds them ends, however it ends. Lock files
# stay on disk: if one were removed, two processes could hold two files of the same name.


@contextmanager
def waiting_lock(path: Path) -> Iterator[None]:
    """Holds the lock of `path`, the file `.<name>.lock` beside it; waits while another process or
    thread holds it. For what several processes may write at once, such as a cache entry. Not
    reentrant; `path` need not exist.
    """
    with FileLock(path.with_name(f".{path.name}{LOCK}")):
        yield


def remove_entry(path: Path) -> None:
    """Remove a file or folder, unless a process holds its `waiting_lock`, which is a UserError."""
    try:
        with FileLock(path.with_name(f".{path.name}{LOCK}"), timeout=0):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    except Timeout:
        raise UserError(f"{path} is being prepared by another process: wait for it") from None


@contextmanager
def writer_lock(directory: Path) -> Iterator[None]:
    """Makes this process the only writer of a run directory. It does not wait for another: a run
    may take days.
    """
    lock, holder = FileLock(directory / LOCK, timeout=0), directory / _HOLDER
    try:
        lock.acquire()
    except Timeout:
        what = f"{directory} is being written by {_read_holder(holder)}"
        raise UserError(f"{what}: wait for it, stop it, or choose another directory") from None
    try:
        # in a separate file: a locked file cannot be read on Windows, and some versions of filelock
        # truncate it
        holder.write_text(f"process {os.getpid()} on {socket.gethostname()}\n", encoding="utf-8")
        yield
    finally:
        with suppress(OSError):
            holder.unlink()
        lock.release()


def writer_of(directory: Path) -> str | None:
    """A description of the process that holds the `writer_lock` of a directory, or None. Changes no
    file.
    """
    if not (directory / _HOLDER).exists():
        return None
    try:
        with FileLock(directory / LOCK, timeout=0):
            return None
    except Timeout:
        return _read_holder(directory / _HOLDER)
    except (
        OSError,
        NotImplementedError,
    ):  # a read-only folder: the file may name a process that was killed
        return None


def _read_holder(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip() or "another process"
    except (OSError, ValueError):  # it holds the lock and has not yet written its name
        return "another process"


@contextmanager
def full_disk_as_user_error(directory: Path, remedy: Callable[[], str]) -> Iterator[None]:
    """Turns any error that a full disk caused, here or in a library, into a UserError about writing
    to `directory`. `remedy()` is called after the failure and says what to do once there is room.
    Other errors pass through.
    """
    try:
        yield
    except BaseException as error:
        if (reason := _disk_full_reason(error)) is None:
            raise
        what = f"cannot write to {directory} ({reason})"
        raise UserError(
            f"{what}: what was saved before is kept; make room and {remedy()}"
        ) from error


def _disk_full_reason(error: BaseException | None) -> str | None:
    """The system's message if `error` comes from a full disk, an exceeded quota or a too large
    file, else None.
    """
    if error is None:
        return None
    in_text = re.search(
        r"\(os error (\d+)\)", str(error)
    )  # safetensors gives the error number only in its message
    number = error.errno if isinstance(error, OSError) else int(in_text[1]) if in_text else None
    if number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return os.strerror(number)
    # torch.distributed.checkpoint collects the errors of its processes
    failures = [failure for failure, _ in getattr(error, "failures", {}).values()]
    inner = (_disk_full_reason(e) for e in (error.__cause__, error.__context__, *failures))
    return next((reason for reason in inner if reason is not None), None)


T = TypeVar("T")


def to_dict(config: Any) -> Any:
    """A dataclass as plain JSON values; tuples become lists, and a class attribute `family` becomes
    a key.
    """
    if dataclasses.is_dataclass(config):
        family = {"family": config.family} if hasattr(config, "family") else {}
        return family | {
            f.name: to_dict(getattr(config, f.name)) for f in dataclasses.fields(config)
        }
    return [to_dict(item) for item in config] if isinstance(config, (tuple, list)) else config


def flatten(value: Any, name: str = "") -> dict[str, Any]:
    """The fields of a configuration, or of JSON values, by their dotted names as options call
    them.
    """
    value = to_dict(value)
    if isinstance(value, list) and value and isinstance(value[0], dict):
        value = dict(enumerate(value))
    if not isinstance(value, dict):
        return {name: value}
    parts = (flatten(inner, f"{name}.{key}" if name else str(key)) for key, inner in value.items())
    return {key: leaf for part in parts for key, leaf in part.items()}


def from_dict(cls: type[T], data: Any, where: str = "config") -> T:
    """The dataclass `cls` from plain JSON values; `family` selects the member of a union of
    dataclasses. UserError, naming the dotted key, for unknown keys, missing keys and values of the
    wrong type.
    """
    _require(isinstance(data, dict), where, f"expected an object, found {data!r}")
    hints, family = typing.get_type_hints(cls), getattr(cls, "family", None)
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for key, value in data.items():
        is_known = key in fields or (key == "family" and family is not None and value == family)
        _require(
            is_known, f"{where}.{key}", f"unknown key; known keys are {', '.join(sorted(fields))}"
        )
    for name, field in fields.items():
        is_needed = (
            field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        )
        _require(name in data or not is_needed, f"{where}.{name}", "missing key")
    return cls(
        **{
            name: _value(hints[name], data[name], f"{where}.{name}")
            for name in fields
            if name in data
        }
    )


def _require(is_valid: bool, where: str, message: str) -> None:
    if not is_valid:
        raise UserError(f"{where}: {message}")


def _value(hint: Any, value: Any, where: str) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        members = [m for m in arguments if m is not type(None)]
        if len(members) > 1:
            by_family = {m.family: m for m in members}
            family = value.get("family") if isinstance(value, dict) else None
            is_known = isinstance(family, str) and family in by_family
            _require(
                is_known,
                f"{where}.family",
                f"{family!r} is not one of {', '.join(map(repr, by_family))}",
            )
            members = [by_family[family]]
        return _value(members[0], value, where)
    if origin is typing.Literal:
        _require(
            value in arguments, where, f"{value!r} is not one of {', '.join(map(repr, arguments))}"
        )
        return value
    if origin is tuple:
        _require(isinstance(value, (list, tuple)), where, f"expected a list, found {value!r}")
        return tuple(_value(arguments[0], v, f"{where}[{i}]") for i, v in enumerate(value))
    if dataclasses.is_dataclass(hint):
        return from_dict(typing.cast(type, hint), value, where)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    is_right = isinstance(value, hint) and (hint is bool or not isinstance(value, bool))
    _require(is_right, where, f"expected {hint.__name__}, found {value!r}")
    return value
