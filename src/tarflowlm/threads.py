"""How PyTorch's threads wait for work. To be imported before torch, which reads this once, as it is loaded."""

import os
import sys

WAITING = {"OMP_WAIT_POLICY": "PASSIVE"}
"""Variables of OpenMP and their values. By default its threads spin while they wait, which on a busy machine takes
the cores from the threads that they wait for."""
CHOICES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
"""Variables by which users choose for themselves."""


def yielding_threads() -> None:
    """Let threads that wait sleep, unless the environment says how they wait, or torch is here already.

    Child processes inherit it.
    """
    if "torch" not in sys.modules and not any(name in os.environ for name in CHOICES):
        os.environ.update(WAITING)
