"""Trained models by name: in the package, and on the Hugging Face hub (docs/hub.md).

Only the files of a model are fetched, by exact name: nothing that could be unpickled or run.
"""

import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from tarflowlm.config import MODEL_TYPE
from tarflowlm.errors import UserError, first_line, guess
from tarflowlm.files import read_json
from tarflowlm.runs import CARD, CONFIG, SUMMARY, TOKENIZER, WEIGHTS

PREFIX = "hf:"
FILES = (CONFIG, TOKENIZER, WEIGHTS)
"""The files of a model."""
REPOSITORY = r"\w[\w.-]*/\w[\w.-]*"
"""OWNER/NAME; never the path of a folder above."""


def is_reference(name: str | Path) -> bool:
    """Whether `name` is meant for the hub: it begins with hf:."""
    return Path(name).as_posix().startswith(PREFIX)


def fetch(name: str | Path) -> Path:
    """The folder with the model hf:OWNER/NAME[@REVISION], downloaded if needed."""
    name = Path(name).as_posix()
    match = re.fullmatch(rf"{PREFIX}({REPOSITORY})(?:@([\w./-]+))?", name)
    if match is None:
        raise UserError(f"{name}: name a model of the hub as hf:OWNER/NAME[@REVISION]")
    import huggingface_hub

    repository, revision = match.groups()
    with hub_errors(name):
        get = partial(huggingface_hub.snapshot_download, repository)
        # first, so that a large model of another kind is not downloaded in vain
        config = Path(get(revision=revision, allow_patterns=[CONFIG])) / CONFIG
        document = read_json(config) if config.exists() else None
        if not isinstance(document, dict) or document.get("model_type") != MODEL_TYPE:
            raise UserError(f"{name} is not a model of tarflowlm: give one of `tarflowlm push`")
        # of the same commit, after which the folder is named, whatever was pushed meanwhile
        commit = config.parent.name
        folder = Path(get(revision=commit, allow_patterns=[*FILES, CARD, SUMMARY]))
    for file in FILES:
        if not (folder / file).exists():
            what = f"{name}: its {file} is not on the hub, or the connection is down"
            raise UserError(f"{what}; run this again later")
    return folder


@contextmanager
def hub_errors(name: str) -> Iterator[None]:
    """Turn errors of the hub, and of the connection to it, into one UserError about `name`."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    # the client's errors derive from OSError and from the error of its HTTP library
    kinds: tuple[type[Exception], ...] = (
        HFValidationError,
        RuntimeError,
        *HfHubHTTPError.__bases__,
    )
    log = logging.getLogger("huggingface_hub")
    level = log.level
    log.setLevel(logging.ERROR)  # without notices of retries
    try:
        yield
    except kinds as error:
        if isinstance(error, OSError) and error.filename is not None:
            raise  # an error of the disk
        raise UserError(f"{name}: {_reason(error)}") from error
    finally:
        log.setLevel(level)


def _reason(error: Exception) -> str:
    from huggingface_hub import constants, errors

    place = constants.ENDPOINT
    log_in = "log in with `hf auth login` or set HF_TOKEN"
    match error:
        case errors.LocalEntryNotFoundError() | errors.OfflineModeIsEnabled():
            return f"{place} cannot be reached; check the connection and HF_HUB_OFFLINE"
        case errors.RepositoryNotFoundError():  # a gated one as well
            return f"{place} has no such model, or it is private; check the name, or {log_in}"
        case errors.RevisionNotFoundError():
            return "it has no such revision; leave out what follows @"
        case errors.HfHubHTTPError():
            status = error.response.status_code
            remedy = log_in if status in (401, 403) else "try again later"
            return f"{place} answers {status}; {remedy}"
    return f"{place} failed ({first_line(error)}); run this again"


FOLDER = Path(__file__).parent / "released"
DEFAULT = "stories"


def released() -> list[str]:
    """The names of the released models, sorted."""
    return sorted(path.parent.name for path in FOLDER.glob(f"*/{CONFIG}"))


def folder_of(name: str | Path) -> Path:
    """The folder that a path or the name of a released model means.

    Only a run directory hides the released model of its name.
    """
    path = Path(name)
    # os.path: False, not OSError, for impossible names
    is_run = os.path.exists(path / CONFIG)
    return FOLDER / path if not is_run and str(path) in released() else path


def shown_name(name: str | Path | None, folder: Path) -> str:
    """How to call the model in `folder` that was asked for by `name`, or is the default."""
    # folders in the hub's cache are named after commits
    given = Path(name or "").as_posix()
    return given if is_reference(given) else folder.resolve().name


def check_model(name: str | Path) -> None:
    """UserError unless it names a model: a run directory, a released model or one of the hub.

    It imports no torch, and does not ask the hub.
    """
    path = Path(name)
    if not is_reference(path) and not os.path.exists(folder_of(path) / CONFIG):
        known = released()
        lacks = f", as {CONFIG} is missing" if os.path.isdir(path) else ""
        remedy = f"{guess(str(path), known)}give one, hf:OWNER/NAME, or {', '.join(known)}"
        if " " in str(name):
            remedy = "give a text to continue as --prompt TEXT"
        shown = path if str(name) else repr("")
        raise UserError(f"{shown} is not a run directory{lacks}: {remedy}")


def read_card(directory: Path) -> str:
    """The model card of a directory; empty if there is none."""
    card = directory / CARD
    return card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""


def purpose(card: str) -> str:
    """The purpose of a model: the paragraph after the title of its card, or nothing."""
    found = re.search(r"^# .*\n+((?:.+\n?)+)", card, re.MULTILINE)
    return "" if found is None else " ".join(found[1].split())
