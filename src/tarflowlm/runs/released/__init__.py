"""Trained models that come with the package: one run directory each, with a README.

They are small enough to be package data, so a first sample needs neither a download nor an extra.
"""

from pathlib import Path

from tarflowlm.data.download import DownloadProgress
from tarflowlm.errors import UserError
from tarflowlm.runs.hub import fetch, is_reference

FOLDER = Path(__file__).parent
DEFAULT = "english-small"
"""The model of whoever names none."""


def released() -> list[str]:
    """The names of the released models, sorted."""
    return sorted(path.parent.name for path in FOLDER.glob("*/config.json"))


def locate(directory: str | Path, progress: DownloadProgress | None = None) -> Path:
    """A run directory: the path itself, or where there is no such path, the released model or that of the hub.

    Download, `progress` and errors as in `hub.fetch`.
    """
    path = Path(directory)
    if is_reference(path) and not path.exists():
        return fetch(path, progress)
    return FOLDER / path if not path.exists() and str(path) in released() else path


def borrowed(directory: str | Path) -> str | None:
    """Whose the run directory is that `locate` finds, in words; None for the user's own, which may be written to."""
    path = Path(directory)
    if is_reference(path) and not path.exists():
        return f"{path.as_posix()} is on the hub"
    path = locate(path).resolve()
    return f"{path.name} comes with the package" if path.parent == FOLDER.resolve() else None


def chosen(directory: Path | None, model: str | None) -> Path:
    """The run directory of a command: `directory`, or that of the released model `model`; of `DEFAULT` without both.

    UserError if both are given, and for an unknown model.
    """
    if directory is not None and model is not None:
        raise UserError(f"{directory} and --model {model}: give one of them")
    if directory is not None:
        return directory
    if model is None:
        return FOLDER / DEFAULT
    if model not in released():
        raise UserError(f"model {model!r} does not come with the package: choose one of {', '.join(released())}")
    return FOLDER / model
