"""Training in one process or in several, with the model replicated (DDP) or sharded (FSDP2).

A global batch gives the same step however it is divided: every process draws the noise of all
sequences and uses its own rows, the loss is a mean over equal parts, and gradients are averaged.
Dropout alone differs: every process draws its own.
"""

import gc
import hashlib
import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.rendezvous import rendezvous
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from tarflowlm.config import TrainConfig
from tarflowlm.device import compilation_problem
from tarflowlm.errors import UserError
from tarflowlm.flow.couplings import Coupling, couplings_of
from tarflowlm.flow.transformer import Layer
from tarflowlm.model import LanguageModel, seeded

T = TypeVar("T")

PATIENCE = timedelta(minutes=10)
"""How long processes wait for one another."""
PREPARATION = timedelta(hours=3)
"""The same, while the first one prepares the text."""


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
        parts = self.world * train.accumulate
        if train.batch_size % parts:
            raise UserError(
                f"train.batch_size {train.batch_size}: use a multiple of {parts} for {self.world} "
                f"processes x {train.accumulate} accumulation steps"
            )
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

    def from_first(self, value: T) -> T:
        """The value of the first process (any object that can be pickled)."""
        box = [value]
        if self.world > 1:
            dist.broadcast_object_list(box, src=0)
        return box[0]

    def wait(self, group: dist.ProcessGroup | None = None) -> None:
        """Wait until all processes have called it."""
        if self.world > 1:
            dist.barrier(group=group)

    @contextmanager
    def first_alone(self) -> Iterator[None]:
        """A context that the first process passes before the others, which find its files."""
        group: Any = dist.new_group(backend="gloo", timeout=PREPARATION) if self.world > 1 else None
        if not self.first:
            self.wait(group)
        try:
            yield
        finally:
            if self.first:
                self.wait(group)


ALONE = Processes()
"""A single process on the CPU."""


@contextmanager
def launched(device: torch.device) -> Iterator[Processes]:
    """Join the group that torchrun started, one GPU per process; without torchrun, one process.

    A group of Ray Train, accelerate or Fabric is used and left to them.
    """
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
        # processes that torchrun starts again would find the addresses of those that have ended;
        # several machines count apart, but have a new store
        restarts = given.get("TORCHELASTIC_RESTART_COUNT", "0")
        store = dist.distributed_c10d.PrefixStore(restarts, store)
    dist.init_process_group(backend, timeout=PATIENCE, store=store, rank=rank, world_size=world)
    gc.disable()  # `train` collects, so that no process holds up the others
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
    # happens for heads under FSDP2; harmless, since nothing here is changed in place
    warnings.filterwarnings("ignore", message=".*returned a view tensor")
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


# the model over all processes


class NegativeBound(nn.Module):
    """The negative bound of every sequence, in nats, as the forward that DDP and FSDP2 need."""

    def __init__(self, model: LanguageModel, frozen: int, precision: str) -> None:
        super().__init__()
        self.model = model
        self.frozen = frozen
        self.precision = precision

    def forward(
        self, tokens: Int[Tensor, "B T"], noise: Float[Tensor, "B T d"]
    ) -> Float[Tensor, " B"]:
        narrow = self.precision == "bfloat16"
        with torch.autocast(tokens.device.type, torch.bfloat16, enabled=narrow):
            return self.model.bound(tokens, noise, frozen=self.frozen)


def parallelise(
    model: LanguageModel,
    train: TrainConfig,
    processes: Processes = ALONE,
    *,
    frozen: int = 0,
    compiled: bool = False,
) -> nn.Module:
    """The negative bound of `model`, which maps tokens and noise to nats [B], for all processes.

    The first `frozen` blocks get no graph; `LanguageModel.train_only` has frozen their parameters.
    Under FSDP2 the trained parameters of `model` are sharded in place. If `compiled`, every
    Transformer layer is, layers of one shape sharing a graph, and the maps of every coupling.
    """
    trained = [layer for part in model.blocks_from(frozen) for layer in layers_of(part)]
    for layer in layers_of(model):
        is_trained = layer in trained
        layer.keeps_activations = not (train.checkpoint_activations and is_trained)
        layer.dropout = train.dropout if is_trained else 0.0
        if compiled:
            layer.compile(fullgraph=True)
    for coupling in couplings_of(model):
        coupling.compiled = compiled
    bound: nn.Module = NegativeBound(model, frozen, train.precision)
    if processes.shards(train):
        shard(bound, model, processes, train.precision)
    elif processes.world > 1:
        bound = DistributedDataParallel(bound, gradient_as_bucket_view=True)
        bound.broadcast_buffers = False  # they are constants; the argument has two names
    return bound


def synchronise(bound: nn.Module, is_last: bool) -> None:
    """Let only the last backward pass of a step average the gradients over the processes."""
    if isinstance(bound, FSDPModule):
        bound.set_requires_gradient_sync(is_last)
    elif isinstance(bound, DistributedDataParallel):
        bound.require_backward_grad_sync = is_last


@contextmanager
def seeded_dropout(
    dropout: float, generator: torch.Generator, processes: Processes
) -> Iterator[None]:
    """Seed dropout, which draws from PyTorch's global generators, from `generator`, differently in
    every process; the global states are restored afterwards.
    """
    if not dropout:
        yield
        return
    device = generator.device
    drawn = torch.randint(2**62, (), generator=generator, device=device)
    if device.type == "cpu":
        seed = int(drawn)
    else:
        # the state of a GPU's generator is on the host; reading a number would wait for the device
        state = hashlib.sha256(generator.get_state().numpy().tobytes()).digest()
        seed = int.from_bytes(state[:7], "little")
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed + processes.rank)
        yield


def compiles(train: TrainConfig, processes: Processes, device: torch.device) -> bool:
    """Whether layers are compiled: `train.compile`, or by default in bfloat16 on a GPU.

    Where compilation does not work, that is a warning.
    """
    if train.compile is not None:
        return train.compile
    if train.precision != "bfloat16" or device.type != "cuda":
        return False
    problem = compilation_problem(device.type)
    if problem and processes.first:
        text = f"torch.compile does not work here ({problem}): training without it"
        warnings.warn(text, stacklevel=3)
    return not problem


@contextmanager
def compiling(compiled: bool) -> Iterator[None]:
    """A context for calls of compiled layers, with many small graphs that DDP need not split.

    Every size of batch has a graph of its own: validation, which comes first, has another size.
    """
    if not compiled:
        yield
        return
    with torch._dynamo.config.patch(
        recompile_limit=64, optimize_ddp=False, automatic_dynamic_shapes=False
    ):
        yield


def layers_of(module: nn.Module) -> list[Layer]:
    return [m for m in module.modules() if isinstance(m, Layer)]


# FSDP2: parameters, gradients and the states of AdamW are sharded


def shard(bound: nn.Module, model: LanguageModel, processes: Processes, precision: str) -> None:
    """Shard the trained parameters of `model` in place; frozen ones stay whole.

    Layers, in `precision`, and heads are gathered one at a time, the rest for the whole step.
    """
    mesh = init_device_mesh(processes.device.type, (processes.world,))
    narrow = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    frozen = {p for p in model.parameters() if not p.requires_grad}
    for p in frozen:
        p.data = p.data.to(processes.device)
    # couplings contain the heads of a flow
    head = getattr(model, "head", None)
    heads = [m for m in model.modules() if isinstance(m, Coupling) or m is head]
    for module in [*layers_of(model), *heads]:
        if not frozen.issuperset(module.parameters()):
            is_narrow = precision == "bfloat16" and isinstance(module, Layer)
            fully_shard(
                module,
                mesh=mesh,
                mp_policy=narrow if is_narrow else MixedPrecisionPolicy(),
                # the backward pass begins with the last head
                reshard_after_forward=module is not heads[-1],
                ignored_params=frozen,
            )
        if isinstance(module, Coupling):  # the last block uses only `log_prob`
            register_fsdp_forward_method(module, "log_prob")
    fully_shard(bound, mesh=mesh, reshard_after_forward=False, ignored_params=frozen)


def reshard(bound: nn.Module) -> None:
    """Free what FSDP2 gathered for a call without backward, so that parameters can be read."""
    for module in bound.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def whole_weights(model: nn.Module, *, keep: bool = True) -> dict[str, Tensor]:
    """A copy of the state dict, whole and on the CPU; empty without `keep`. Collective."""
    weights = {}
    for name, tensor in model.state_dict().items():
        full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if keep:
            weights[name] = full.detach().to("cpu", copy=True)
    return weights


def whole_model(model: LanguageModel) -> LanguageModel:
    """A copy of a model on the CPU, with whole parameters. Collective."""
    with seeded(0):
        copy = model.config.first_blocks(model.num_blocks).build()
    copy.load_state_dict(whole_weights(model))
    copy.config = model.config
    return copy
