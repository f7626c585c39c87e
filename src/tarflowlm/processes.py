"""The device of a command, and its processes, started by torchrun or by Ray Train and the like."""

import ctypes
import gc
import logging
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from functools import cache
from itertools import chain, islice
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from tarflowlm.config import TrainConfig
from tarflowlm.errors import UserError, first_line
from tarflowlm.schema import check_type

T = TypeVar("T")


def pick_device(name: str | torch.device = "auto") -> torch.device:
    """A device of PyTorch, such as "cuda:1". UserError if it is missing.

    auto takes cuda, then cpu. It never takes mps, because the numerics have not run there yet.
    UserError for another default device than the CPU, where generators and tokens are.
    """
    wanted = "give auto, cpu or another device; the numbers stay in float32"
    check_type(name, "device", (str, torch.device), wanted)
    if torch.get_default_device().type != "cpu":
        what = f"PyTorch's default device is {torch.get_default_device()}"
        raise UserError(f"{what}: set it to cpu, and name the device where a model is loaded")
    is_there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    available = [*(kind for kind, found in is_there.items() if found), "cpu"]
    usual = "cuda" if is_there["cuda"] else "cpu"
    try:
        found = torch.device(usual if name == "auto" else name)
        own = int(os.environ.get("LOCAL_RANK", -1))
        if found.type == "cuda" and found.index is None and 0 <= own < torch.cuda.device_count():
            # first of all: whatever asks for "cuda" would take memory on the GPU of process 0
            torch.cuda.set_device(own)
        torch.empty(0, device=found)
    except (TypeError, RuntimeError, AssertionError):
        choice = ", ".join(["auto", *available])
        raise UserError(f"device {name}: not on this machine, use one of {choice}") from None
    return found


@cache
def compilation_problem(kind: str) -> str | None:
    """The reason why torch.compile fails on a kind of device, in a line; None if it works."""
    try:
        torch.compile(lambda x: 2 * x + 1)(torch.ones(2, device=kind))
    except Exception as error:  # of any type, for want of Triton, gcc or Python.h
        return first_line(error)
    return None


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


# processes

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
