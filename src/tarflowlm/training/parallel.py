"""The loss and its gradients over several processes: the model replicated (DDP) or sharded (FSDP2).

A global batch gives the same step however it is divided: every process draws the noise of all sequences and uses its
own rows, the loss is a mean over equal parts, and gradients are averaged. Dropout alone differs: every process draws
its own.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from tarflowlm.config import RunConfig, TrainConfig
from tarflowlm.device import missing_for_compilation
from tarflowlm.evaluation.likelihood import Likelihood, evaluate
from tarflowlm.flow.couplings import Coupling
from tarflowlm.flow.transformer import Layer
from tarflowlm.language_model import LanguageModel, seeded
from tarflowlm.objective import log_importance_weights
from tarflowlm.training.distributed import ALONE, Processes


class Bound(nn.Module):
    """`LanguageModel.bound` as the forward of a module, which DDP, FSDP2 and torch.compile need."""

    def __init__(self, model: LanguageModel, frozen: int) -> None:
        super().__init__()
        self.model, self.frozen = model, frozen

    def forward(self, tokens: Int[Tensor, "B T"], noise: Float[Tensor, "B T d"]) -> Float[Tensor, " B"]:
        """The bound of every sequence, in nats."""
        return self.model.bound(tokens, noise, frozen=self.frozen)


def compiles(train: TrainConfig, processes: Processes, device: torch.device) -> bool:
    """Whether to compile the loss on `device`: `train.compile`, or if that is None, whether it helps and is possible.

    Warns if it would help but a compiler is missing.
    """
    if train.compile is not None:
        return train.compile
    if train.precision != "bfloat16" or device.type != "cuda":
        return False
    missing = missing_for_compilation(device)
    if missing and processes.first:
        warnings.warn(f"torch.compile needs {missing}, which is not installed: training without it", stacklevel=3)
    return not missing


class Engine:
    """The training loss of one stage and its gradients, over all processes.

    `module` maps tokens and noise to nats per sequence. Under FSDP2 the parameters of `model` are sharded in place
    (DTensors) over `mesh`, by default all processes. The first `frozen` blocks are evaluated without a graph; the
    caller must have frozen their parameters and the codebook before.
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
        # a model to be sharded is not on its device yet
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
        """Turn on activation checkpointing and dropout in the Transformer layers that train. Under FSDP2 also compile
        each layer: its hooks between layers break a larger graph."""
        trained = [layer for part in self.model.blocks_from(frozen) for layer in _layers(part)]
        for layer in _layers(self.model):
            layer.keeps_activations = not (self.run.train.checkpoint_activations and layer in trained)
            layer.dropout = self.run.train.dropout if layer in trained else 0.0
            if self.compiled and self.sharded:
                layer.compile(fullgraph=True)

    def backward(self, tokens: Int[Tensor, "B T"], generator: torch.Generator) -> Tensor:
        """Compute the gradients of the mean loss over the global batch; returns that mean, in nats per token.

        `tokens` are this process's rows of the batch. `generator` draws the noise of the whole batch, so it must be
        in the same state in all processes. Collective.
        """
        train, processes = self.run.train, self.processes
        rows = self.processes.rank * len(tokens)
        # every process draws the noise of the whole batch and uses its own rows
        global_batch = tokens.new_empty(processes.world * len(tokens), tokens.shape[1])
        noise = self.model.draw_noise(global_batch, generator)[rows : rows + len(tokens)]
        parts = list(zip(tokens.chunk(train.accumulate), noise.chunk(train.accumulate), strict=True))
        total = torch.zeros((), device=tokens.device)
        with self._dropping(generator):
            for index, (part, part_noise) in enumerate(parts):
                with self._reducing(index + 1 == len(parts)):
                    with torch.autocast(tokens.device.type, torch.bfloat16, enabled=train.precision == "bfloat16"):
                        bound = self.module(part, part_noise)
                        loss = bound.mean() / tokens.shape[1] / len(parts)
                    loss.backward()
                total = total + loss.detach()
        return processes.mean(total)

    @contextmanager
    def _dropping(self, generator: torch.Generator) -> Iterator[None]:
        """Seeds what dropout draws, from `generator` and differently in every process, so that runs can be repeated.

        Dropout knows no generators: it draws from PyTorch's global ones, whose states are restored afterwards.
        """
        if not self.run.train.dropout:
            yield
            return
        seed = int(torch.randint(2**62, (), generator=generator, device=generator.device)) + self.processes.rank
        device = self.model.device
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(seed)
            yield

    def _reducing(self, last: bool) -> AbstractContextManager[None]:
        """The context of one accumulated part. DDP reduces gradients only with the last part, FSDP2 with every part,
        since otherwise it would have to hold whole gradients."""
        ddp = isinstance(self.module, DistributedDataParallel)
        return nullcontext() if last or not ddp else self.module.no_sync()  # type: ignore[operator]

    def evaluate(
        self,
        windows: Int[Tensor, "windows T"],
        characters_per_token: Tensor,
        progress: Callable[[int, int], None] | None = None,
    ) -> Likelihood:
        """The bound over `windows`, with the rows of every batch divided between the processes. Collective; all
        processes get the same result. Arguments as `evaluation.likelihood.evaluate`."""
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
        """`log_importance_weights` for one sample, with the rows divided between the processes."""
        assert samples == 1, "training evaluates with one posterior sample"
        assert given == 0, "training evaluates windows with fresh contexts"
        noise = model.draw_noise(tokens, generator)
        each = -(-len(tokens) // self.processes.world)
        # the last process may have fewer rows and repeats one, since all must take part in every collective
        rows = (self.processes.rank * each + torch.arange(each, device=tokens.device)).clamp(max=len(tokens) - 1)
        if self.sharded:
            nats = self.module(tokens[rows], noise[rows])
            assert isinstance(self.module, FSDPModule)
            # later code may read the parameters
            self.module.reshard()
        else:
            nats = model.bound(tokens[rows], noise[rows])
        return -self.processes.gather(nats)[None, : len(tokens)]

    def whole(self) -> LanguageModel:
        """The model with whole parameters: `model` itself, or under FSDP2 a copy on the CPU. Collective."""
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
    """Apply FSDP2 in place: Transformer layers and heads are gathered one at a time, the small rest for the whole
    step."""
    heads = [m for m in bound.modules() if isinstance(m, Coupling) or m is getattr(bound.model, "head", None)]
    for module in [*_layers(bound), *heads]:
        fully_shard(module, mesh=mesh)
        if isinstance(module, Coupling):
            # the last block uses only `log_prob`
            register_fsdp_forward_method(module, "log_prob")
    fully_shard(bound, mesh=mesh, reshard_after_forward=False)


def whole_weights(model: nn.Module, *, keep: bool = True) -> dict[str, Tensor]:
    """The state dict with whole tensors on the CPU. Collective under FSDP2; without `keep` the result is empty."""
    weights = {}
    for name, tensor in model.state_dict().items():
        full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if keep:
            weights[name] = full.detach().cpu()
    return weights
