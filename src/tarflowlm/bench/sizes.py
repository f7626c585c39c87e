"""Requirements of the large presets: memory per GPU, largest batch, FLOPs and hours. Nothing is computed.

A whole training step (forward, backward, clipping, Muon and AdamW) of the real modules runs on fake tensors
(`standin.py`), sharded by FSDP2 among simulated processes, in the preset's precision. Every storage counts from its
creation to its release, rounded up to 512 bytes as by the CUDA allocator (`tracking.py`): weights, gradients,
optimiser states, gathered weights, activations and temporaries. Not counted are the CUDA context, NCCL's buffers,
fragmentation, and autocast's cache of weights. Attention counts as fused. Memory is affine in the batch, once
activations set the peak: two batches determine the line, and a third one between them checks it.
"""

import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from rich.console import Console
from torch import Tensor
from torch.distributed.tensor import DTensor

from tarflowlm.bench.arguments import SizesArgs
from tarflowlm.bench.standin import device, fake_tensors, simulated_processes, to_fake
from tarflowlm.bench.tracking import Usage, tracked
from tarflowlm.errors import UserError
from tarflowlm.evaluation.flops import forward_flops, training_flops
from tarflowlm.flow.transformer import TransformerConfig
from tarflowlm.runs.config import RunConfig
from tarflowlm.runs.presets import PAPER_PRESETS, preset
from tarflowlm.terminal.bars import StageProgress, no_progress
from tarflowlm.terminal.tables import column_table
from tarflowlm.training.distributed import Processes
from tarflowlm.training.guards import Guard
from tarflowlm.training.optim import build_optimizers
from tarflowlm.training.parallel import Engine
from tarflowlm.training.step import optimizer_step

VOCABULARY = {"text8": 27, "owt": 50_257}
WORLDS = (1, 8, 64)
XL_TRUNK = TransformerConfig(width=1600, num_heads=25)
"""The width and heads of GPT-2 XL, which has 48 layers: four times those of the presets."""


def run(args: SizesArgs, progress: StageProgress = no_progress) -> dict[str, Any]:
    """{"rows": [a row for every stage], ...}; see `stage_size`. Raises UserError for presets of another size."""
    rows = []
    stages = [(config, stage) for config in _runs(args) for stage in range(config.num_stages)]
    for done, (config, stage) in enumerate(stages):
        progress("stages of the large presets", done, len(stages))
        row = stage_size(config, stage, memory=args.memory)
        tokens = config.train.stage_steps[stage] * config.train.batch_size * config.model.context
        speed = args.gpus * args.peak_tflops * 1e12 * args.utilisation
        rows.append(row | {"tokens": tokens, "hours": tokens * row["training_flops"] / speed / 3600})
    given = {"gpus": args.gpus, "utilisation": args.utilisation, "memory": args.memory}
    return {"rows": rows, **given, "peak_tflops": args.peak_tflops, "torch": torch.__version__}


def _runs(args: SizesArgs) -> Iterator[RunConfig]:
    for name in args.presets:
        config, corpus = preset(name), name.split("-")[0]
        if corpus not in VOCABULARY:
            raise UserError(f"preset {name}: choose among {', '.join(PAPER_PRESETS)}")
        model: Any = replace(config.model, vocab_size=VOCABULARY[corpus])
        yield replace(config, model=model)
        if args.xl and corpus == "owt":
            yield replace(config, name=f"{name} 1.5 B", model=replace(model, trunk=XL_TRUNK).deepened(4))


def stage_size(config: RunConfig, stage: int, *, memory: float, worlds: tuple[int, ...] = WORLDS) -> dict[str, Any]:
    """Requirements of one stage of a run; GB are 1e9 bytes, and `memory` is that of one GPU in GB.

    - parameters, and weights, gradients and optimiser states of a single process;
    - activations per sequence, with and without checkpointing;
    - `off_line`, the relative error of the line at the third batch;
    - for every number of GPUs in `worlds`: sequences per pass and GPU, passes per optimiser step, the peak, and the
      largest number of sequences that fit;
    - FLOPs per token, full and the paper's;
    - the largest tensor of a step on the middle number of GPUs, without accumulation.
    """
    model = config.model_of_stage(stage)
    whole, middle = config.train.batch_size, worlds[len(worlds) // 2]
    share = max(4, whole // middle)
    _, *found = measured(config, stage, middle, (share // 2, share, 3 * share // 4))
    fixed, alone = measured(config, stage, 1, (share // 2,))
    line = _line(share, found[0].peak, found[1].peak)
    slope = line(1) - line(0)
    _, *less = measured(config, stage, middle, (share // 2, share), checkpointed=True)
    checkpointed = _line(share, less[0].peak, less[1].peak)
    rows = []
    at = share // 2
    for world in worlds:
        known, own = {1: [alone], middle: found}.get(world), max(1, whole // world)
        half, *full = known or measured(config, stage, world, (at, own))[1:]
        on = _on(world, whole, half.peak - slope * at, slope, memory * 1e9, fixed.gradients / world)
        if world > middle and on["accumulate"] == 1:
            # with so few sequences, activations may not set the peak
            on["peak_gb"] = full[0].peak / 1e9
        rows.append(on)
    return {
        "name": config.name,
        "stage": stage + 1,
        "stages": config.num_stages,
        "parameters": fixed.parameters,
        "weights_gb": fixed.weights / 1e9,
        "gradients_gb": fixed.gradients / 1e9,
        "optimizer_gb": fixed.optimizer / 1e9,
        "gb_per_sequence": slope / 1e9,
        "checkpointed_gb_per_sequence": (checkpointed(1) - checkpointed(0)) / 1e9,
        "checkpointed_largest_batch": _fits(checkpointed(0), checkpointed(1) - checkpointed(0), memory * 1e9),
        "off_line": abs(line(3 * share // 4) / found[2].peak - 1),
        "worlds": rows,
        "training_flops": training_flops(model, frozen=stage) / model.context,
        "paper_flops": forward_flops(model, "paper") / model.context,
        "largest": {
            "gb": found[1].largest / 1e9, "shape": found[1].shape, "operator": found[1].operator, "sequences": share,
        },
    }  # fmt: skip


def _line(share: int, half: int, full: int) -> Callable[[int], float]:
    """Bytes by sequences, through the peaks at half and all of `share`."""
    slope = (full - half) / (share - share // 2)
    return lambda batch: full + slope * (batch - share)


def _fits(fixed: float, slope: float, memory: float) -> int:
    return max(0, int((memory - fixed) // slope))


def _on(world: int, batch: int, fixed: float, slope: float, memory: float, gradients: float) -> dict[str, Any]:
    """On `world` GPUs: the share of the global batch in as few passes as fit, which keep their gradients."""
    share = max(1, batch // world)
    largest = _fits(fixed, slope, memory)
    passes, each = 1, share
    if share > largest:
        room = _fits(fixed + gradients, slope, memory)
        each = max((n for n in range(1, room + 1) if share % n == 0), default=1)
        passes, fixed = share // each, fixed + gradients
    peak = (fixed + slope * each) / 1e9
    return {"gpus": world, "batch": each, "accumulate": passes, "peak_gb": peak, "largest_batch": largest}


@dataclass(frozen=True)
class Held:
    """Bytes that one process holds between steps (its shards), and the number of parameters of the whole model."""

    parameters: int
    weights: int
    gradients: int
    optimizer: int


def measured(
    config: RunConfig, stage: int, world: int, batches: tuple[int, ...], *, checkpointed: bool = False
) -> tuple[Any, ...]:
    """A `Held`, then for every batch of a process the `Usage` of an optimiser step."""
    train = replace(config.train, parallel="fsdp", checkpoint_activations=checkpointed, compile=False, accumulate=1)
    # as on an H100
    config = replace(config, train=train, optim=replace(config.optim, muon_precision="bfloat16"))
    # before the first backward pass of this process, or autograd does not notice the device
    standin = device()
    with torch.device("meta"):
        model = config.model_of_stage(stage).build()
    count = sum(p.numel() for p in model.parameters())
    with simulated_processes(world) as mesh, fake_tensors():
        to_fake(model, standin).train_only(stage)
        engine = Engine(model, config, Processes(0, world, standin), frozen=stage, mesh=mesh)
        optimizers = build_optimizers(config.optim, model)

        def step(batch: int) -> None:
            tokens = torch.zeros(batch, config.model.context, dtype=torch.long, device=standin)
            # the device has no generators, and needs none
            optimizer_step(engine, optimizers, tokens, generator=None, guard=Guard(deferred=True))  # type: ignore[arg-type]

        step(1)
        weights = [_local(p) for p in model.parameters()]
        states = [
            _local(value)
            for optimizer in optimizers
            for state in optimizer.state.values()
            for value in state.values()
            if isinstance(value, Tensor)
        ]
        usages: list[Usage] = []
        for batch in batches:
            # tensors in reference cycles would count for the next batch
            gc.collect()
            with tracked(standin, [weights, states, list(model.buffers())]) as usage:
                step(batch)
            usages.append(usage)
        gradients = [_local(p) for p in model.parameters() if p.requires_grad]
        held = Held(count, *map(_bytes, (weights, gradients, states)))
    return held, *usages


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local().detach() if isinstance(tensor, DTensor) else tensor.detach()


def _bytes(tensors: list[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def print_result(result: dict[str, Any], console: Console) -> None:
    """The tables of `run`'s result."""
    worlds = [row["gpus"] for row in result["rows"][0]["worlds"]]
    memory = column_table(
        f"GB per GPU under FSDP2, of {result['memory']:g}: peak (passes x sequences of a step on each GPU)",
        ("", *(f"{n} GPU{'s' if n > 1 else ''}" for n in worlds), "a sequence", "most sequences", "recomputed"),
    )
    work = column_table(
        f"on {result['gpus']} GPUs at {result['utilisation']:.0%} of {result['peak_tflops']:g} TFLOP/s",
        ("", "M parameters", "GFLOP a token", "hours", "largest tensor, GB", "its shape"),
    )
    for row in result["rows"]:
        label = row["name"] if row["stages"] == 1 else f"{row['name']} {row['stage']}"
        peaks = (f"{on['peak_gb']:.1f} ({on['accumulate']}x{on['batch']})" for on in row["worlds"])
        middle = row["worlds"][len(worlds) // 2]
        memory.add_row(
            label, *peaks, f"{row['gb_per_sequence']:.3f}", str(middle["largest_batch"]),
            str(row["checkpointed_largest_batch"]),
        )  # fmt: skip
        shape = "x".join(str(n) for n in row["largest"]["shape"])
        work.add_row(
            label, f"{row['parameters'] / 1e6:,.1f}", f"{row['training_flops'] / 1e9:.2f}", f"{row['hours']:.1f}",
            f"{row['largest']['gb']:.2f}", shape,
        )  # fmt: skip
    worst = max(row["off_line"] for row in result["rows"])
    console.print(memory, f"memory is a line in the batch; a third batch misses it by at most {worst:.1%}", work)
