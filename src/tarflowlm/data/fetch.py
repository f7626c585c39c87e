"""Files from the web, through the standard library: resumed where the server can, complete or not there."""

import http.client
import os
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

from tarflowlm.files import sync_folder, waiting_lock

TIMEOUT = 30.0
"""Seconds without an answer."""
_BLOCK = 1 << 16


def fetch(
    url: str,
    target: Path,
    *,
    check: Callable[[Path], None],
    progress: Callable[[int, int | None], None] | None = None,
) -> None:
    """Puts what `url` sends into the file `target`, once `check` accepts it (given a path of the same suffix).

    What a broken connection or a kill leaves is gone on with by the next call. `progress` gets bytes done and in all
    (None where the server does not say). Of several processes one fetches, the others wait.

    Errors: OSError with a one-line message when the server cannot be reached, refuses, or stops early; whatever
    `check` raises, and then what was fetched is removed.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.stem}.part{target.suffix}")
    with waiting_lock(target):
        if target.exists():
            return
        # what was gone on with may be of two different files: then once more from the start
        for may_be_mixed in (True, False) if partial.exists() else (False,):
            _download(url, partial, progress)
            try:
                check(partial)
                break
            except Exception:
                partial.unlink()
                if not may_be_mixed:
                    raise
        os.replace(partial, target)
        sync_folder(target.parent)


def _download(url: str, partial: Path, progress: Callable[[int, int | None], None] | None) -> None:
    have = partial.stat().st_size if partial.exists() else 0
    headers = {"User-Agent": "tarflowlm"} | ({"Range": f"bytes={have}-"} if have else {})
    request = urllib.request.Request(url, headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT) as response:
            range_sent = response.headers.get("Content-Range", "")
            continues = response.status == 206 and range_sent.startswith(f"bytes {have}-")
            have = have if continues else 0
            length = response.headers.get("Content-Length")
            total = have + int(length) if length is not None else None
            with partial.open("ab" if continues else "wb") as file:
                while block := response.read(_BLOCK):
                    file.write(block)
                    have += len(block)
                    if progress is not None:
                        progress(have, total)
                file.flush()
                os.fsync(file.fileno())
    except urllib.error.HTTPError as error:
        if error.code == 416 and have:  # nothing comes after what is here: a complete or another file
            partial.unlink()
            _download(url, partial, progress)
            return
        raise OSError(f"the server answers {error.code} {error.reason}") from None
    except urllib.error.URLError as error:
        raise OSError(str(error.reason)) from None
    except http.client.HTTPException as error:
        raise OSError(f"{type(error).__name__} after {have:,} bytes; the same command goes on from there") from None
    if total is not None and have != total:
        raise OSError(f"the connection ended after {have:,} of {total:,} bytes; the same command goes on from there")
