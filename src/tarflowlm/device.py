"""The device a command runs on, and its threads."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch

from tarflowlm.errors import UserError, first_line
from tarflowlm.schema import check_type


def pick_device(name: str | torch.device = "auto") -> torch.device:
    """A device of PyTorch, such as "cuda:1". UserError where it is missing.

    auto takes cuda, then cpu. The numerics have run on no mps yet, so that is for who asks for it.
    """
    wanted = "give auto, cpu or another device; the numbers stay in float32"
    check_type(name, "device", (str, torch.device), wanted)
    is_there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    available = [*(kind for kind, found in is_there.items() if found), "cpu"]
    usual = "cuda" if is_there["cuda"] else "cpu"
    try:
        found = torch.device(usual if name == "auto" else name)
        torch.empty(0, device=found)
    except (TypeError, RuntimeError, AssertionError):
        choice = ", ".join(["auto", *available])
        raise UserError(f"device {name}: not on this machine, use one of {choice}") from None
    return found


@cache
def compilation_problem(kind: str) -> str | None:
    """Why torch.compile fails on a kind of device, in a line; None if it works."""
    try:
        torch.compile(lambda x: 2 * x + 1)(torch.ones(2, device=kind))
    except Exception as error:  # of any type, for want of Triton, gcc or Python.h
        return first_line(error)
    return None


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
