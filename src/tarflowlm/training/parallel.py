"""The loss of a stage and its gradients, in one process or in several: the model replicated (DDP) or sharded (FSDP2).

A global batch gives the same step however it is divided: every process draws the noise of all sequences and uses its
own rows, the loss is a mean over equal parts, and gradients are averaged. Dropout alone differs: every process draws
its own.
"""

import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from tarflowlm.config import RunConfig, TrainConfig
from tarflowlm.device import missing_for_compilation
from tarflowlm.evaluation.likelihood import Likelihood, evaluate
from tarflowlm.flow.couplings import Coupling
from tarflowlm.flow.transformer import Layer
from tarflowlm.language_model import LanguageModel, seeded
from tarflowlm.progress import SILENT, Progress
from tarflowlm.training.processes import ALONE, Processes


class NegativeBound(nn.Module):
    """The negative bound as the forward of a module, as DDP, FSDP2 and torch.compile need it."""

    def __init__(self, model: LanguageModel, frozen: int) -> None:
        super().__init__()
        self.model, self.frozen = model, frozen

    def forward(self, tokens: Int[Tensor, "B T"], noise: Float[Tensor, "B T d"]) -> Float[Tensor, " B"]:
        """The negative bound of every sequence, in nats; the loss weights all of them equally."""
        return self.model.bound(tokens, noise, frozen=self.frozen)


def compiles(train: TrainConfig, processes: Processes, device: torch.device) -> bool:
    """True if the loss is to be compiled on `device`: `train.compile`, or by default where it helps and is possible.

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


class ParallelModel:
    """A model in training, over all processes: gradients of the loss on a global batch, and validation.

    The first `frozen` blocks are evaluated without a graph; the caller must have frozen their parameters and the
    codebook before (`LanguageModel.train_only`). `loss` maps tokens and noise to nats per sequence. Under FSDP2 the
    parameters of `model` are sharded in place (DTensors).
    """

    def __init__(
        self, model: LanguageModel, config: RunConfig, processes: Processes = ALONE, *, frozen: int = 0
    ) -> None:
        self.model, self.config, self.processes = model, config, processes
        self.sharded = processes.world > 1 and config.train.parallel == "fsdp"
        # a model to be sharded is not on its device yet
        self.compiled = compiles(config.train, processes, processes.device if self.sharded else model.device)
        self._prepare_layers(frozen)
        self.loss: nn.Module = NegativeBound(model, frozen)
        if self.sharded:
            shard(self.loss, model, processes, compiled=self.compiled)
            return
        if self.compiled:
            self.loss.compile(fullgraph=True)
        if processes.world > 1:
            self.loss = DistributedDataParallel(self.loss, gradient_as_bucket_view=True)

    def _prepare_layers(self, frozen: int) -> None:
        """Turn on activation checkpointing and dropout in the Transformer layers that train."""
        trained = [layer for part in self.model.blocks_from(frozen) for layer in _layers(part)]
        for layer in _layers(self.model):
            layer.keeps_activations = not (self.config.train.checkpoint_activations and layer in trained)
            layer.dropout = self.config.train.dropout if layer in trained else 0.0

    def backward(self, tokens: Int[Tensor, "B T"], generator: torch.Generator) -> Tensor:
        """Compute the gradients of the mean loss over the global batch; returns that mean, in nats per token.

        `tokens` are this process's rows of the batch. `generator` draws the noise of the whole batch, so it must be
        in the same state in all processes. Collective.
        """
        train, processes = self.config.train, self.processes
        first_row = processes.rank * len(tokens)
        global_batch = tokens.new_empty(processes.world * len(tokens), tokens.shape[1])
        noise = self.model.draw_noise(global_batch, generator)[first_row : first_row + len(tokens)]
        parts = list(zip(tokens.chunk(train.accumulate), noise.chunk(train.accumulate), strict=True))
        total = torch.zeros((), device=tokens.device)
        with self._seeded_dropout(generator):
            for index, (part, part_noise) in enumerate(parts):
                with self._reducing_gradients(last=index + 1 == len(parts)):
                    with torch.autocast(tokens.device.type, torch.bfloat16, enabled=train.precision == "bfloat16"):
                        loss = self.loss(part, part_noise).mean() / tokens.shape[1] / len(parts)
                    loss.backward()
                total = total + loss.detach()
        return processes.mean(total)

    @contextmanager
    def _seeded_dropout(self, generator: torch.Generator) -> Iterator[None]:
        """Seed dropout from `generator`, differently in every process, so that runs can be repeated.

        Dropout takes no generator: it draws from PyTorch's global ones, whose states are restored afterwards.
        """
        if not self.config.train.dropout:
            yield
            return
        seed = int(torch.randint(2**62, (), generator=generator, device=generator.device)) + self.processes.rank
        device = self.model.device
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(seed)
            yield

    def _reducing_gradients(self, *, last: bool) -> AbstractContextManager[None]:
        """The context of one accumulated part. DDP averages gradients over processes only with the last part, FSDP2
        with every part, since otherwise it would have to hold whole gradients."""
        ddp = isinstance(self.loss, DistributedDataParallel)
        return nullcontext() if last or not ddp else self.loss.no_sync()  # type: ignore[operator]

    def evaluate(
        self, windows: Int[Tensor, "W T"], characters_per_token: Tensor, progress: Progress = SILENT
    ) -> Likelihood:
        """The bound over `windows`, with the rows of every batch divided between the processes. Collective; all
        processes get the same result. Arguments as `evaluation.likelihood.evaluate`."""
        if self.processes.world == 1:
            return evaluate(self.model, windows, characters_per_token, progress=progress)
        return evaluate(self.model, windows, characters_per_token, weigh=self._divided_bound, progress=progress)

    def _divided_bound(
        self, model: LanguageModel, tokens: Int[Tensor, "B T"], *, generator: torch.Generator, **_options: Any
    ) -> Float[Tensor, "1 B"]:
        """The bound of every row from one posterior sample, with the rows divided between the processes."""
        noise = model.draw_noise(tokens, generator)
        each = -(-len(tokens) // self.processes.world)
        # the last process may have fewer rows and repeats one, since all must take part in every collective
        rows = (self.processes.rank * each + torch.arange(each, device=tokens.device)).clamp(max=len(tokens) - 1)
        loss = self.loss if self.sharded else NegativeBound(model, frozen=0)
        nats = loss(tokens[rows], noise[rows])
        if isinstance(loss, FSDPModule):
            # later code may read the parameters
            loss.reshard()
        return -self.processes.gather(nats)[None, : len(tokens)]

    def whole_model(self) -> LanguageModel:
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


# FSDP2: parameters, gradients and optimiser states are sharded. Nothing else here, in `optim` or in `state` depends
# on it; `muon` gathers the matrices that it orthogonalises.


def shard(loss: nn.Module, model: LanguageModel, processes: Processes, *, compiled: bool) -> None:
    """Shard the parameters of `model` in place over all processes; `loss` is the module that is called.

    Transformer layers and heads are gathered one at a time, the small rest for the whole step. Hooks between layers
    break a larger graph, so each layer is `compiled` on its own.
    """
    mesh = init_device_mesh(processes.device.type, (processes.world,))
    for layer in _layers(model):
        if compiled:
            layer.compile(fullgraph=True)
    # couplings contain the heads of a flow
    heads = [m for m in model.modules() if isinstance(m, Coupling) or m is getattr(model, "head", None)]
    for module in [*_layers(model), *heads]:
        fully_shard(module, mesh=mesh)
        if isinstance(module, Coupling):
            # the last block uses only `log_prob`
            register_fsdp_forward_method(module, "log_prob")
    fully_shard(loss, mesh=mesh, reshard_after_forward=False)


def whole_weights(model: nn.Module, *, keep: bool = True) -> dict[str, Tensor]:
    """The state dict with whole tensors on the CPU. Collective under FSDP2; without `keep` the result is empty."""
    weights = {}
    for name, tensor in model.state_dict().items():
        full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if keep:
            weights[name] = full.detach().cpu()
    return weights
