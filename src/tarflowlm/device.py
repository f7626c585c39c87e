"""Where tensors are computed: the device, what its compiler lacks, and its threads."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch

from tarflowlm.errors import UserError, first_line
from tarflowlm.schema import check_type


def pick_device(name: str | torch.device = "auto") -> torch.device:
    """A device of PyTorch, such as "cuda:1". UserError if it is missing.

    auto takes cuda, then cpu. It never takes mps, because the numerics have not run there yet.
    UserError for another default device than the CPU, where generators and tokens are.
    """
    wanted = "give auto, cpu or another device; the numbers stay in float32"
    check_type(name, "device", (str, torch.device), wanted)
    if torch.get_default_device().type != "cpu":
        what = f"PyTorch's default device is {torch.get_default_device()}"
        raise UserError(f"{what}: set it to cpu, and name the device where a model is loaded")
    is_there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    available = [*(kind for kind, found in is_there.items() if found), "cpu"]
    usual = "cuda" if is_there["cuda"] else "cpu"
    try:
        found = torch.device(usual if name == "auto" else name)
        own = int(os.environ.get("LOCAL_RANK", -1))
        if found.type == "cuda" and found.index is None and 0 <= own < torch.cuda.device_count():
            # first of all: whatever asks for "cuda" would take memory on the GPU of process 0
            torch.cuda.set_device(own)
        torch.empty(0, device=found)
    except (TypeError, RuntimeError, AssertionError):
        choice = ", ".join(["auto", *available])
        raise UserError(f"device {name}: not on this machine, use one of {choice}") from None
    return found


@cache
def compilation_problem(kind: str) -> str | None:
    """The reason why torch.compile fails on a kind of device, in a line; None if it works."""
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
