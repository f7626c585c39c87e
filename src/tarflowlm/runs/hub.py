"""Models on the Hugging Face hub: what a reference names, and its files in the cache of `huggingface_hub`.

Its client is imported only for such names. Only the files of an exported model are fetched, by their exact names, so
nothing arrives that could be unpickled or run, and their hashes are compared with the manifest (docs/hub.md).
"""

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tarflowlm.data.download import DownloadProgress, quiet_hub
from tarflowlm.errors import UserError, first_line
from tarflowlm.runs.manifest import MANIFEST, problem_of

PREFIX = "hf:"
CARD = "README.md"
"""The model card."""
FILES = {
    "": ("config.json", "tokenizer.json", "model.safetensors", MANIFEST),
}
"""Folder -> the files of a model, all that is fetched beside its card."""
REPOSITORY = r"\w[\w.-]*/\w[\w.-]*"
"""OWNER/NAME; never the path of a folder above."""
_REFERENCE = re.compile(rf"{PREFIX}({REPOSITORY})(?:@([\w./-]+))?")


def is_reference(name: str | Path) -> bool:
    """Whether `name` is meant for the hub: it begins with hf:."""
    return Path(name).as_posix().startswith(PREFIX)


def hub_client(purpose: str) -> Any:
    """The package `huggingface_hub`; UserError, beginning with `purpose`, where it is not installed."""
    try:
        import huggingface_hub
        import huggingface_hub.constants
        import huggingface_hub.errors
    except ImportError:
        raise UserError(f"{purpose} needs huggingface_hub: pip install 'tarflowlm[hub]'") from None
    return huggingface_hub


def fetch(name: str | Path, progress: DownloadProgress | None = None) -> Path:
    """The folder with the model hf:OWNER/NAME or hf:OWNER/NAME@REVISION, downloaded unless the cache has it.

    `progress` is called as by `data.download`; without it the client draws its own bars on a terminal. Offline, what
    the cache holds is used. UserError, naming `name` and a remedy, if the model cannot be had, is none of ours, or a
    file is not as its manifest says; that file is then removed from the cache.
    """
    name = Path(name).as_posix()
    match = _REFERENCE.fullmatch(name)
    if match is None:
        raise UserError(f"{name}: name a model of the hub as hf:OWNER/NAME or hf:OWNER/NAME@REVISION")
    repository, revision = match.groups()
    hub = hub_client(name)
    patterns = [f"{folder}/{file}".lstrip("/") for folder, files in FILES.items() for file in files]
    bars = {} if progress is None else {"tqdm_class": _forwarding(progress)}
    with quiet_hub(), hub_errors(name):
        # first, so that a large model of another kind is not downloaded in vain
        first = {"allow_patterns": MANIFEST, "tqdm_class": _forwarding(lambda _done, _total: None)}
        folder = Path(hub.snapshot_download(repository, revision=revision, **first))
        if not (folder / MANIFEST).exists():
            raise UserError(
                f"{name} has no {MANIFEST}, so it is no model of tarflowlm: give one made by `tarflowlm push`"
            )
        folder = Path(hub.snapshot_download(repository, revision=revision, allow_patterns=[*patterns, CARD], **bars))
    _check(folder, name)
    return folder


def _check(snapshot: Path, name: str) -> None:
    """UserError, and the file is removed from the cache, unless all are as their manifests say."""
    for part, files in FILES.items():
        folder = snapshot / part
        for file in files:
            if file == MANIFEST or not (folder / file).exists():
                continue
            problem = problem_of(folder, [file])
            if problem is not None:
                # in the cache a file is a link to where its bytes are
                for path in ((folder / file).resolve(), folder / file):
                    path.unlink(missing_ok=True)
                raise UserError(
                    f"{problem}: it came from {name} and has been removed from the cache; run this again to download "
                    "it anew, and if that does not help, the damaged file is the one on the hub"
                )


@contextmanager
def hub_errors(name: str) -> Iterator[None]:
    """Turns what goes wrong between here and the hub into one UserError about `name`."""
    errors = hub_client(name).errors
    try:
        yield
    except (OSError, errors.HTTPError, errors.HFValidationError, RuntimeError) as error:
        if isinstance(error, OSError) and error.filename is not None:
            raise  # of the disk
        raise UserError(f"{name}: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """What is wrong, and what to do about it."""
    hub = hub_client("the hub")
    errors, place = hub.errors, hub.constants.ENDPOINT
    log_in = "log in with `hf auth login` or set HF_TOKEN"
    causes = [error, *filter(None, (error.__cause__, error.__context__))]
    if any(isinstance(cause, errors.OfflineModeIsEnabled) for cause in causes):
        return "HF_HUB_OFFLINE is set, and the cache does not hold all of it; unset it, or give a local folder"
    match error:
        case errors.GatedRepoError():
            return f"its owner lets only some people in; ask for access at {place}, then {log_in}"
        case errors.RepositoryNotFoundError():
            return f"{place} has no such model, or it is private; check the name, or {log_in}"
        case errors.RevisionNotFoundError():
            return "it has no such revision; leave out what follows @ for the newest one"
        case errors.HFValidationError():
            return f"{first_line(error)}; give OWNER/NAME of letters, digits, and - _ . between them"
        case errors.HfHubHTTPError() if error.response.status_code in (401, 403):
            return f"{place} refuses this ({error.response.status_code}); {log_in}, with a token that may do this"
        case errors.HfHubHTTPError():
            return f"{place} answers {error.response.status_code}; try again later"
        case errors.LocalEntryNotFoundError():
            return f"{place} cannot be reached, and the cache does not hold all of it; check the connection"
    return f"the connection to {place} failed ({first_line(error)}); run this again"


def _forwarding(progress: DownloadProgress) -> type:
    """A class of bars for the client that draws nothing and tells `progress` of the bytes."""
    from tqdm.std import tqdm  # which the client brings

    lock = threading.Lock()

    class Forwarding(tqdm):  # type: ignore[misc]
        def __init__(self, *args: Any, **options: Any) -> None:
            # one bar counts files, one bytes that travel, and one bytes that are there
            self._counts = options.get("unit") == "B" and options.get("desc") != "Downloading bytes"
            super().__init__(*args, **options | {"disable": True})

        def update(self, n: int | float | None = 1) -> None:
            with lock:
                self.n += n or 0
                if self._counts:
                    progress(int(self.n), self.total or None)

    return Forwarding
