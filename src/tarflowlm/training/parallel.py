"""A model as its processes train it: whole in each of them (DDP), or every tensor cut into shards (FSDP2).

The same global batch gives the same step however it is divided: every process draws the noise of all sequences and
uses its own rows, the loss is a mean over equal parts, and gradients are averaged.
"""

import importlib.util
import os
import shutil
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from tarflowlm.evaluation.likelihood import Likelihood, evaluate
from tarflowlm.flow.couplings import Coupling
from tarflowlm.flow.transformer import Layer
from tarflowlm.language_model import LanguageModel, seeded
from tarflowlm.objective import log_importance_weights
from tarflowlm.runs.config import RunConfig, TrainConfig
from tarflowlm.training.distributed import ALONE, Processes


class Bound(nn.Module):
    """`negative_bound` as a module's forward, which is what DDP, FSDP2 and torch.compile work on."""

    def __init__(self, model: LanguageModel, frozen: int) -> None:
        super().__init__()
        self.model, self.frozen = model, frozen

    def forward(self, tokens: Int[Tensor, "B T"], noise: Float[Tensor, "B T d"]) -> Float[Tensor, " B"]:
        """Nats per sequence, for a loss that weights all of them alike."""
        return self.model.negative_bound(tokens, noise, frozen=self.frozen, equal_cotangents=True)


def compiles(train: TrainConfig, processes: Processes, device: torch.device) -> bool:
    """Whether the loss is compiled on `device`: `train.compile`, decided where it is None.

    Warns where a compiler would help and none is at hand.
    """
    if train.compile is not None:
        return train.compile
    if train.precision != "bfloat16" or device.type != "cuda":
        return False
    missing = _missing_for_compilation()
    if missing and processes.first:
        warnings.warn(f"torch.compile needs {missing}, which is not here: training goes on without it", stacklevel=3)
    return not missing


def _missing_for_compilation() -> str | None:
    """What the compiler for CUDA GPUs needs and does not find: triton, and a C compiler that builds its launchers."""
    if importlib.util.find_spec("triton") is None:
        return "triton"
    if os.environ.get("CC") or any(shutil.which(name) for name in ("cc", "gcc", "clang")):
        return None
    return "a C compiler"


class Engine:
    """One stage's training loss and its gradients, over the processes that take part.

    `module` maps tokens and noise to nats per sequence. `model` is used as it is; under FSDP2 its parameters become
    shards in place (DTensors). The first `frozen` blocks are evaluated without a graph; their parameters, and with
    them the codebook, must be frozen before. FSDP2 cuts over `mesh`, by default all processes.
    """

    def __init__(
        self,
        model: LanguageModel,
        run: RunConfig,
        processes: Processes = ALONE,
        *,
        frozen: int = 0,
        mesh: DeviceMesh | None = None,
    ) -> None:
        self.model, self.run, self.processes = model, run, processes
        self.sharded = processes.world > 1 and run.train.parallel == "fsdp"
        # shards are not on their device yet
        device = processes.device if self.sharded else model.device
        self.compiled = compiles(run.train, processes, device)
        bound = Bound(model, frozen)
        self._prepare_layers(frozen)
        if self.sharded:
            _shard(bound, mesh or init_device_mesh(processes.device.type, (processes.world,)))
        elif self.compiled:
            bound.compile(fullgraph=True)
        self.module: nn.Module = bound
        if processes.world > 1 and not self.sharded:
            self.module = DistributedDataParallel(bound, gradient_as_bucket_view=True)

    def _prepare_layers(self, frozen: int) -> None:
        """Activation checkpointing of the Transformer layers that train, and their compilation under FSDP2, whose
        hooks between layers no graph can cross."""
        trained = [layer for part in self.model.blocks_from(frozen) for layer in _layers(part)]
        for layer in _layers(self.model):
            layer.keeps_activations = not (self.run.train.checkpoint_activations and layer in trained)
            if self.compiled and self.sharded:
                layer.compile(fullgraph=True)

    def backward(self, tokens: Int[Tensor, "b T"], generator: torch.Generator) -> Tensor:
        """Gradients of the mean over the global batch, of which `tokens` are this process's rows; returns that mean,
        in nats per token."""
        train, processes = self.run.train, self.processes
        rows = self.processes.rank * len(tokens)
        # every process draws the noise of the whole batch, and uses its own rows
        everyone = tokens.new_empty(processes.world * len(tokens), tokens.shape[1])
        noise = self.model.draw_noise(everyone, generator)[rows : rows + len(tokens)]
        parts = list(zip(tokens.chunk(train.accumulate), noise.chunk(train.accumulate), strict=True))
        total = torch.zeros((), device=tokens.device)
        for index, (part, part_noise) in enumerate(parts):
            with self._reducing(index + 1 == len(parts)):
                with torch.autocast(tokens.device.type, torch.bfloat16, enabled=train.precision == "bfloat16"):
                    bound = self.module(part, part_noise)
                    loss = bound.mean() / tokens.shape[1] / len(parts)
                loss.backward()
            total = total + loss.detach()
        return processes.mean(total)

    def _reducing(self, last: bool) -> AbstractContextManager[None]:
        """DDP sends gradients with the last part alone. FSDP2 sends them with every part: to hold them back it would
        have to keep them whole."""
        ddp = isinstance(self.module, DistributedDataParallel)
        return nullcontext() if last or not ddp else self.module.no_sync()  # type: ignore[operator]

    def evaluate(
        self,
        windows: Int[Tensor, "N T"],
        characters_per_token: Tensor,
        progress: Callable[[int, int], None] | None = None,
    ) -> Likelihood:
        """The bound over `windows`, the work shared out over the processes; the same in all of them."""
        weigh = log_importance_weights if self.processes.world == 1 else self._shared_weights
        return evaluate(self.model, windows, characters_per_token, weigh=weigh, progress=progress)

    def _shared_weights(
        self,
        model: LanguageModel,
        tokens: Int[Tensor, "B T"],
        *,
        samples: int,
        generator: torch.Generator,
        given: int,
    ) -> Float[Tensor, "1 B"]:
        """`log_importance_weights` for one sample, its rows shared out over the processes."""
        assert samples == 1, "training looks at one sample"
        assert given == 0, "and at fresh contexts"
        noise = model.draw_noise(tokens, generator)
        each = -(-len(tokens) // self.processes.world)
        # the last process may have fewer: it repeats a row, for all must take part in every collective
        rows = (self.processes.rank * each + torch.arange(each, device=tokens.device)).clamp(max=len(tokens) - 1)
        if self.sharded:
            nats = self.module(tokens[rows], noise[rows])
            assert isinstance(self.module, FSDPModule)
            # what follows may read parameters
            self.module.reshard()
        else:
            nats = model.negative_bound(tokens[rows], noise[rows])
        return -self.processes.gather(nats)[None, : len(tokens)]

    def whole(self) -> LanguageModel:
        """The model with whole parameters: itself, or under FSDP2 a copy in memory. All processes take part."""
        if not self.sharded:
            return self.model
        with seeded(0):
            copy = self.model.config.first_blocks(self.model.num_blocks).build()
        copy.load_state_dict(whole_weights(self.model))
        copy.config = self.model.config
        return copy


def _layers(module: nn.Module) -> list[Layer]:
    return [m for m in module.modules() if isinstance(m, Layer)]


def _shard(bound: Bound, mesh: DeviceMesh) -> None:
    """FSDP2, in place: a Transformer layer or a head is gathered when its turn comes, the small rest for the whole
    step."""
    for module in [*_layers(bound), *bound.model.heads()]:
        fully_shard(module, mesh=mesh)
        if isinstance(module, Coupling):
            # the last block is asked for its density alone
            register_fsdp_forward_method(module, "log_prob")
    fully_shard(bound, mesh=mesh, reshard_after_forward=False)


def whole_weights(model: nn.Module, *, keep: bool = True) -> dict[str, Tensor]:
    """The state dict on the CPU, shards put together one tensor at a time; without `keep`, just taking part in it."""
    weights = {}
    for name, tensor in model.state_dict().items():
        full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if keep:
            weights[name] = full.detach().cpu()
    return weights
