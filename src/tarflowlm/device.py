"""The device a command runs on, and its threads."""

import importlib.util
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from tarflowlm.errors import UserError

logger = logging.getLogger("tarflowlm")


def pick_device(name: str | torch.device = "auto") -> torch.device:
    """A device of PyTorch, such as "cuda:1". UserError where it is missing.

    auto takes cuda, then mps if the numerics are right there, then cpu.
    """
    available = ["cuda"] if torch.cuda.is_available() else []
    available += ["mps"] if torch.backends.mps.is_available() else []
    available += ["cpu"]
    try:
        found = torch.device(available[0] if name == "auto" else name)
        torch.empty(0, device=found)
    except (TypeError, RuntimeError, AssertionError):
        choice = ", ".join(["auto", *available])
        raise UserError(f"device {name}: not on this machine, use one of {choice}") from None
    if name == "auto" and found.type == "mps" and (problem := numerics_problem(found)):
        logger.warning("device auto: the CPU, since the numerics fail on mps (%s)", problem)
        return torch.device("cpu")
    return found


def numerics_problem(device: torch.device) -> str | None:
    """What a small test of the mixture maps finds wrong on `device`, in a line, or None.

    Noise of up to 8 standard deviations goes through the inverses and back, and densities are
    compared with float64 on the CPU.
    """
    from tarflowlm.flow import numerics

    generator = torch.Generator().manual_seed(0)
    noise, weights, means = (
        torch.randn(*shape, generator=generator) for shape in ((32, 4), (32, 80), (80, 4))
    )
    noise[0] = torch.tensor([-8.0, 8.0, 5.0, -5.0])
    given = (noise, weights, means, torch.linspace(-1.0, 0.0, 80))

    def maps(device: torch.device, dtype: torch.dtype) -> torch.Tensor:
        u, log_w, mean, log_std = (t.to(device, dtype) for t in given)
        z = numerics.rosenblatt_inverse(u, log_w, mean, log_std)
        x = numerics.mixture_cdf_inverse(u[:, 0], log_w, mean[:, 0], log_std)
        found = [z, x, numerics.mixture_log_prob(z, None, mean, log_std)]
        found += numerics.rosenblatt(z, log_w, mean, log_std)
        found += numerics.mixture_cdf(x, log_w, mean[:, 0], log_std)
        return torch.cat([t.flatten() for t in found]).cpu().double()

    try:
        found = maps(device, torch.float32)
    except (RuntimeError, TypeError) as error:  # say, an operator that is not implemented there
        return str(error).strip().splitlines()[0]
    expected = maps(torch.device("cpu"), torch.float64)
    off = ((found - expected).abs() / (1 + found.abs())).max().item()
    return None if off < 1e-3 else f"an error of {off:.1g}"  # NaN is not below


def missing_for_compilation(device: torch.device) -> str | None:
    """The tool that torch.compile needs and does not find, or None."""
    if device.type == "cuda":
        if importlib.util.find_spec("triton") is None:
            return "triton"
        language, variable, names = "C", "CC", ("cc", "gcc", "clang")
    else:
        language, variable, names = "C++", "CXX", ("g++", "clang++", "cl")
    if os.environ.get(variable) or any(shutil.which(name) for name in names):
        return None
    return f"a {language} compiler"


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
    """Let the C library keep freed memory instead of returning it to the system every time.

    glibc unmaps a large block when it is freed unless one of that size, up to 32 MiB, was freed
    before. Page faults otherwise take a tenth of a training step and up to a third of sampling.
    """
    torch.empty(31 * 2**20, dtype=torch.uint8)
