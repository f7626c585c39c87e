"""The processes of a command, started by torchrun or by Ray Train and the like."""

import gc
import logging
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from itertools import chain, islice
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from tarflowlm.config import TrainConfig
from tarflowlm.device import pick_device
from tarflowlm.errors import UserError

T = TypeVar("T")

PATIENCE = timedelta(minutes=10)
"""The longest time that processes wait for one another in training."""
LONG = timedelta(hours=3)
"""The same while the first one prepares the text, or while each does work of its own."""


@dataclass(frozen=True)
class Processes:
    """This process in its group. All processes must call a method that communicates."""

    rank: int = 0  # index of this process, from 0
    world: int = 1  # number of processes
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def first(self) -> bool:
        """Whether this process writes files and reports to the user."""
        return self.rank == 0

    def shards(self, train: TrainConfig) -> bool:
        """Whether FSDP2 divides the parameters among the processes."""
        return self.world > 1 and train.parallel == "fsdp"

    def rows_each(self, train: TrainConfig) -> int:
        """Sequences of a global batch for each process. UserError if they do not divide evenly."""
        if train.batch_size % self.world:
            rule = f"use a multiple of {self.world}, or fewer than {self.world} processes"
            raise UserError(f"train.batch_size {train.batch_size}: {rule}")
        return train.batch_size // self.world

    def any(self, flag: bool) -> bool:
        """True if `flag` is set in any process."""
        if self.world == 1:
            return flag
        # on the CPU, by gloo, so that no device has to wait
        device = self.device if dist.get_backend() == "nccl" else torch.device("cpu")
        return bool(self.gather(torch.tensor([int(flag)], device=device)).any())

    def gather(self, rows: Tensor) -> Tensor:
        """The `rows` of all processes, in order of rank; every process passes the same number."""
        if self.world == 1:
            return rows
        parts = [torch.empty_like(rows) for _ in range(self.world)]
        dist.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    def in_turn(self, own: Iterable[T]) -> Iterator[T]:
        """Every process passes its `own` items, which can be pickled, and gets the items of all:
        the first item of each process in order of rank, then the second of each.

        So if process k % world computes item k, all get the items in their order.
        """
        if self.world == 1:
            yield from own
            return
        items = iter(own)
        turns: list[list[T]] = [[] for _ in range(self.world)]
        while True:
            dist.all_gather_object(turns, list(islice(items, 1)))
            if not any(turns):
                return
            yield from chain.from_iterable(turns)

    def from_first(self, value: T) -> T:
        """The value of the first process (any object that can be pickled)."""
        box = [value]
        if self.world > 1:
            dist.broadcast_object_list(box, src=0)
        return box[0]

    @contextmanager
    def first_alone(self) -> Iterator[None]:
        """A context that the first process passes before the others, which find its files."""
        group: Any = dist.new_group(backend="gloo", timeout=LONG) if self.world > 1 else None
        if group is not None and not self.first:
            dist.barrier(group)
        try:
            yield
        finally:
            if group is not None and self.first:
                dist.barrier(group)


ALONE = Processes()
"""A single process on the CPU."""


@contextmanager
def launched(device: str | torch.device, patience: timedelta = PATIENCE) -> Iterator[Processes]:
    """Join the group that torchrun started, one GPU per process; without torchrun, one process.

    Processes wait for one another up to `patience`. A group that Ray Train, accelerate or Fabric
    has made is used, but they end it.
    """
    device = pick_device(device)
    if dist.is_initialized():
        yield member(device)
        return
    given = os.environ
    if "RANK" not in given and given.get("SLURM_STEP_NUM_TASKS", "1") != "1":
        raise UserError(
            f"{given['SLURM_STEP_NUM_TASKS']} Slurm tasks without torchrun: see "
            "examples/train.sbatch; for separate runs, unset SLURM_STEP_NUM_TASKS"
        )
    if "RANK" not in given or given.get("WORLD_SIZE", "1") == "1":
        yield Processes(device=device)
        return
    machines = given.get("GROUP_WORLD_SIZE", "1")
    if machines != "1" and given.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        raise UserError(
            f"torchrun on {machines} machines, whose restart would hang: use --rdzv-backend c10d "
            "and, before torchrun, export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"
        )
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    store, rank, world = next(rendezvous("env://"))
    if machines == "1":
        # processes that torchrun starts again would find the addresses of ended ones; several
        # machines count apart, but have a new store
        restarts = given.get("TORCHELASTIC_RESTART_COUNT", "0")
        store = dist.distributed_c10d.PrefixStore(restarts, store)
    dist.init_process_group(backend, timeout=patience, store=store, rank=rank, world_size=world)
    yield member(torch.device(device.type))
    # a sharded module that outlives the group, in a reference cycle, can abort the process on exit
    gc.collect()
    # not after an error: the others may be waiting for this process, and torchrun ends them
    dist.destroy_process_group()


def member(device: torch.device) -> Processes:
    """This process in PyTorch's group, where the first one alone gives notices."""
    rank = dist.get_rank()
    if rank:
        logging.getLogger("tarflowlm").setLevel(logging.ERROR)
    return Processes(rank, dist.get_world_size(), own_device(device, rank))


def own_device(device: torch.device, rank: int) -> torch.device:
    """The CPU, or a GPU for the process of this `rank` alone, unless `device` names one."""
    if device.type == "cpu":
        return device
    if device.type != "cuda":
        raise UserError(f"device {device.type}: serves only one process; use --device cpu")
    available = torch.cuda.device_count()
    # Kubernetes sets no LOCAL_RANK
    own = int(os.environ.get("LOCAL_RANK", rank % max(available, 1)))
    local = own if device.index is None else device.index
    if local >= available:
        raise UserError(f"{available} GPUs: start torchrun with --nproc-per-node {available}")
    torch.cuda.set_device(local)
    return torch.device("cuda", local)
