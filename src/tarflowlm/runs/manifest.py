"""manifest.json: size and sha256 of the files beside it, so that truncated or altered files are detected.

While a file is being replaced it has two records, old and new, so a kill at any instant leaves a file that the
manifest lists.
"""

import hashlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tarflowlm.errors import UserError
from tarflowlm.files import read_json, replacing, write_json

MANIFEST = "manifest.json"
FORMAT = "tarflowlm-manifest"
VERSION = 1

Record = dict[str, Any]
"""{"size": bytes, "sha256": hexadecimal}."""


def write_manifest(folder: Path, names: Iterable[str]) -> None:
    """Write a manifest of the files `names` of `folder` as they are now."""
    _write(folder, {name: [_record(folder / name)] for name in sorted(names)})


@contextmanager
def replacing_listed(path: Path) -> Iterator[Path]:
    """As `files.replacing`, and updates the manifest of the folder so that it is valid at every instant."""
    folder, name = path.parent, path.name
    with replacing(path) as temporary:
        yield temporary
        new = _record(temporary)
        others = _read(folder) if (folder / MANIFEST).exists() else {}
        _write(folder, others | {name: [new, *others.get(name, [])]})
    _write(folder, others | {name: [new]})


def problem_of(folder: Path, names: Iterable[str] | None = None) -> str | None:
    """What is wrong with the files `names` of `folder` (by default all listed ones), in words; None if nothing is.

    A missing file is a problem only by default: with `names`, the code that reads the file reports it better.
    UserError if the manifest itself is missing or invalid.
    """
    listed = _read(folder)
    for name in listed if names is None else names:
        problem = _problem(folder / name, listed.get(name, []), must_exist=names is None)
        if problem is not None:
            # a run that saves at the same time may have replaced both the file and the manifest
            return problem if _read(folder) == listed else problem_of(folder, names)
    return None


def is_whole(folder: Path, needed: str) -> bool:
    """Whether `folder` has a manifest that lists `needed`, and all listed files are undamaged."""
    try:
        return needed in _read(folder) and problem_of(folder) is None
    except (UserError, OSError):
        return False


def _problem(path: Path, records: list[Record], *, must_exist: bool) -> str | None:
    if not path.is_file():
        return f"{path} is missing" if must_exist else None
    size, sizes = path.stat().st_size, [record["size"] for record in records]
    if not records:
        return f"{path} is not in {MANIFEST}"
    if size not in sizes:
        change = "truncated" if size < sizes[0] else "altered"
        return f"{path} is damaged ({change}: {size:,} bytes where {sizes[0]:,} belong)"
    if _record(path) not in records:
        return f"{path} is damaged (altered: its sha256 is not the one in {MANIFEST})"
    return None


def _record(path: Path) -> Record:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"size": path.stat().st_size, "sha256": digest}


def _write(folder: Path, files: dict[str, list[Record]]) -> None:
    write_json(folder / MANIFEST, {"format": FORMAT, "version": VERSION, "files": files})


def _read(folder: Path) -> dict[str, list[Record]]:
    path = folder / MANIFEST
    document = read_json(path)
    if not isinstance(document, dict) or (document.get("format"), document.get("version")) != (FORMAT, VERSION):
        raise UserError(f"{path} is not a manifest of version {VERSION}: restore it")
    files = document.get("files")
    if not isinstance(files, dict) or not all(map(_are_records, files.values())):
        raise UserError(f"{path} is damaged: restore it")
    return files


def _are_records(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(r, dict) and r.keys() == {"size", "sha256"} and isinstance(r["size"], int) for r in value
    )
