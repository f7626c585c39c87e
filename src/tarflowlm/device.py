"""The device a command runs on, and its threads."""

import importlib.util
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from tarflowlm.errors import UserError


def pick_device(name: str | torch.device = "auto") -> torch.device:
    """A device of PyTorch, such as "cuda:1" or "mps"; auto takes cuda if there is one, else cpu.

    UserError where it is missing.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        found = torch.device(name)
        torch.empty(0, device=found)
    except (TypeError, RuntimeError, AssertionError):
        raise UserError(f"device {name}: not on this machine, use auto or cpu") from None
    return found


def missing_for_compilation() -> str | None:
    """The tool that torch.compile needs on a GPU and does not find, or None."""
    if importlib.util.find_spec("triton") is None:
        return "triton"
    if os.environ.get("CC") or any(map(shutil.which, ("cc", "gcc", "clang"))):
        return None
    return "a C compiler"


@contextmanager
def threads_for(rows: int) -> Iterator[None]:
    """A context with one CPU thread for a single row, whose operations are too small to split."""
    before = torch.get_num_threads()
    torch.set_num_threads(1 if rows == 1 else before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def keep_freed_memory() -> None:
    """Let the C library keep freed memory, which saves up to a third of the time of sampling.

    glibc unmaps a large block when it is freed unless one of that size, up to 32 MiB, was freed
    before.
    """
    torch.empty(31 * 2**20, dtype=torch.uint8)
