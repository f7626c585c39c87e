"""Training speed of presets against the discrete baseline: paired, interleaved, in one run."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from tarflowlm.checkpoint import Model, build_model
from tarflowlm.device import DeviceName, pick_device
from tarflowlm.errors import UserError
from tarflowlm.model import FlowConfig, TarFlowLM, seeded
from tarflowlm.presets import preset
from tarflowlm.training.config import RunConfig
from tarflowlm.training.loop import optimizer_step
from tarflowlm.training.optim import build_optimizers
from tarflowlm.training.progressive import freeze_below


@dataclass(frozen=True)
class Args:
    """Tokens per second of a training step, as ratios to the first preset, from interleaved rounds."""

    presets: tuple[str, ...] = ("mini-ar", "mini-mixd", "mini-mix1", "mini-affine")
    """The first is the yardstick. Progressive presets are timed stage by stage."""
    rounds: int = 7
    """Rounds; every round times each of them once, in turn."""
    steps: int = 2
    """Optimiser steps per timing."""
    vocab_size: int = 27
    """Symbols of the random tokens that are trained on."""
    threads: int | None = None
    """CPU threads; the default is PyTorch's."""
    compile: bool = False
    """Compile the step with torch.compile (needs a compiler)."""
    device: DeviceName = "auto"
    """auto takes cuda, then mps, then cpu."""
    json: bool = False
    """Print one JSON object last."""


def run(args: Args) -> dict[str, Any]:
    """{"rows": [{"name", "tokens_per_second", "ratio", "milliseconds"}], ...}; ratio is to the first row.

    Medians over rounds; the ratio is the median of the rounds' own ratios, so that a slow moment of the machine
    touches both sides of it.
    """
    if args.rounds < 1 or args.steps < 1 or not args.presets:
        raise UserError(f"rounds {args.rounds}, steps {args.steps}, presets {args.presets}: each needs at least 1")
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    device = pick_device(args.device)
    contenders = {}
    for name in args.presets:
        for label, step, num_tokens in _contenders(preset(name), args, device):
            contenders[label] = (step, num_tokens)
    for step, _ in contenders.values():
        step()
        step()
    seconds: dict[str, list[float]] = {label: [] for label in contenders}
    for _ in range(args.rounds):
        for label, (step, _) in contenders.items():
            seconds[label].append(_time(step, args.steps, device))
    yardstick = next(iter(contenders))
    per_token = {label: [s / contenders[label][1] for s in times] for label, times in seconds.items()}
    rows = [
        {
            "name": label,
            "tokens_per_second": 1 / statistics.median(times),
            "milliseconds": 1000 * statistics.median(seconds[label]),
            "ratio": statistics.median(a / b for a, b in zip(per_token[yardstick], times, strict=True)),
        }
        for label, times in per_token.items()
    ]
    return {"rows": rows, "device": str(device), "threads": torch.get_num_threads(), "torch": torch.__version__}


def _contenders(run: RunConfig, args: Args, device: torch.device) -> list[tuple[str, Callable[[], None], int]]:
    """A training step for every stage of a preset, and the tokens it takes."""
    model_config = replace(run.model, vocab_size=args.vocab_size)
    found = []
    for stage in range(run.num_stages):
        config = model_config
        if run.num_stages > 1 and isinstance(config, FlowConfig):
            config = config.first_blocks(stage + 1)
        with seeded(run.seed):
            model = build_model(config).to(device)
        label = run.name if run.num_stages == 1 else f"{run.name} stage {stage + 1}"
        found.append((label, _step(model, run, stage, args, device), run.train.batch_size * config.context))
    return found


def _step(model: Model, run: RunConfig, stage: int, args: Args, device: torch.device) -> Callable[[], None]:
    if isinstance(model, TarFlowLM):
        freeze_below(model, stage)
    optimizers = build_optimizers(run.optim, model)
    generator = torch.Generator(device=device).manual_seed(0)
    tokens = torch.randint(
        args.vocab_size, (run.train.batch_size, run.model.context), generator=generator, device=device
    )
    take_step = torch.compile(optimizer_step) if args.compile else optimizer_step

    def step() -> None:
        take_step(model, optimizers, run, tokens, frozen=stage, generator=generator)

    return step


def _time(step: Callable[[], None], steps: int, device: torch.device) -> float:
    """Seconds per step."""
    _synchronize(device)
    start = time.perf_counter()
    for _ in range(steps):
        step()
    _synchronize(device)
    return (time.perf_counter() - start) / steps


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def print_result(result: dict[str, Any], console: Console) -> None:
    table = Table(title=f"training step, {result['device']}, {result['threads']} threads", title_justify="left")
    for column in ("", "tokens/s", "ms per step", "tokens/s over the first"):
        table.add_column(column, justify="left" if not column else "right")
    for row in result["rows"]:
        table.add_row(
            row["name"], f"{row['tokens_per_second']:,.0f}", f"{row['milliseconds']:.0f}", f"{row['ratio']:.2f}"
        )
    console.print(table)
