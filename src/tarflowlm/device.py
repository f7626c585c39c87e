"""The device a command runs on, and its threads."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch

from tarflowlm.errors import UserError, first_line

logger = logging.getLogger("tarflowlm")


def pick_device(name: str | torch.device = "auto") -> torch.device:
    """A device of PyTorch, such as "cuda:1". UserError where it is missing.

    auto takes cuda, then mps if the numerics are right there, then cpu.
    """
    is_there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    available = [*(kind for kind, found in is_there.items() if found), "cpu"]
    try:
        found = torch.device(available[0] if name == "auto" else name)
        torch.empty(0, device=found)
    except (TypeError, RuntimeError, AssertionError):
        choice = ", ".join(["auto", *available])
        raise UserError(f"device {name}: not on this machine, use one of {choice}") from None
    problem = numerics_problem(found) if name == "auto" and found.type == "mps" else None
    if problem is not None:
        logger.warning("device auto: the CPU, since the numerics fail on mps (%s)", problem)
        return torch.device("cpu")
    return found


def numerics_problem(device: torch.device) -> str | None:
    """The error of the mixture maps of `device`, in a line; None if they are right.

    Noise of up to 8 standard deviations goes through the inverses and back.
    """
    from tarflowlm.flow import numerics

    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(32, 4, generator=generator)
    noise[0] = torch.tensor([-8.0, 8.0, 5.0, -5.0])
    log_w = torch.randn(32, 80, generator=generator).to(device)
    mean = torch.randn(80, 4, generator=generator).to(device)
    log_std = torch.linspace(-1.0, 0.0, 80).to(device)
    try:
        u = noise.to(device)
        z = numerics.rosenblatt_inverse(u, log_w, mean, log_std)
        back, _ = numerics.rosenblatt(z, log_w, mean, log_std)
        x = numerics.mixture_cdf_inverse(u, log_w[:, None], mean.T, log_std)
        again, _ = numerics.mixture_cdf(x, log_w[:, None], mean.T, log_std)
        off = max((found.cpu() - noise).abs().max().item() for found in (back, again))
    except (RuntimeError, TypeError) as error:  # say, an operator that is not implemented there
        return first_line(error)
    return None if off < 1e-3 else f"an error of {off:.1g}"  # NaN is not below


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
