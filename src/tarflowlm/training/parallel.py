"""Training in one process or in several: the group of processes, and the model replicated (DDP) or
sharded (FSDP2).

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
from contextlib import AbstractContextManager, contextmanager, nullcontext
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

from tarflowlm.config import RunConfig, TrainConfig
from tarflowlm.device import missing_for_compilation
from tarflowlm.errors import UserError
from tarflowlm.evaluation.likelihood import Likelihood, evaluate, windows_per_batch
from tarflowlm.flow.couplings import Coupling
from tarflowlm.flow.mixd import MixDCoupling
from tarflowlm.flow.transformer import Layer
from tarflowlm.language_model import LanguageModel, seeded
from tarflowlm.progress import SILENT, Progress

T = TypeVar("T")

PATIENCE = timedelta(hours=3)
"""How long processes wait for another one, such as the first one, which prepares the text: some 6
MB per second.
"""


@dataclass(frozen=True)
class Processes:
    """This process in its process group. Methods that communicate are collective: all processes
    must call them.
    """

    rank: int = 0  # index of this process, from 0
    world: int = 1  # number of processes
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def first(self) -> bool:
        """True for the process that writes files and reports to the user."""
        return self.rank == 0

    def rows_each(self, batch_size: int, accumulate: int) -> int:
        """Sequences per process of a global batch. They must divide evenly into `accumulate`
        parts.
        """
        parts = self.world * accumulate
        if batch_size % parts:
            division = f"{self.world} processes x {accumulate} accumulation steps; use a multiple of {parts}"
            raise UserError(f"train.batch_size {batch_size}: does not divide into {division}")
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
        raised = torch.tensor([int(flag)])  # on the CPU, by gloo, so that no device has to wait
        if self.world > 1:
            dist.all_reduce(raised, dist.ReduceOp.MAX)
        return bool(raised)

    def gather(self, rows: Tensor) -> Tensor:
        """The `rows` of all processes, concatenated in order of rank; every process passes the same
        number.
        """
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

    def wait(self) -> None:
        """Wait until all processes have called it."""
        if self.world > 1:
            dist.barrier()

    @contextmanager
    def first_alone(self) -> Iterator[None]:
        """A context whose body the first process runs before the others, so that they find the
        files it wrote.
        """
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
    """Join the process group that torchrun started, with one GPU per process; without torchrun, a
    group of one.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1 or "RANK" not in os.environ:
        yield Processes(device=device)
        return
    backend = "gloo"
    if device.type == "cuda":
        local, available = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if local >= available:
            raise UserError(
                f"this machine has {available} GPUs: start torchrun with --nproc-per-node {available}"
            )
        device, backend = torch.device("cuda", local), "cpu:gloo,cuda:nccl"
        torch.cuda.set_device(device)
    elif device.type != "cpu":
        raise UserError(
            f"device {device.type}: serves only one process; use --device cpu, or train without torchrun"
        )
    # processes that torchrun starts again would find in its store the addresses of those that have
    # ended
    store, rank, world = next(rendezvous("env://"))
    store = dist.distributed_c10d.PrefixStore(
        os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store
    )
    dist.init_process_group(backend, timeout=PATIENCE, store=store, rank=rank, world_size=world)
    if dist.get_rank():
        logging.getLogger("tarflowlm").setLevel(
            logging.ERROR
        )  # the first process gives the notices
    # happens for heads under FSDP2; harmless, since nothing here is changed in place
    warnings.filterwarnings("ignore", message=".*returned a view tensor")
    yield Processes(dist.get_rank(), dist.get_world_size(), device)
    # sharded modules hold the group in reference cycles; one that outlives the group can abort the
    # process on exit
    gc.collect()
    # not reached after an error: the others may be waiting for this process, and torchrun ends them
    dist.destroy_process_group()


class NegativeBound(nn.Module):
    """The negative bound of every sequence, in nats, as a module's forward, which DDP and FSDP2
    need.
    """

    def __init__(self, model: LanguageModel, frozen: int, precision: str) -> None:
        super().__init__()
        self.model, self.frozen, self.precision = model, frozen, precision

    def forward(
        self, tokens: Int[Tensor, "B T"], noise: Float[Tensor, "B T d"]
    ) -> Float[Tensor, " B"]:
        with torch.autocast(
            tokens.device.type, torch.bfloat16, enabled=self.precision == "bfloat16"
        ):
            return self.model.bound(tokens, noise, frozen=self.frozen)


def compiles(train: TrainConfig, processes: Processes, device: torch.device) -> bool:
    """True if layers are to be compiled on `device`: `train.compile`, or by default where it helps
    and is possible, with a warning if it would help but a compiler is missing.
    """
    if train.compile is not None:
        return train.compile
    if train.precision != "bfloat16" or device.type != "cuda":
        return False
    missing = missing_for_compilation(device)
    if missing and processes.first:
        warnings.warn(
            f"torch.compile needs {missing}, which is not installed: training without it",
            stacklevel=3,
        )
    return not missing


class ParallelModel:
    """A model in training, over all processes: gradients of the loss on a global batch, and
    validation.

    The first `frozen` blocks are evaluated without a graph; the caller must have frozen their
    parameters and the codebook before (`LanguageModel.train_only`). `loss` maps tokens and noise to
    nats per sequence. Under FSDP2 the trained parameters of `model` are sharded in place
    (DTensors). Transformer layers alone are compiled; those of one shape share a graph, whatever
    the depth and the vocabulary.
    """

    def __init__(
        self,
        model: LanguageModel,
        config: RunConfig,
        processes: Processes = ALONE,
        *,
        frozen: int = 0,
    ) -> None:
        self.model, self.config, self.processes = model, config, processes
        self.sharded = processes.world > 1 and config.train.parallel == "fsdp"
        device = (
            processes.device if self.sharded else model.device
        )  # a model to be sharded is not there yet
        self.compiled = compiles(config.train, processes, device)
        trained = [layer for part in model.blocks_from(frozen) for layer in _layers(part)]
        for layer in _layers(model):
            layer.keeps_activations = not (config.train.checkpoint_activations and layer in trained)
            layer.dropout = config.train.dropout if layer in trained else 0.0
            if self.compiled:
                layer.compile(fullgraph=True)
        self.loss: nn.Module = NegativeBound(model, frozen, config.train.precision)
        if self.sharded:
            shard(self.loss, model, processes, config.train.precision)
        elif processes.world > 1:
            self.loss = DistributedDataParallel(self.loss, gradient_as_bucket_view=True)
            self.loss.broadcast_buffers = False  # they are constants; the argument has two names

    def backward(self, tokens: Int[Tensor, "B T"], generator: torch.Generator) -> Tensor:
        """Compute the gradients of the mean loss over the global batch; returns that mean, in nats
        per token.

        `tokens` are this process's rows of the batch. `generator` draws the noise of the whole
        batch, so it must be in the same state in all processes. Collective.
        """
        train, processes = self.config.train, self.processes
        first_row = processes.rank * len(tokens)
        global_batch = tokens.new_empty(processes.world * len(tokens), tokens.shape[1])
        noise = self.model.draw_noise(global_batch, generator)[first_row : first_row + len(tokens)]
        parts = list(
            zip(tokens.chunk(train.accumulate), noise.chunk(train.accumulate), strict=True)
        )
        total = torch.zeros((), device=tokens.device)
        with self._seeded_dropout(generator), self.compiling():
            for index, (part, part_noise) in enumerate(parts):
                last = index + 1 == len(
                    parts
                )  # gradients are averaged over processes with the last part
                if isinstance(self.loss, FSDPModule):
                    self.loss.set_requires_gradient_sync(last)
                elif isinstance(self.loss, DistributedDataParallel):
                    self.loss.require_backward_grad_sync = last
                loss = self.loss(part, part_noise).mean() / tokens.shape[1] / len(parts)
                loss.backward()
                total = total + loss.detach()
        return processes.mean(total)

    def compiling(self) -> AbstractContextManager[Any]:
        """A context for calls of compiled layers: of frozen ones, of one sequence and so on, each
        with its own graph, which is too small for DDP to split.
        """
        return (
            torch._dynamo.config.patch(recompile_limit=64, optimize_ddp=False)
            if self.compiled
            else nullcontext()
        )

    @contextmanager
    def _seeded_dropout(self, generator: torch.Generator) -> Iterator[None]:
        """Seed dropout, which draws from PyTorch's global generators, from `generator`, differently
        in every process; the global states are restored afterwards.
        """
        if not self.config.train.dropout:
            yield
            return
        drawn, device = (
            torch.randint(2**62, (), generator=generator, device=generator.device),
            self.model.device,
        )
        # reading a number waits for an accelerator; its generator's state is on the host, and has
        # advanced
        state = hashlib.sha256(generator.get_state().numpy().tobytes()).digest()
        seed = int(drawn) if drawn.device.type == "cpu" else int.from_bytes(state[:7], "little")
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(seed + self.processes.rank)
            yield

    def evaluate(
        self, windows: Int[Tensor, "W T"], characters_per_token: Tensor, progress: Progress = SILENT
    ) -> Likelihood:
        """The bound over `windows`, with the rows of every batch divided between the processes.
        Collective; all processes get the same result. Arguments as
        `evaluation.likelihood.evaluate`.
        """
        world = self.processes.world
        options: dict[str, Any] = {"weigh": self._divided_bound} if world > 1 else {}
        options["batch"] = world * windows_per_batch(windows.shape[1])
        with self.compiling():
            return evaluate(self.model, windows, characters_per_token, progress=progress, **options)

    def _divided_bound(
        self,
        model: LanguageModel,
        tokens: Int[Tensor, "B T"],
        *,
        generator: torch.Generator,
        **_options: Any,
    ) -> Float[Tensor, "1 B"]:
        # in the parts that a single process would draw
        parts = tokens.split(windows_per_batch(tokens.shape[1]))
        noise = torch.cat([model.draw_noise(part, generator) for part in parts])
        each = -(-len(tokens) // self.processes.world)
        # in the last batch, processes without rows repeat one, since all must take part in every
        # collective
        rows = (self.processes.rank * each + torch.arange(each, device=tokens.device)).clamp(
            max=len(tokens) - 1
        )
        nats = (self.loss if self.sharded else model.bound)(tokens[rows], noise[rows])
        self.reshard()
        return -self.processes.gather(nats)[None, : len(tokens)]

    def reshard(self) -> None:
        """Free what FSDP2 gathered for a call without a backward pass, so that parameters can be
        read.
        """
        for module in self.loss.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    def whole_model(self) -> LanguageModel:
        """The model with whole parameters: `model` itself, or under FSDP2 a copy on the CPU.
        Collective.
        """
        if not self.sharded:
            return self.model
        with seeded(0):
            copy = self.model.config.first_blocks(self.model.num_blocks).build()
        copy.load_state_dict(whole_weights(self.model))
        copy.config = self.model.config
        return copy


def _layers(module: nn.Module) -> list[Layer]:
    return [m for m in module.modules() if isinstance(m, Layer)]


# FSDP2: parameters, gradients and optimiser states are sharded. Nothing else here, in `optim` or in
# `state` depends on it, but `Muon`, which sends matrices to owners.


def shard(loss: nn.Module, model: LanguageModel, processes: Processes, precision: str) -> None:
    """Shard the trained parameters of `model` in place; frozen ones stay whole. Layers, in
    `precision`, and heads are gathered one at a time, the rest for the whole step. `loss` is the
    module that is called.
    """
    mesh = init_device_mesh(processes.device.type, (processes.world,))
    narrow = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    frozen = {p for p in model.parameters() if not p.requires_grad}
    for p in frozen:
        p.data = p.data.to(processes.device)
    # couplings contain the heads of a flow
    heads = [
        m for m in model.modules() if isinstance(m, Coupling) or m is getattr(model, "head", None)
    ]
    for module in [*_layers(model), *heads]:
        if not frozen.issuperset(module.parameters()):
            policy = (
                narrow
                if precision == "bfloat16" and isinstance(module, Layer)
                else MixedPrecisionPolicy()
            )
            frees = module is not heads[-1]  # the backward pass begins with it
            fully_shard(
                module,
                mesh=mesh,
                mp_policy=policy,
                reshard_after_forward=frees,
                ignored_params=frozen,
            )
        if isinstance(module, Coupling):  # the last block uses only `log_prob`
            register_fsdp_forward_method(module, "log_prob")
        if isinstance(module, MixDCoupling):  # which alone, if it is tied, uses this
            register_fsdp_forward_method(module, "log_density_ratio")
    fully_shard(loss, mesh=mesh, reshard_after_forward=False, ignored_params=frozen)


def whole_weights(model: nn.Module, *, keep: bool = True) -> dict[str, Tensor]:
    """The state dict with whole tensors on the CPU. Collective under FSDP2; without `keep` the
    result is empty.
    """
    weights = {}
    for name, tensor in model.state_dict().items():
        full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if keep:
            weights[name] = full.detach().cpu()
    return weights
