"""What the benchmarks share: timing calls, comparing paired timings, and peak memory.

Benchmarks time their contenders in turn, round after round, and report the median of the rounds' own ratios. A slow
moment of the machine then affects both sides of a ratio.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from tarflowlm.device import synchronize


def seconds_per_call(call: Callable[[], object], num_calls: int, device: torch.device) -> float:
    """Mean seconds of a call, including the work that it leaves on the device."""
    synchronize(device)
    start = time.perf_counter()
    for _ in range(num_calls):
        call()
    synchronize(device)
    return (time.perf_counter() - start) / num_calls


def median_ratio(times: Sequence[float], others: Sequence[float]) -> float:
    """The median over rounds of times[i] / others[i]. ValueError for different numbers of rounds."""
    return statistics.median(a / b for a, b in zip(times, others, strict=True))


def high_water_mark() -> float:
    """Largest resident set of this process so far, in GB (1e9 bytes). It never falls: measure in a fresh process."""
    status = Path("/proc/self/status")
    if status.exists():
        (line,) = (line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024 / 1e9
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e9
