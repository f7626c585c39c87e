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
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from tarflowlm.baseline import TokenLM
from tarflowlm.evaluation.likelihood import Likelihood, evaluate
from tarflowlm.flow.couplings import Coupling
from tarflowlm.flow.transformer import Layer
from tarflowlm.model import FlowConfig, TarFlowLM, seeded
from tarflowlm.objective import log_importance_weights, negative_bound, posterior_noise
from tarflowlm.runs.checkpoint import Model, build_model
from tarflowlm.runs.config import RunConfig, TrainConfig
from tarflowlm.training.distributed import ALONE, Processes


class Bound(nn.Module):
    """`negative_bound` as a module, which is what DDP, FSDP2 and torch.compile take hold of."""

    def __init__(self, model: Model, frozen: int) -> None:
        super().__init__()
        self.model, self.frozen = model, frozen

    def forward(self, tokens: Int[Tensor, "B T"], noise: Float[Tensor, "B T d"] | None) -> Float[Tensor, " B"]:
        """Nats per sequence, for a loss that weights all of them alike."""
        return negative_bound(self.model, tokens, noise=noise, frozen=self.frozen, equal_cotangents=True)


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
        model: Model,
        run: RunConfig,
        processes: Processes = ALONE,
        *,
        frozen: int = 0,
        mesh: DeviceMesh | None = None,
    ) -> None:
        self.model, self.run, self.processes = model, run, processes
        self.sharded = processes.world > 1 and run.train.parallel == "fsdp"
        # shards are not on their device yet
        device = processes.device if self.sharded else next(model.parameters()).device
        self.compiled = compiles(run.train, processes, device)
        bound = Bound(model, frozen)
        self._prepare_layers(frozen)
        if self.sharded:
            _shard(bound, mesh or init_device_mesh(processes.device.type, (processes.world,)))
        elif self.compiled:
            vars(bound)["forward"] = torch.compile(bound.forward, fullgraph=True)
        self.module: nn.Module = bound
        if processes.world > 1 and not self.sharded:
            self.module = DistributedDataParallel(bound, gradient_as_bucket_view=True)

    def _prepare_layers(self, frozen: int) -> None:
        """Activation checkpointing of the Transformer layers that train, and their compilation under FSDP2, whose
        hooks between layers no graph can cross. It is `forward` that is replaced: names and hooks stay."""
        train = self.run.train
        for layer in _layers(self.model):
            vars(layer).pop("forward", None)
            if self.compiled and self.sharded:
                vars(layer)["forward"] = torch.compile(layer.forward, fullgraph=True)
        trained = self.model.prior.blocks[frozen:] if isinstance(self.model, TarFlowLM) else self.model
        for layer in _layers(trained) if train.checkpoint_activations else ():
            vars(layer)["forward"] = partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)

    def backward(self, tokens: Int[Tensor, "b T"], generator: torch.Generator) -> Tensor:
        """Gradients of the mean over the global batch, of which `tokens` are this process's rows; returns that mean,
        in nats per token."""
        train, processes = self.run.train, self.processes
        noise = self._noise(tokens, generator)
        parts = list(zip(tokens.chunk(train.accumulate), noise.chunk(train.accumulate), strict=True))
        total = torch.zeros((), device=tokens.device)
        for index, (part, part_noise) in enumerate(parts):
            with self._reducing(index + 1 == len(parts)):
                with torch.autocast(tokens.device.type, torch.bfloat16, enabled=train.precision == "bfloat16"):
                    bound = self.module(part, part_noise if part_noise.numel() else None)
                    loss = bound.mean() / tokens.shape[1] / len(parts)
                loss.backward()
            total = total + loss.detach()
        return processes.mean(total)

    def _noise(self, tokens: Tensor, generator: torch.Generator) -> Tensor:
        """This process's rows of the noise of the global batch; [b, 0] for the baseline, which has none."""
        if isinstance(self.model, TokenLM):
            return torch.empty(len(tokens), 0, device=tokens.device)
        rows, rank = len(tokens), self.processes.rank
        everyone = tokens.new_empty(self.processes.world * rows, tokens.shape[1])
        return posterior_noise(self.model, everyone, generator)[rank * rows : (rank + 1) * rows]

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
        self, model: Model, tokens: Int[Tensor, "B T"], *, samples: int, generator: torch.Generator, given: int
    ) -> Float[Tensor, "1 B"]:
        """`log_importance_weights` for one sample, its rows shared out over the processes."""
        assert samples == 1, "training looks at one sample"
        assert given == 0, "and at fresh contexts"
        noise = None if isinstance(model, TokenLM) else posterior_noise(model, tokens, generator)
        each = -(-len(tokens) // self.processes.world)
        # the last process may have fewer: it repeats a row, for all must take part in every collective
        rows = (self.processes.rank * each + torch.arange(each, device=tokens.device)).clamp(max=len(tokens) - 1)
        own = None if noise is None else noise[rows]
        if self.sharded:
            nats = self.module(tokens[rows], own)
            assert isinstance(self.module, FSDPModule)
            # what follows may read parameters
            self.module.reshard()
        else:
            nats = negative_bound(model, tokens[rows], noise=own)
        return -self.processes.gather(nats)[None, : len(tokens)]

    def whole(self) -> Model:
        """The model with whole parameters: itself, or under FSDP2 a copy in memory. All processes take part."""
        if not self.sharded:
            return self.model
        config = self.model.config
        blocks = self.model.num_blocks if isinstance(self.model, TarFlowLM) else 0
        with seeded(0):
            copy = build_model(config.first_blocks(blocks) if isinstance(config, FlowConfig) else config)
        copy.load_state_dict(whole_weights(self.model))
        if isinstance(copy, TarFlowLM) and isinstance(config, FlowConfig):
            copy.config = config
        return copy


def _layers(module: nn.Module) -> list[Layer]:
    return [m for m in module.modules() if isinstance(m, Layer)]


def _shard(bound: Bound, mesh: DeviceMesh) -> None:
    """FSDP2, in place: a Transformer layer or a head is gathered when its turn comes, the small rest for the whole
    step."""
    heads = [bound.model.head] if isinstance(bound.model, TokenLM) else []
    for module in [*_layers(bound), *(m for m in bound.modules() if isinstance(m, Coupling)), *heads]:
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
