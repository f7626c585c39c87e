"""Trained models by name: those that come with the package, and those on the Hugging Face hub.

`huggingface_hub` is imported only for names with hf:. Only the files of an exported model are
fetched, by exact name, so nothing arrives that could be unpickled or run. The checksum of the
weights is compared on load (docs/hub.md).
"""

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from tarflowlm.config import MODEL_TYPE
from tarflowlm.errors import UserError, first_line, unknown
from tarflowlm.files import read_json

PREFIX = "hf:"
CARD = "README.md"
FILES = ("config.json", "tokenizer.json", "model.safetensors", "manifest.json")
"""The files of a model, all that is fetched beside its card; the manifest is there for earlier
versions' models.
"""
REPOSITORY = r"\w[\w.-]*/\w[\w.-]*"
"""OWNER/NAME; never the path of a folder above."""
_REFERENCE = re.compile(rf"{PREFIX}({REPOSITORY})(?:@([\w./-]+))?")


def is_reference(name: str | Path) -> bool:
    """Whether `name` is meant for the hub: it begins with hf:."""
    return Path(name).as_posix().startswith(PREFIX)


def hub_client(purpose: str) -> Any:
    """The package `huggingface_hub`, imported for `purpose`."""
    try:
        import huggingface_hub
        import huggingface_hub.constants
        import huggingface_hub.errors
    except ImportError:
        raise UserError(f"{purpose} needs huggingface_hub: pip install 'tarflowlm[hub]'") from None
    return huggingface_hub


def fetch(name: str | Path) -> Path:
    """The folder with the model hf:OWNER/NAME or hf:OWNER/NAME@REVISION, downloaded unless the
    cache has it.

    Offline, the cache is used. Weights that fail their checksum are removed from it. The client
    shows its progress.
    """
    name = Path(name).as_posix()
    if (match := _REFERENCE.fullmatch(name)) is None:
        raise UserError(
            f"{name}: name a model of the hub as hf:OWNER/NAME or hf:OWNER/NAME@REVISION"
        )
    hub, (repository, revision) = hub_client(name), match.groups()
    with hub_errors(name):
        get = partial(hub.snapshot_download, repository, revision=revision)
        # first, so that a large model of another kind is not downloaded in vain
        config = Path(get(allow_patterns=FILES[0])) / FILES[0]
        document = read_json(config) if config.exists() else None
        if not isinstance(document, dict) or not (
            document.get("model_type") == MODEL_TYPE or "train" in document
        ):
            raise UserError(
                f"{name} is not a model of tarflowlm: give one made by `tarflowlm push`"
            )
        folder = Path(get(allow_patterns=[*FILES, CARD]))
    from tarflowlm.runs.weights import read_weights  # imports torch

    weights = folder / "model.safetensors"
    try:
        read_weights(weights)
    except UserError as error:
        for path in (
            weights.resolve(),
            weights,
        ):  # in the cache a file is a link to where its bytes are
            path.unlink(missing_ok=True)
        what = f"{error}: it came from {name} and has been removed from the cache; run this again to download it"
        raise UserError(
            f"{what}, and if that does not help, the damaged file is the one on the hub"
        ) from None
    return folder


@contextmanager
def hub_errors(name: str) -> Iterator[None]:
    """Turns errors of the hub and the way there into one UserError about `name`; silences the
    client's retries.
    """
    errors, log = hub_client(name).errors, logging.getLogger("huggingface_hub")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    except (OSError, errors.HTTPError, errors.HFValidationError, RuntimeError) as error:
        if isinstance(error, OSError) and error.filename is not None:
            raise  # of the disk
        raise UserError(f"{name}: {_reason(error)}") from error
    finally:
        log.setLevel(level)


def _reason(error: Exception) -> str:
    hub = hub_client("the hub")
    errors, place, log_in = (
        hub.errors,
        hub.constants.ENDPOINT,
        "log in with `hf auth login` or set HF_TOKEN",
    )
    causes = [error, *filter(None, (error.__cause__, error.__context__))]
    if any(isinstance(cause, errors.OfflineModeIsEnabled) for cause in causes):
        return "HF_HUB_OFFLINE is set, and the cache does not hold all of it; unset it, or give a local folder"
    match error:
        case errors.RepositoryNotFoundError():  # a gated one as well
            return (
                f"{place} has no such model, or it is private or gated; check the name, or {log_in}"
            )
        case errors.RevisionNotFoundError():
            return "it has no such revision; leave out what follows @ for the newest one"
        case errors.HFValidationError():
            return (
                f"{first_line(error)}; give OWNER/NAME of letters, digits, and - _ . between them"
            )
        case errors.HfHubHTTPError() if error.response.status_code in (401, 403):
            return f"{place} refuses this ({error.response.status_code}); {log_in}, with a token that may do this"
        case errors.HfHubHTTPError():
            return f"{place} answers {error.response.status_code}; try again later"
        case errors.LocalEntryNotFoundError():
            return f"{place} cannot be reached, and the cache does not hold all of it; check the connection"
    return f"the connection to {place} failed ({first_line(error)}); run this again"


FOLDER = Path(__file__).parent / "released"
DEFAULT = "english-small"


def released() -> list[str]:
    """The names of the released models, sorted."""
    return sorted(path.parent.name for path in FOLDER.glob("*/config.json"))


def purpose(directory: Path) -> str:
    """What a model is for, in a line: the one after the title of its card, or nothing."""
    card = (directory / CARD).read_text(encoding="utf-8") if (directory / CARD).is_file() else ""
    _, _, text = f"\n{card}".partition("\n# ")
    return next((line for line in text.splitlines()[1:] if line), "")


def locate(directory: str | Path) -> Path:
    """The path itself, or where there is none, the released model of that name or a downloaded
    hf:OWNER/NAME.
    """
    path = Path(directory)
    if is_reference(path) and not path.exists():
        return fetch(path)
    return FOLDER / path if not path.exists() and str(path) in released() else path


def read_only_reason(directory: str | Path) -> str | None:
    """The reason why nothing may be written to what `locate` finds, or None for a run directory of
    the user's own.
    """
    path = Path(directory)
    if is_reference(path) and not path.exists():
        return f"{path.as_posix()} is on the hub"
    path = locate(path).resolve()
    return f"{path.name} comes with the package" if path.parent == FOLDER.resolve() else None


def choose_directory(directory: Path | None, model: str | None) -> Path:
    """The run directory of a command: `directory`, or the released model `model`, or without both
    `DEFAULT`.
    """
    if directory is not None and model is not None:
        raise UserError(f"{directory} and --model {model}: give one of them")
    if directory is not None:
        return directory
    if model is not None and model not in released():
        raise unknown("shipped model", model, released())
    return FOLDER / (model or DEFAULT)
