"""The device a command runs on, and its threads."""

import importlib.util
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from tarflowlm.errors import UserError


def pick_device(name: str | torch.device = "auto") -> torch.device:
    """A device of PyTorch, such as "cuda:1"; auto takes cuda, then mps, then cpu. UserError where it is missing."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    available = [kind for kind in there if there[kind]]
    try:
        found = torch.device(available[0] if name == "auto" else name)
        torch.empty(0, device=found)
    except (TypeError, RuntimeError, AssertionError):  # the type depends on how PyTorch was built
        choice = ", ".join(["auto", *available])
        raise UserError(f"device {name}: not available on this machine; use one of {choice}") from None
    return found


def missing_for_compilation(device: torch.device) -> str | None:
    """The first requirement of torch.compile that is not there (triton on CUDA GPUs, a compiler), or None."""
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        return "triton"
    variable, names = ("CC", ("cc", "gcc", "clang")) if device.type == "cuda" else ("CXX", ("g++", "clang++", "cl"))
    if os.environ.get(variable) or any(shutil.which(name) for name in names):
        return None
    return "a C compiler" if device.type == "cuda" else "a C++ compiler"


@contextmanager
def threads_for(rows: int) -> Iterator[None]:
    """A context with one CPU thread for a single row, whose operations are too small to split, else with all."""
    before = torch.get_num_threads()
    torch.set_num_threads(1 if rows == 1 else before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def keep_freed_memory() -> None:
    """Let the C library reuse freed memory for what comes next instead of returning it to the system every time.

    glibc unmaps a large block when it is freed unless one of that size, up to 32 MiB, was freed before. So one of
    nearly that size is allocated, never touched, and freed. Page faults otherwise take a tenth of a training step and
    up to a third of sampling. MALLOC_TRIM_THRESHOLD_ or MALLOC_MMAP_THRESHOLD_ overrule it.
    """
    torch.empty(31 * 2**20, dtype=torch.uint8)
