"""Several processes that train one model: who takes part, and what they tell each other.

torchrun starts them and says in the environment which is which; gloo on CPUs, nccl on GPUs.
"""

import gc
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
    """This process among those that train together. Alone, it answers for all of them."""

    rank: int = 0
    world: int = 1
    """How many there are."""
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    """Where this one computes."""

    @property
    def first(self) -> bool:
        """The one that writes files and talks to the user."""
        return self.rank == 0

    def rows_each(self, batch_size: int, accumulate: int) -> int:
        """Sequences of a global batch that fall to each process; UserError where they cannot be shared evenly."""
        parts = self.world * accumulate
        if batch_size % parts:
            raise UserError(
                f"train.batch_size {batch_size}: does not divide into {self.world} processes x {accumulate} "
                f"accumulation steps; use a multiple of {parts}"
            )
        return batch_size // self.world

    def mean(self, value: Tensor) -> Tensor:
        """The mean over processes of a tensor that each of them has."""
        if self.world == 1:
            return value
        total = value.detach().clone()
        dist.all_reduce(total)
        return total / self.world

    def any(self, flag: bool) -> bool:
        """Whether the flag is set in any of them."""
        if self.world == 1:
            return flag
        # on the CPU, by gloo: no device has to wait
        raised = torch.tensor([int(flag)])
        dist.all_reduce(raised, dist.ReduceOp.MAX)
        return bool(raised)

    def gather(self, rows: Tensor) -> Tensor:
        """The rows of all processes, one after the other; each brings the same number."""
        if self.world == 1:
            return rows
        parts = [torch.empty_like(rows) for _ in range(self.world)]
        dist.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    def from_first(self, value: T) -> T:
        """The first process's value, in all of them."""
        if self.world == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def first_number(self, value: float) -> float:
        """The first process's number, in all of them."""
        if self.world == 1:
            return value
        number = torch.tensor(value, dtype=torch.float64)
        dist.broadcast(number, src=0)
        return number.item()

    def wait(self) -> None:
        """Until all are here."""
        if self.world > 1:
            dist.barrier()

    @contextmanager
    def first_alone(self) -> Iterator[None]:
        """The first process goes through the body before the others, who then find its files."""
        if not self.first:
            self.wait()
        try:
            yield
        finally:
            if self.first:
                self.wait()


ALONE = Processes()


@contextmanager
def launched(device: torch.device) -> Iterator[Processes]:
    """The processes that torchrun started with this one, each with its device; without torchrun, this one alone.

    UserError for more processes on a machine than it has GPUs.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1 or "RANK" not in os.environ:
        yield Processes(device=device)
        return
    backend = "gloo"
    if device.type == "cuda":
        local = int(os.environ["LOCAL_RANK"])
        if local >= torch.cuda.device_count():
            raise UserError(
                f"process {local + 1} of this machine finds {torch.cuda.device_count()} GPUs: "
                f"start torchrun with --nproc-per-node {torch.cuda.device_count()}"
            )
        device, backend = torch.device("cuda", local), "cpu:gloo,cuda:nccl"
        torch.cuda.set_device(device)
    elif device.type != "cpu":
        raise UserError(f"device {device.type}: serves one process; use --device cpu, or train without torchrun")
    dist.init_process_group(backend)
    with warnings.catch_warnings():
        # true of heads under FSDP2, and harmless: nothing here is changed in place
        warnings.filterwarnings("ignore", message=".*returned a view tensor")
        yield Processes(dist.get_rank(), dist.get_world_size(), device)
    # sharded modules refer to the group in cycles; one that outlives it here can abort the process at its end
    gc.collect()
    # not after an error: the others may be waiting for this process, and torchrun ends them
    dist.destroy_process_group()
