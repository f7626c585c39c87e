"""Trained models that come with the package, so that a first sample needs no download: a run directory each."""

from pathlib import Path

from tarflowlm.errors import UserError
from tarflowlm.progress import SILENT, Progress
from tarflowlm.runs.hub import fetch, is_reference

FOLDER = Path(__file__).parent
DEFAULT = "english-small"
"""The default model."""


def released() -> list[str]:
    """The names of the released models, sorted."""
    return sorted(path.parent.name for path in FOLDER.glob("*/config.json"))


def locate(directory: str | Path, progress: Progress = SILENT) -> Path:
    """The path itself, or where there is none, the released model of that name or a downloaded hf:OWNER/NAME."""
    path = Path(directory)
    if is_reference(path) and not path.exists():
        return fetch(path, progress)
    return FOLDER / path if not path.exists() and str(path) in released() else path


def read_only_reason(directory: str | Path) -> str | None:
    """The reason why nothing may be written to what `locate` finds, or None for a run directory of the user's own."""
    path = Path(directory)
    if is_reference(path) and not path.exists():
        return f"{path.as_posix()} is on the hub"
    path = locate(path).resolve()
    return f"{path.name} comes with the package" if path.parent == FOLDER.resolve() else None


def choose_directory(directory: Path | None, model: str | None) -> Path:
    """The run directory of a command: `directory`, or the released model `model`, or without both `DEFAULT`."""
    if directory is not None and model is not None:
        raise UserError(f"{directory} and --model {model}: give one of them")
    if directory is not None:
        return directory
    if model is not None and model not in released():
        raise UserError(f"model {model!r} does not come with the package: choose one of {', '.join(released())}")
    return FOLDER / (model or DEFAULT)
