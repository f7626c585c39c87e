"""How PyTorch's threads wait for work. To be imported before torch, which reads this once, as it is loaded."""

import os
import sys
import time
from pathlib import Path

SPINNING = {"GOMP_SPINCOUNT": "20000"}
"""Where there is a core for every thread: waiting threads spin for a fraction of a millisecond, then sleep. The
default of OpenMP is milliseconds: a few percent faster still, and several times slower once others want the cores."""
SLEEPING = {"OMP_WAIT_POLICY": "PASSIVE"}
"""Where other programs want the cores: a thread that spins takes them from the thread that it waits for. On an idle
machine this would cost a third of the speed, for waking up takes as long as a small operation."""
CHOICES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
"""Variables by which users choose for themselves."""
LOAD = Path("/proc/loadavg")


def yielding_threads() -> None:
    """Let waiting threads give way, unless the environment says how they wait, or torch is here already.

    Child processes inherit it. Systems other than Linux keep their OpenMP's default.
    """
    if "torch" in sys.modules or any(name in os.environ for name in CHOICES):
        return
    busy, cores = running_elsewhere(), os.cpu_count() or 1
    if busy is None:
        return
    if hasattr(os, "sched_getaffinity") and len(os.sched_getaffinity(0)) < cores:
        busy = 0  # this process has cores of its own, and nobody says who else may use them
    os.environ.update(waiting(busy, cores))


def waiting(busy: int, cores: int) -> dict[str, str]:
    """Variables for as many threads as will be asked for, beside `busy` threads of other programs."""
    asked = os.environ.get("OMP_NUM_THREADS", "")
    threads = int(asked) if asked.isdigit() else cores
    return SLEEPING if busy + threads > cores else SPINNING


def running_elsewhere(looks: int = 5) -> int | None:
    """Threads of other programs that want a core now, the least of several looks; None where nobody can say."""
    found = []
    try:
        for look in range(looks):
            time.sleep(0.002 if look else 0)
            # "0.20 0.18 0.12 2/345 678": two threads can run, of which one is this
            found.append(int(LOAD.read_text(encoding="ascii").split()[3].split("/")[0]) - 1)
    except (OSError, ValueError, IndexError):
        return None
    return max(0, min(found))
