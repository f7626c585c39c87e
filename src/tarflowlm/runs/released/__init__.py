"""Trained models that come with the package: a run directory each, named after its folder, with a README of its own.

They are small enough to be package data of the package itself, so that a new user's first sample needs neither a
network nor an extra.
"""

from pathlib import Path

from tarflowlm.errors import UserError

FOLDER = Path(__file__).parent


def released() -> list[str]:
    """Their names."""
    return sorted(path.parent.name for path in FOLDER.glob("*/config.json"))


def locate(directory: str | Path) -> Path:
    """A run directory: the path that was given, or the model of that name where there is no such path."""
    path = Path(directory)
    return FOLDER / path if not path.exists() and str(path) in released() else path


def chosen(directory: Path | None, model: str | None) -> Path:
    """The run directory that a command was given, or that of --model; UserError unless it is one of the two."""
    if (directory is None) == (model is None):
        raise UserError("give a run directory, or --model with one of " + ", ".join(released()))
    if directory is not None:
        return directory
    if model not in released():
        raise UserError(f"model {model!r} does not come with the package: choose one of {', '.join(released())}")
    return FOLDER / model
