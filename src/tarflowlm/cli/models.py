"""What the commands make of the model that they are given: a folder, downloaded with a bar if it is on the hub."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from rich.console import Console

from tarflowlm.data.download import DownloadProgress
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
def _bar(directory: Path) -> Iterator[DownloadProgress]:
    with stages_bar(Console(stderr=True)) as show:
        label = f"downloading {directory.as_posix()}, bytes"
        yield lambda done, total: show(label, done, total)
