"""`tarflowlm info --disk`: what lies on the disk, how large it is, and how to be rid of it."""

import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from tarflowlm.files import cache_root, sources_dir
from tarflowlm.runs import BEST, STATE, SUMMARY
from tarflowlm.runs.hub import FOLDER, folder_of
from tarflowlm.runs.records import find_runs
from tarflowlm.terminal.bars import print_result

RUNS = Path("runs")
"""The folder of runs in the examples, which is looked at if none is named."""


@dataclass(frozen=True)
class Place:
    """A folder, its size in bytes, and what happens to whoever deletes it."""

    what: str
    path: str
    bytes: int
    deleting: str


def show_disk(runs: Iterable[Path], *, as_json: bool) -> None:
    """Print the places of the package, and the runs in these folders, by default in RUNS."""
    found = [*_of_package(), *_of_runs(runs or [RUNS])]
    rows = [
        (place.what, f"{place.path}\n{place.bytes / 1e6:,.1f} MB; {place.deleting}")
        for place in found
    ]
    total = sum(place.bytes for place in found if place.what != "training states")
    title = f"{total / 1e6:,.1f} MB on the disk; to free it, delete a folder"
    print_result(as_json, {"places": list(map(asdict, found)), "bytes": total}, title, rows)


def _of_package() -> Iterator[Place]:
    cache = cache_root()
    for what, path, deleting in (
        ("shipped models", FOLDER, "pip uninstall tarflowlm"),
        ("prepared texts", cache / "corpora", "they are made again when a text is used"),
        ("downloaded texts", sources_dir(), "they are downloaded again when used"),
        ("compiled steps", cache / "compiled", "compiled again, in ten seconds"),
    ):
        yield Place(what, str(path), size_of(path), deleting)


def _of_runs(folders: Iterable[Path]) -> Iterator[Place]:
    """Every run, and the part of it that only its training needs."""
    for run in (run for folder in folders for run in find_runs(folder_of(folder))):
        yield Place("run", str(run), size_of(run), f"the model goes, with its log and {BEST}/")
        states = run / STATE
        if states.is_dir():
            is_finished = (run / SUMMARY).exists()
            loss = "" if is_finished else ", and cannot go on training"
            yield Place("training states", str(states), size_of(states), f"the model stays{loss}")


def size_of(folder: Path) -> int:
    """Bytes of the files below a folder; links count as such."""
    found = 0
    for place, _, names in os.walk(folder):
        found += sum(os.lstat(os.path.join(place, name)).st_size for name in names)
    return found
