"""manifest.json: size and sha256 of the files beside it, so that a damaged training state is noticed.

It is written last into the folder of a training state (`training.state`). Earlier versions also wrote one beside the
weights of a run, with one record per file, or two while the file was being replaced.
"""

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tarflowlm.errors import UserError
from tarflowlm.files import read_json, write_json

MANIFEST = "manifest.json"
FORMAT, VERSION = "tarflowlm-manifest", 1


def write_manifest(folder: Path, names: Iterable[str]) -> None:
    """Write a manifest of the files `names` of `folder` as they are now."""
    files = {name: [_record(folder / name)] for name in sorted(names)}
    write_json(folder / MANIFEST, {"format": FORMAT, "version": VERSION, "files": files})


def is_whole(folder: Path, needed: str) -> bool:
    """Whether `folder` has a manifest that lists `needed`, and all listed files are undamaged."""
    try:
        listed = read_json(folder / MANIFEST)["files"]
        return needed in listed and all(_record(folder / name) in records for name, records in listed.items())
    except (UserError, OSError, LookupError, TypeError, AttributeError):
        return False


def recorded_problem(path: Path) -> str | None:
    """A description of how `path` differs from its record in the manifest beside it, or None, also without one."""
    try:
        records = read_json(path.parent / MANIFEST)["files"][path.name]
        sizes = [record["size"] for record in records]
    except (UserError, LookupError, TypeError):
        return None
    size = path.stat().st_size
    if size not in sizes:
        return f"{path} is damaged (altered: {size:,} bytes where {sizes[0]:,} belong)"
    if _record(path) not in records:
        return f"{path} is damaged (altered: its sha256 is not the one in {MANIFEST})"
    return None


def _record(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"size": path.stat().st_size, "sha256": digest}
