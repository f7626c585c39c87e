"""The thread that writes the files of a run while its training continues."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from functools import partial

import torch
import torch.distributed as dist

from tarflowlm.processes import Processes


class Writer(AbstractContextManager["Writer", None]):
    """Does one piece of work after the other; leaving the context waits for all. Collective."""

    group: dist.ProcessGroup | None = None
    """The processes of the run, for collectives of this thread, which must not mix with those of
    the training. None for a single process.
    """

    def __init__(self, device: torch.device, processes: Processes) -> None:
        if processes.world > 1:
            group = dist.new_group(backend="gloo")
            assert not isinstance(group, int), "every process is a member of the group"
            self.group = group
        # a thread begins on the first GPU, where PyTorch would take memory
        on_gpu = device.type == "cuda" and device.index is not None
        choose = partial(torch.cuda.set_device, device) if on_gpu else None
        self._thread = ThreadPoolExecutor(1, initializer=choose)
        self._begun: list[Future[None]] = []

    def submit(self, write: Callable[..., None], *args: object) -> None:
        """Let the thread call `write` with these arguments."""
        self._begun.append(self._thread.submit(write, *args))

    def wait(self, *, until_done: bool = True) -> None:
        """Return once all is on disk, or at once; raises the error of work that failed."""
        while self._begun and (until_done or self._begun[0].done()):
            self._begun.pop(0).result()

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown()
