"""The processes that train one model, and the communication between them.

torchrun starts them and sets their ranks in the environment. Backends: gloo on CPUs, nccl on GPUs.
"""

import gc
import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from tarflowlm.errors import UserError

T = TypeVar("T")


@dataclass(frozen=True)
class Processes:
    """This process in its process group. In a group of one, all methods are local.

    Methods that communicate are collective: all processes must call them.
    """

    rank: int = 0
    """Index of this process, from 0."""
    world: int = 1
    """Number of processes."""
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    """The device of this process."""

    @property
    def first(self) -> bool:
        """True for the process that writes files and reports to the user."""
        return self.rank == 0

    def rows_each(self, batch_size: int, accumulate: int) -> int:
        """Sequences per process of a global batch. They must divide evenly into `accumulate` parts."""
        parts = self.world * accumulate
        if batch_size % parts:
            raise UserError(
                f"train.batch_size {batch_size}: does not divide into {self.world} processes x {accumulate} "
                f"accumulation steps; use a multiple of {parts}"
            )
        return batch_size // self.world

    def mean(self, value: Tensor) -> Tensor:
        """The mean of `value` over the processes."""
        if self.world == 1:
            return value
        total = value.detach().clone()
        dist.all_reduce(total)
        return total / self.world

    def any(self, flag: bool) -> bool:
        """True if `flag` is set in any process."""
        if self.world == 1:
            return flag
        # on the CPU, by gloo, so that no device has to wait
        raised = torch.tensor([int(flag)])
        dist.all_reduce(raised, dist.ReduceOp.MAX)
        return bool(raised)

    def gather(self, rows: Tensor) -> Tensor:
        """The `rows` of all processes, concatenated in order of rank; every process passes the same number."""
        if self.world == 1:
            return rows
        parts = [torch.empty_like(rows) for _ in range(self.world)]
        dist.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    def from_first(self, value: T) -> T:
        """The value of the first process (any object that can be pickled)."""
        if self.world == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def wait(self) -> None:
        """Wait until all processes have called it."""
        if self.world > 1:
            dist.barrier()

    @contextmanager
    def first_alone(self) -> Iterator[None]:
        """A context whose body the first process runs before the others, so that they find the files it wrote."""
        if not self.first:
            self.wait()
        try:
            yield
        finally:
            if self.first:
                self.wait()


ALONE = Processes()
"""A single process on the CPU."""


@contextmanager
def launched(device: torch.device) -> Iterator[Processes]:
    """Join the process group that torchrun started, with one GPU per process; without torchrun, a group of one."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1 or "RANK" not in os.environ:
        yield Processes(device=device)
        return
    backend = "gloo"
    if device.type == "cuda":
        local, available = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if local >= available:
            raise UserError(f"this machine has {available} GPUs: start torchrun with --nproc-per-node {available}")
        device, backend = torch.device("cuda", local), "cpu:gloo,cuda:nccl"
        torch.cuda.set_device(device)
    elif device.type != "cpu":
        raise UserError(f"device {device.type}: serves only one process; use --device cpu, or train without torchrun")
    dist.init_process_group(backend)
    if dist.get_rank():
        logging.getLogger("tarflowlm").setLevel(logging.ERROR)  # the first process gives the notices
    # happens for heads under FSDP2; harmless, since nothing here is changed in place
    warnings.filterwarnings("ignore", message=".*returned a view tensor")
    yield Processes(dist.get_rank(), dist.get_world_size(), device)
    # sharded modules hold the group in reference cycles; one that outlives the group can abort the process on exit
    gc.collect()
    # not reached after an error: the others may be waiting for this process, and torchrun ends them
    dist.destroy_process_group()
