"""What the commands make of the model that they are given: a folder, downloaded with a bar if it is on the hub."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from rich.console import Console

from tarflowlm.progress import Progress
from tarflowlm.runs import checkpoint, released
from tarflowlm.terminal.bars import stages_bar


def load_checkpoint(directory: Path, device: str | torch.device = "cpu") -> checkpoint.Checkpoint:
    """As `runs.checkpoint.load_checkpoint`."""
    with _bar(directory) as progress:
        return checkpoint.load_checkpoint(directory, device, progress)


def locate(directory: Path) -> Path:
    """As `runs.released.locate`."""
    with _bar(directory) as progress:
        return released.locate(directory, progress)


@contextmanager
def _bar(directory: Path) -> Iterator[Progress]:
    with stages_bar(Console(stderr=True)) as show:
        yield _Download(lambda done: show(f"downloading {directory.as_posix()}, bytes", done, None))


class _Download:
    """Counts bytes for a bar."""

    def __init__(self, show: Callable[[int], None]) -> None:
        self._show, self._done = show, 0

    def stage(self, name: str, total: int | None = None, done: int = 0) -> None:
        self._done = done

    def advance(self, count: int = 1) -> None:
        self._done += count
        self._show(self._done)
