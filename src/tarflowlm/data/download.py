"""Downloads: where they are kept, single files over HTTP, and whether the model hub can be reached."""

import http.client
import logging
import os
import socket
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tarflowlm.files import sync_folder, waiting_lock

TIMEOUT = 30.0
"""Seconds without an answer from a server."""
_BLOCK = 1 << 16

DownloadProgress = Callable[[int, int | None], None]
"""Called with the bytes that have arrived and the size of the file (None where the server does not give it)."""


def cache_root() -> Path:
    """$TARFLOWLM_CACHE, or ~/.cache/tarflowlm."""
    chosen = os.environ.get("TARFLOWLM_CACHE")
    return Path(chosen).expanduser() if chosen else Path.home() / ".cache" / "tarflowlm"


def sources_dir() -> Path:
    """Where downloaded raw corpora are kept."""
    return cache_root() / "sources"


def download(
    url: str, target: Path, *, check: Callable[[Path], None], progress: DownloadProgress | None = None
) -> None:
    """Download `url` into the file `target`, unless it is there already.

    `target` appears once the download is complete and `check` accepts it; `check` gets a path of the same suffix.
    Rerunning resumes an interrupted download where the server can. (That is why this is not
    `torch.hub.download_url_to_file` or pooch: both start over.) Of several processes one downloads, the others wait.

    Errors: OSError with a one-line message when the server cannot be reached, refuses, or stops early; whatever
    `check` raises, after the rejected file is removed.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.stem}.part{target.suffix}")
    with waiting_lock(target):
        if target.exists():
            return
        # a resumed download may mix two versions of the file: if it is rejected, try once more from the start
        for resumed in (True, False) if partial.exists() else (False,):
            _receive(url, partial, progress)
            try:
                check(partial)
                break
            except Exception:
                partial.unlink()
                if not resumed:
                    raise
        os.replace(partial, target)
        sync_folder(target.parent)


def _receive(url: str, partial: Path, progress: DownloadProgress | None) -> None:
    """Append the rest of `url` to `partial`, or write all of it where the server cannot send a part."""
    received = partial.stat().st_size if partial.exists() else 0
    headers = {"User-Agent": "tarflowlm"} | ({"Range": f"bytes={received}-"} if received else {})
    request = urllib.request.Request(url, headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT) as response:
            sent_range = response.headers.get("Content-Range", "")
            resumes = response.status == 206 and sent_range.startswith(f"bytes {received}-")
            received = received if resumes else 0
            length = response.headers.get("Content-Length")
            total = received + int(length) if length is not None else None
            with partial.open("ab" if resumes else "wb") as file:
                while block := response.read(_BLOCK):
                    file.write(block)
                    received += len(block)
                    if progress is not None:
                        progress(received, total)
                file.flush()
                os.fsync(file.fileno())
    except urllib.error.HTTPError as error:
        if error.code == 416 and received:  # no bytes beyond those received: the file is complete, or another one
            partial.unlink()
            _receive(url, partial, progress)
            return
        raise OSError(f"the server answers {error.code} {error.reason}") from None
    except urllib.error.URLError as error:
        raise OSError(str(error.reason)) from None
    except http.client.HTTPException as error:
        raise OSError(f"{type(error).__name__} after {received:,} bytes; rerun to resume the download") from None
    if total is not None and received != total:
        raise OSError(f"the connection ended after {received:,} of {total:,} bytes; rerun to resume the download")


def check_hub_reachable() -> None:
    """ConnectionError if the hub's name cannot be resolved. Without it the hub's client retries for half a minute."""
    # the package itself loads its modules only when they are asked for
    from huggingface_hub import constants

    if urllib.request.getproxies():
        return  # the proxy resolves names
    endpoint = constants.ENDPOINT
    parts = urllib.parse.urlsplit(endpoint)
    host = parts.hostname or endpoint
    try:
        socket.getaddrinfo(host, parts.port or 443)
    except OSError:
        raise ConnectionError(f"offline: {host} cannot be resolved") from None


@contextmanager
def quiet_hub() -> Iterator[None]:
    """Silences the retry warnings of the hub's client, which would bury the one line that matters."""
    log = logging.getLogger("huggingface_hub")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)
