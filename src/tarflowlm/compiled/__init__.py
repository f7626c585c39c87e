"""Functions for writing texts on a CPU, which numba compiles for the processor that runs them.

A step of `layers` takes a tenth of the time that it takes in calls of PyTorch. Compiling takes some
ten seconds, once: the results are kept in the user's cache. So a short text is not the occasion to
compile, see `is_due`: `tarflowlm sample` starts a process for it when its first text is written,
and servers compile as they start.

The package numba is optional, and importing this package does not import it. There is no torch in
this folder; `flow.compiled_cache` connects both.
"""

import hashlib
import os
import platform
import subprocess
import sys
from contextlib import suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from tarflowlm.files import cache_root

LONG = 4096
"""Tokens that take as long to write by calls of PyTorch as compiling takes."""
READY = "ready"
"""The name of the file that says that a folder has all functions."""
MISSING = "without numba, texts take several times as long: pip install numba"
"""What to say where functions cannot be compiled."""


@cache
def is_installed() -> bool:
    """Whether functions can be compiled."""
    with suppress(PackageNotFoundError):
        return bool(version("numba")) and not os.environ.get("NUMBA_DISABLE_JIT")
    return False


@cache
def identity() -> str:
    """A name of this version of the functions, for this processor."""
    parts = [version("numba"), sys.version, platform.machine(), platform.node()]
    sources = [path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py"))]
    digest = hashlib.sha256(b"\0".join([*(part.encode() for part in parts), *sources]))
    return digest.hexdigest()[:16]


def folder() -> Path:
    """Where the results are kept."""
    return cache_root() / "compiled" / identity()


@cache
def prepare() -> bool:
    """Compile all functions, or load them: whether they can be used."""
    from numba import config

    settings: Any = config
    place = folder()
    before = settings.CACHE_DIR
    try:
        place.mkdir(parents=True, exist_ok=True)
        settings.CACHE_DIR = str(place)
        from tarflowlm.compiled.samples import call_all

        call_all()
        (place / READY).touch()
    except (OSError, RuntimeError):
        # numba found no folder to write to
        return False
    finally:
        settings.CACHE_DIR = before
    return True


def is_loaded() -> bool:
    """Whether all functions are loaded, because a text was written by them."""
    return prepare.cache_info().currsize > 0 and prepare()


def start() -> None:
    """Compile in a process that goes on when this one has ended, unless all is ready."""
    if is_installed() and not (folder() / READY).exists():
        command = [sys.executable, "-m", "tarflowlm.compiled"]
        nothing = subprocess.DEVNULL
        with suppress(OSError):
            subprocess.Popen(
                command, stdin=nothing, stdout=nothing, stderr=nothing, start_new_session=True
            )


def is_due(num_tokens: int) -> bool:
    """Whether a text of so many tokens is written by compiled functions.

    True where they are ready, or where the text takes longer than compiling.
    """
    if not is_installed():
        return False
    with suppress(OSError):
        return (num_tokens >= LONG or (folder() / READY).exists()) and prepare()
    return False
