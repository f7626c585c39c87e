"""Speed of generation: sweeps against steps in every block, and models against the first one."""

import statistics
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from tarflowlm.baseline import BaselineConfig
from tarflowlm.bench.arguments import GenerationArgs
from tarflowlm.bench.measure import median_ratio, seconds_per_call
from tarflowlm.bench.peers import gpt2, llama, sampler
from tarflowlm.choices import Decoder
from tarflowlm.device import pick_device
from tarflowlm.errors import UserError
from tarflowlm.generation import Generation, generate
from tarflowlm.generation.generate import num_ticks
from tarflowlm.generation.inversion import Decoders, invert_block, invert_stack
from tarflowlm.language_model import LanguageModel
from tarflowlm.model import TarFlowLM, as_flow
from tarflowlm.runs.checkpoint import load_checkpoint
from tarflowlm.terminal.bars import StageProgress, no_progress, ticker


def run(args: GenerationArgs, progress: StageProgress = no_progress) -> dict[str, Any]:
    """{"blocks", "models", "positions", "identical"}: lists of rows, see `print_result`.

    Numbers are medians over rounds, ratios medians of the rounds' own ratios (`median_ratio`).
    Raises UserError as `load_checkpoint` and `generate`.
    """
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    device = pick_device(args.device)
    last = [d.name for d in args.directories]
    names = last if len(set(last)) == len(last) else [str(d) for d in args.directories]
    models = {n: load_checkpoint(d, device).model for n, d in zip(names, args.directories, strict=True)}
    flows = {name: as_flow(m) for name, m in models.items() if not m.is_exact}
    return {
        "models": [row for batch in args.batches for row in _models(models, args, batch, progress)],
        "blocks": [
            row
            for name, m in flows.items()
            for batch in args.batches
            for row in _blocks(name, m, args, batch, progress)
        ],
        "positions": [_positions(name, m, args, progress) for name, m in models.items()],
        "identical": [_identical(name, m, args, progress) for name, m in flows.items()] if args.seeds else [],
        "device": str(device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def _rounds(
    contenders: Mapping[str, Callable[[], object]],
    rounds: int,
    device: torch.device,
    progress: Callable[[int, int], None],
) -> dict[str, list[float]]:
    """Seconds of each contender in each round."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for index in range(rounds + 1):
        progress(index, rounds + 1)
        for name, call in contenders.items():
            elapsed = seconds_per_call(call, 1, device)
            if index:  # the first round warms up
                seconds[name].append(elapsed)
    return seconds


def _length(model: LanguageModel, args: GenerationArgs) -> int:
    return args.length or model.config.context


def _decoders(model: LanguageModel) -> dict[str, Decoders]:
    """The ways to decode this model that are compared: name -> `decoder` of `generate`."""
    if model.is_exact:
        return {"steps": "sequential"}
    above: list[Decoder] = ["parallel"] * (model.num_blocks - 1)
    ways: dict[str, Decoders] = {"steps": "sequential", "steps below sweeps": (*above, "sequential"), "auto": "auto"}
    if as_flow(model).draft is not None:
        ways["drafted"] = "drafted"
    if not above:
        del ways["steps below sweeps"]
    return ways


def _models(
    models: dict[str, LanguageModel], args: GenerationArgs, batch: int, progress: StageProgress
) -> list[dict[str, Any]]:
    contenders: dict[str, Callable[[], object]] = {}
    tokens: dict[str, int] = {}
    chosen: dict[str, Generation] = {}

    def add(name: str, length: int, call: Callable[[], object]) -> None:
        contenders[name], tokens[name] = call, batch * length

    for name, model in models.items():
        length = _length(model, args)
        for way, decoder in _decoders(model).items():
            for compiled in (False, True) if args.compile else (False,):
                key = f"{name} {way}{' compiled' if compiled else ''}"

                def call(
                    model: LanguageModel = model,
                    length: int = length,
                    decoder: Decoders = decoder,
                    key: str = key,
                    compiled: bool = compiled,
                ) -> None:
                    chosen[key] = generate(
                        model,
                        num_tokens=length,
                        num=batch,
                        decoder=decoder,
                        compile=compiled,
                        generator=torch.Generator().manual_seed(0),
                    )

                add(key, length, call)
    device = pick_device(args.device)
    if args.peers:
        for name, sample in _peers(next(iter(models.values())), device).items():
            length = _length(next(iter(models.values())), args)
            add(name, length, partial(sample, batch, length))
    seconds = _rounds(contenders, args.rounds, device, partial(progress, f"models, batch {batch}, rounds"))
    per_token = {name: [s / tokens[name] for s in times] for name, times in seconds.items()}
    reference = next(iter(per_token.values()))
    return [
        {
            "name": name,
            "batch": batch,
            "tokens_per_second": 1 / statistics.median(times),
            "ratio": median_ratio(reference, times),
            "decoders": chosen[name].decoders if name in chosen else (),
            "passes": chosen[name].sweeps if name in chosen else (),
        }
        for name, times in per_token.items()
    ]


def _peers(model: LanguageModel, device: torch.device) -> dict[str, Callable[[int, int], Tensor]]:
    """Samplers of a GPT-2 and a Llama in the shape of the baseline `model`. UserError for another model."""
    config = model.config
    if not isinstance(config, BaselineConfig) or config.patch > 1:
        raise UserError("--peers compares with a baseline without patches: name one first, like english-mini-ar")
    made = {"GPT-2": gpt2(config), "Llama": llama(config)}
    return {
        f"{name} (transformers)": sampler(peer.to(device).eval(), config.vocab_size) for name, peer in made.items()
    }


@torch.no_grad()
def _blocks(
    name: str, model: TarFlowLM, args: GenerationArgs, batch: int, progress: StageProgress
) -> list[dict[str, Any]]:
    padded = -(-_length(model, args) // model.config.patch) * model.config.patch
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(batch, padded, model.config.latent_dim, generator=generator).to(model.codebook.mean)
    states, work = invert_stack(model, noise, decoder="parallel")
    rows = []
    for state, done, index in zip(states, work, reversed(range(model.num_blocks)), strict=False):
        block, u = model.prior.block(index), model.prior.patch(state)[0]
        seconds = _rounds(
            {way: partial(invert_block, block, u, decoder=way) for way in ("sequential", "parallel")},
            args.rounds,
            noise.device,
            partial(progress, f"block {index + 1} of {name}, batch {batch}, rounds"),
        )
        by_step, by_sweep = seconds["sequential"], seconds["parallel"]
        rows.append(
            {
                "name": name,
                "block": index + 1,
                "coupling": model.config.blocks[index].coupling,
                "batch": batch,
                "steps_seconds": statistics.median(by_step),
                "sweeps_seconds": statistics.median(by_sweep),
                "sweeps": done.passes,
                "repeated": done.repeated,
                "speedup": median_ratio(by_step, by_sweep),
            }
        )
    return rows


def _positions(name: str, model: LanguageModel, args: GenerationArgs, progress: StageProgress) -> dict[str, Any]:
    """Milliseconds per position in the four quarters of a sample by steps; of block 1, or the baseline."""
    marks: list[float] = []
    batch = max(args.batches)
    for i in range(2):  # the first warms up
        progress(f"positions of {name}, samples", i, 2)
        marks.clear()
        generate(
            model,
            num_tokens=_length(model, args),
            num=batch,
            generator=torch.Generator().manual_seed(0),
            tick=lambda: marks.append(time.perf_counter()),
        )
    positions = -(-_length(model, args) // model.config.patch)
    last = torch.tensor(marks[-positions:], dtype=torch.float64).diff()
    quarters = [1000 * part.median().item() for part in last.chunk(4)]
    return {"name": name, "batch": batch, "milliseconds": quarters, "last_over_first": quarters[-1] / quarters[0]}


def _identical(name: str, model: TarFlowLM, args: GenerationArgs, progress: StageProgress) -> dict[str, Any]:
    """How many tokens differ from those by steps: with sweeps in every block, and with the automatic choice."""
    texts = {}
    drafted = ("drafted",) if model.draft is not None else ()
    for decoder in ("sequential", "parallel", "auto", *drafted):
        what = f"{args.seeds} samples of {name}, {decoder}, positions"
        found = generate(
            model,
            num_tokens=_length(model, args),
            num=args.seeds,
            decoder=decoder,
            generator=torch.Generator().manual_seed(1),
            tick=ticker(progress, what, num_ticks(model, _length(model, args))),
        )
        texts[decoder] = found.tokens
    return {
        "name": name,
        "seeds": args.seeds,
        "tokens": texts["sequential"].numel(),
        "differ_parallel": int((texts["parallel"] != texts["sequential"]).sum()),
        "differ_auto": int((texts["auto"] != texts["sequential"]).sum()),
        "differ_drafted": int((texts["drafted"] != texts["sequential"]).sum()) if drafted else None,
    }


def print_result(result: dict[str, Any], console: Console) -> None:
    """The tables of `run`'s result."""
    title = f"generation, {result['device']}, {result['threads']} threads"
    columns = ("", "batch", "tokens/s", "over the first", "blocks L..1", "passes")
    models = Table(*columns, title=title, title_justify="left")
    for row in result["models"]:
        decoders = " ".join(d[:3] for d in row["decoders"])
        rate, ratio = f"{row['tokens_per_second']:,.0f}", f"{row['ratio']:.2f}"
        models.add_row(row["name"], str(row["batch"]), rate, ratio, decoders, " ".join(map(str, row["passes"])))
    blocks = Table(
        "", "block", "batch", "steps, s", "sweeps, s", "faster", "sweeps", title="by block", title_justify="left"
    )
    for row in result["blocks"]:
        seconds = (f"{row['steps_seconds']:.3f}", f"{row['sweeps_seconds']:.3f}", f"{row['speedup']:.1f} x")
        blocks.add_row(
            row["name"], f"{row['block']} {row['coupling']}", str(row["batch"]), *seconds, str(row["sweeps"])
        )
    places = Table("", "ms per position, by quarter", "last / first", title="by position", title_justify="left")
    for row in result["positions"]:
        quarters = "  ".join(f"{m:.2f}" for m in row["milliseconds"])
        places.add_row(row["name"], quarters, f"{row['last_over_first']:.2f}")
    for table in (models, blocks, places):
        console.print(table)
    for row in result["identical"]:
        console.print(
            f"{row['name']}: {row['seeds']} samples, {row['tokens']:,} tokens; different from steps: "
            f"{row['differ_parallel']} by sweeps, {row['differ_auto']} by the automatic choice"
            + ("" if row["differ_drafted"] is None else f", {row['differ_drafted']} by drafts"),
            markup=False,
        )
