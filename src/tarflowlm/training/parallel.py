"""Training in one process or in several, with the model replicated (DDP) or sharded (FSDP2).

A global batch gives the same step however it is divided: every process draws the noise of all
sequences and uses its own rows, the loss is a mean over equal parts, and gradients are averaged.
Only dropout differs: every process draws its own.
"""

import hashlib
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from tarflowlm.config import TrainConfig
from tarflowlm.device import compilation_problem
from tarflowlm.errors import UserError
from tarflowlm.flow.couplings import Coupling
from tarflowlm.flow.numerics import choose_maps
from tarflowlm.flow.transformer import Layer
from tarflowlm.model import LanguageModel, seeded
from tarflowlm.processes import ALONE, Processes


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
    Under FSDP2 the trained parameters of `model` are sharded in place. `compiled` compiles every
    Transformer layer, where layers of one shape share a graph, and the maps of every coupling and
    the loss of the baseline.
    """
    choose_maps(model, compiled=compiled)
    for module in model.modules():
        if isinstance(module, Layer):
            is_trained = any(parameter.requires_grad for parameter in module.parameters())
            module.keeps_activations = not (train.checkpoint_activations and is_trained)
            module.dropout = train.dropout if is_trained else 0.0
            if compiled:
                module.compile(fullgraph=True)
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

    If compilation does not work, this gives a warning, or is a UserError for those who ask for it.
    """
    by_default = train.precision == "bfloat16" and device.type == "cuda"
    if not (by_default if train.compile is None else train.compile):
        return False
    problem = compilation_problem(device.type)
    if problem and train.compile:
        what = f"train.compile True: torch.compile does not work here ({problem})"
        raise UserError(f"{what}; leave it out")
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


# FSDP2: parameters, gradients and the states of AdamW are sharded


def shard(bound: nn.Module, model: LanguageModel, processes: Processes, precision: str) -> None:
    """Shard the trained parameters of `model` in place; frozen ones stay whole.

    Layers, in `precision`, and couplings are gathered one at a time; the rest stays for a step.
    """
    # a warning for heads; harmless, since nothing here is changed in place
    warnings.filterwarnings("ignore", message=".*returned a view tensor")
    mesh = init_device_mesh(processes.device.type, (processes.world,))
    narrow = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    frozen = {p for p in model.parameters() if not p.requires_grad}
    for p in frozen:
        p.data = p.data.to(processes.device)
    # couplings contain the heads of a flow; the baseline's is used without a call of its own
    heads = [m for m in model.modules() if isinstance(m, Coupling)]
    for module in [*(m for m in model.modules() if isinstance(m, Layer)), *heads]:
        if not frozen.issuperset(module.parameters()):
            is_narrow = precision == "bfloat16" and isinstance(module, Layer)
            fully_shard(
                module,
                mesh=mesh,
                mp_policy=narrow if is_narrow else MixedPrecisionPolicy(),
                # the backward pass begins with the last head
                reshard_after_forward=module not in heads[-1:],
                ignored_params=frozen,
            )
        if isinstance(module, Coupling):  # the last block uses only one of these
            for method in ("log_prob", "token_log_prob"):
                if hasattr(module, method):
                    register_fsdp_forward_method(module, method)
    fully_shard(bound, mesh=mesh, reshard_after_forward=False, ignored_params=frozen)


def reshard(bound: nn.Module) -> None:
    """Free the parameters that FSDP2 gathered for a call without backward, so they can be read."""
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


def first_blocks(model: LanguageModel, num_blocks: int) -> LanguageModel:
    """A copy of the first blocks of a model on the CPU, with whole parameters. Collective."""
    with seeded(0):
        copy = model.config.first_blocks(num_blocks).build()
    weights = whole_weights(model)
    copy.load_state_dict({name: weights[name] for name in copy.state_dict()})
    copy.config = model.config
    return copy
