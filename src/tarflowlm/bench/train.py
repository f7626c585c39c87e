"""Training: speed and peak memory of presets against the discrete baseline, and scaling to two processes."""

import statistics
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from itertools import product
from multiprocessing import get_context
from typing import Any

import torch
from rich.console import Console

from tarflowlm.bench.arguments import TrainArgs
from tarflowlm.bench.measure import high_water_mark, median_ratio, seconds_per_call
from tarflowlm.bench.peers import peers, peers_table
from tarflowlm.bench.scaling import scaling
from tarflowlm.device import pick_device
from tarflowlm.evaluation.flops import training_flops
from tarflowlm.runs.config import RunConfig
from tarflowlm.runs.presets import preset
from tarflowlm.terminal.bars import StageProgress, no_progress
from tarflowlm.terminal.tables import column_table
from tarflowlm.training.muon import Muon
from tarflowlm.training.step import TrainingStep

PEAK_TFLOPS = {
    "H100 PCIe": 756.0, "H100": 989.0, "H200": 989.0, "B200": 2250.0, "A100": 312.0, "L40S": 362.0, "L4": 121.0,
    "RTX 4090": 165.0, "V100": 125.0,
}  # fmt: skip
"""Dense matrix products in half precision with float32 sums, as the maker states them; by a part of the name."""


@dataclass(frozen=True)
class _Contender:
    training: TrainingStep
    tokens: torch.Tensor
    num_tokens: int
    flops: int
    """Of one step."""

    def step(self) -> object:
        """One training step."""
        return self.training(self.tokens)

    def muon_seconds(self, device: torch.device) -> float:
        """Seconds of Muon's part of a step, after a backward pass that is not timed."""
        muon = [optimizer for optimizer in self.training.optimizers if isinstance(optimizer, Muon)]
        self.training.engine.backward(self.tokens, self.training.generator)
        seconds = sum(seconds_per_call(optimizer.step, 1, device) for optimizer in muon)
        self.training.engine.model.zero_grad(set_to_none=True)
        return seconds


def run(args: TrainArgs, progress: StageProgress = no_progress) -> dict[str, Any]:
    """{"rows": [{"name", "tokens_per_second", "ratio", "milliseconds", ...}], ...}; ratios are to the first row.

    Numbers are medians over rounds, ratios medians of the rounds' own ratios (`median_ratio`).
    Raises UserError as `peers`.
    """
    runs = {name: preset(name) for name in (*args.presets, *args.scaling_presets)}
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    device = pick_device(args.device)
    result: dict[str, Any] = {"device": _device_name(device), "threads": torch.get_num_threads()}
    result["torch"] = torch.__version__
    if args.peers:
        # first, because it may refuse the preset
        progress("GPT-2 and Llama", 0, 1)
        chosen = runs[args.presets[0]]
        result["peers"] = peers(chosen, args.vocab_size, rounds=args.rounds, steps=args.steps, device=device)
    result["rows"] = _speed(args, device, progress)
    if args.memory:
        result["memory"] = []
        for i, name in enumerate(args.presets):
            progress("peak memory, presets", i, len(args.presets))
            result["memory"].append({"name": name, "peak_gb": _peak(name, args)})
    if args.scaling:
        several = [runs[name] for name in args.scaling_presets]
        result["scaling"] = scaling(
            several,
            args.vocab_size,
            rounds=args.rounds,
            steps=args.steps,
            device=device,
            progress=lambda done, total: progress("one process, then two", done, total),
        )
    return result


def _speed(args: TrainArgs, device: torch.device, progress: StageProgress) -> list[dict[str, Any]]:
    contenders = {}
    for run, precision in product(map(preset, args.presets), args.muon):
        run = replace(run, optim=replace(run.optim, muon_precision=precision))
        for stage in range(run.num_stages):
            label = run.name if run.num_stages == 1 else f"{run.name} stage {stage + 1}"
            label = label if len(args.muon) == 1 else f"{label}, {precision}"
            contenders[label] = _contender(run, stage, args, device)
    for contender in contenders.values():
        contender.step()
        contender.step()
    seconds: dict[str, list[float]] = {label: [] for label in contenders}
    muon: dict[str, list[float]] = {label: [] for label in contenders}
    for i in range(args.rounds):
        progress("training steps, rounds", i, args.rounds)
        for label, contender in contenders.items():
            seconds[label].append(seconds_per_call(contender.step, args.steps, device))
            muon[label].append(contender.muon_seconds(device))
    reference = next(iter(contenders))
    per_token = {label: [s / contenders[label].num_tokens for s in times] for label, times in seconds.items()}
    peak = args.peak_tflops or _known_peak(device)
    return [
        {
            "name": label,
            "tokens_per_second": 1 / statistics.median(times),
            "milliseconds": 1000 * statistics.median(seconds[label]),
            "ratio": median_ratio(per_token[reference], times),
            "muon_share": median_ratio(muon[label], seconds[label]),
            "tflops": contenders[label].flops / statistics.median(seconds[label]) / 1e12,
            "mfu": contenders[label].flops / statistics.median(seconds[label]) / 1e12 / peak if peak else None,
        }
        for label, times in per_token.items()
    ]


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


def _known_peak(device: torch.device) -> float | None:
    name = _device_name(device)
    return next((peak for part, peak in PEAK_TFLOPS.items() if part in name), None)


def _contender(run: RunConfig, stage: int, args: TrainArgs, device: torch.device) -> _Contender:
    """A training step of one stage of a preset."""
    run = replace(run, model=replace(run.model, vocab_size=args.vocab_size))
    run = replace(run, train=replace(run.train, compile=args.compile))
    config = run.model_of_stage(stage)
    training = TrainingStep(run, stage, device)
    generator = torch.Generator(device=device).manual_seed(0)
    shape = (run.train.batch_size, config.context)
    tokens = torch.randint(config.vocab_size, shape, generator=generator, device=device)
    return _Contender(
        training=training,
        tokens=tokens,
        num_tokens=run.train.batch_size * config.context,
        flops=run.train.batch_size * training_flops(config, frozen=stage),
    )


def _peak(name: str, args: TrainArgs) -> float:
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as fresh:
        return fresh.submit(peak_memory, name, args).result()


def peak_memory(name: str, args: TrainArgs) -> float:
    """GB (1e9 bytes) by which training raises this process's peak: model, gradients, optimisers, activations.

    Of the stage that needs most. On a GPU this is the allocator's peak. Elsewhere it is that of the process, which
    must be a fresh one.
    """
    device = pick_device(args.device)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    # libraries load their kernels at first use: a tiny problem first keeps them out of the difference
    run = preset(name)
    tiny = replace(run, model=replace(run.model, context=8), train=replace(run.train, batch_size=1))
    for stage in range(run.num_stages):
        _contender(tiny, stage, args, device).step()
    before = high_water_mark()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated() / 1e9
    for stage in range(run.num_stages):
        contender = _contender(run, stage, args, device)
        for _ in range(3):
            contender.step()
        del contender
    after = torch.cuda.max_memory_allocated() / 1e9 if device.type == "cuda" else high_water_mark()
    return after - before


def print_result(result: dict[str, Any], console: Console) -> None:
    """The tables of `run`'s result."""
    columns = ("", "tokens/s", "ms per step", "over the first", "Muon's share")
    known = any(row["mfu"] is not None for row in result["rows"])
    table = column_table(
        f"training step, {result['device']}, {result['threads']} threads",
        (*columns, "TFLOP/s", "of the peak") if known else columns,
    )
    for row in result["rows"]:
        cells = [row["name"], f"{row['tokens_per_second']:,.0f}", f"{row['milliseconds']:.0f}", f"{row['ratio']:.2f}"]
        cells.append(f"{row['muon_share']:.0%}")
        if known:
            cells += [f"{row['tflops']:.3f}", "" if row["mfu"] is None else f"{row['mfu']:.1%}"]
        table.add_row(*cells)
    console.print(table)
    if "peers" in result:
        console.print(peers_table(result["peers"]))
    if "memory" in result:
        table = column_table("peak memory of training, GB", ("", "GB"))
        for row in result["memory"]:
            table.add_row(row["name"], f"{row['peak_gb']:.2f}")
        console.print(table)
    if "scaling" in result:
        table = column_table("the same batch in processes of one thread each", ("", "tokens/s", "over one process"))
        for row in result["scaling"]:
            table.add_row(row["name"], f"{row['tokens_per_second']:,.0f}", f"{row['ratio']:.2f}")
        console.print(table)
