"""How PyTorch's threads wait for work, which is settled before torch is imported."""

import os
import sys
import time
from pathlib import Path

SPINNING = {"GOMP_SPINCOUNT": "20000"}
"""Used when every thread has a core: waiting threads spin for a fraction of a millisecond, then sleep. OpenMP's
default, milliseconds, is a few percent faster still, but several times slower once other programs want the cores."""
SLEEPING = {"OMP_WAIT_POLICY": "PASSIVE"}
"""Used when other programs want the cores: a spinning thread takes them from the thread it waits for. On an idle
machine sleeping costs a third of the speed, since waking up takes as long as a small operation."""
CHOICES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
"""Variables by which users choose for themselves."""
LOAD = Path("/proc/loadavg")


def settle_threads() -> None:
    """Choose how waiting threads yield, unless the environment says so already or torch has been imported.

    OpenMP reads the variables once, as torch is loaded; child processes inherit them. Systems other than Linux keep
    OpenMP's default.
    """
    if "torch" in sys.modules or any(name in os.environ for name in CHOICES):
        return
    busy, cores = running_elsewhere(), os.cpu_count() or 1
    if busy is None:
        return
    if hasattr(os, "sched_getaffinity") and len(os.sched_getaffinity(0)) < cores:
        busy = 0  # this process has cores of its own, and the load does not tell who else may use them
    os.environ.update(waiting(busy, cores))


def waiting(busy: int, cores: int) -> dict[str, str]:
    """Variables for as many threads as torch will start, next to `busy` threads of other programs."""
    asked = os.environ.get("OMP_NUM_THREADS", "")
    threads = int(asked) if asked.isdigit() else cores
    return SLEEPING if busy + threads > cores else SPINNING


def running_elsewhere(looks: int = 5) -> int | None:
    """Threads of other programs that want a core now, the minimum over several looks; None if it cannot be read."""
    found = []
    try:
        for look in range(looks):
            time.sleep(0.002 if look else 0)
            # "0.20 0.18 0.12 2/345 678": two threads are runnable, one of them this one
            found.append(int(LOAD.read_text(encoding="ascii").split()[3].split("/")[0]) - 1)
    except (OSError, ValueError, IndexError):
        return None
    return max(0, min(found))
