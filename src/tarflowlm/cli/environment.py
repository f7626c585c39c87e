"""What a command chooses for its whole process: how threads wait, and that memory is kept.

No torch here.
"""

import ctypes
import os
import sys
import time
from pathlib import Path


def settle_threads() -> None:
    """Choose how idle OpenMP threads wait, before torch is imported, unless the environment does.

    If other programs want the cores, threads sleep, because spinning would cost up to two thirds of
    the speed. On an idle machine they spin briefly, because sleeping would cost one third.
    """
    choices = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
    # only Linux has it: "0.20 0.18 0.12 2/345 678" means two runnable threads
    load = Path("/proc/loadavg")
    if not load.exists() or "torch" in sys.modules or any(name in os.environ for name in choices):
        return
    # a load average would count work that has just ended; this process does not count
    looks = []
    for _ in range(5):
        looks.append(int(load.read_text(encoding="ascii").split()[3].split("/")[0]) - 1)
        time.sleep(0.002)
    limit = os.environ.get("OMP_NUM_THREADS", "")
    threads = int(limit) if limit.isdigit() else len(os.sched_getaffinity(0))
    busy = min(looks) + threads > (os.cpu_count() or 1)
    os.environ.update({"OMP_WAIT_POLICY": "PASSIVE"} if busy else {"GOMP_SPINCOUNT": "20000"})


def keep_freed_memory() -> None:
    """Let the C library keep what this process frees, as commands do, which saves up to a third of
    the time of sampling, and up to a twentieth of that of training.

    From then on the process holds the most memory that it ever needed. glibc would give the end of
    its heap back once 64 MiB are free there, and unmap a large block unless one of that size, up to
    32 MiB, was freed before. Others have no such function.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    is_chosen = any(name.startswith("MALLOC_") for name in os.environ)
    if mallopt is not None and not is_chosen:
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: never
        mallopt(-3, 2**25)  # M_MMAP_THRESHOLD: its largest value
