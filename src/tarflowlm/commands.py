"""What each command takes and does; `cli` finds the command and reports what went wrong."""

import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from rich.console import Console

from tarflowlm.checkpoint import load_checkpoint
from tarflowlm.console import (
    bar,
    print_json,
    print_samples,
    print_table,
    samples_to_json,
    sampling_bar,
)
from tarflowlm.data import TokenizerConfig, prepare_corpus
from tarflowlm.device import DeviceName, pick_device
from tarflowlm.errors import UserError
from tarflowlm.generation import generate
from tarflowlm.generation.stack import Decoder
from tarflowlm.presets import with_steps
from tarflowlm.quickstart import QuickstartArgs, run_quickstart
from tarflowlm.training.config import RunConfig, checked_seed


@dataclass(frozen=True)
class DataArgs:
    """Turn a corpus or text file into token shards."""

    source: tyro.conf.Positional[str]
    """english (built in), text8, openwebtext, or a .txt, .gz, .xz or .zst file."""
    out: Path
    """Directory to write."""
    tokenizer: Annotated[TokenizerConfig, tyro.conf.arg(name="")] = field(default_factory=TokenizerConfig)
    """How text becomes tokens."""
    json: bool = False
    """Print one JSON object last."""


@dataclass(frozen=True)
class TrainArgs:
    """Train a preset into a new directory; any field of its configuration can be overridden."""

    out: Path | None = None
    """Run directory to write; it must not exist. Required."""
    data: str | None = None
    """Corpus name, text file, or directory made by `tarflowlm data`."""
    steps: int | None = None
    """Optimiser steps in all, stages included; the stages keep their proportion."""
    device: DeviceName = "auto"
    """auto takes cuda, then mps, then cpu."""
    checkpoint_every: int | None = None
    """Steps between checkpoints."""
    json: bool = False
    """Print one JSON object last."""
    run: Annotated[RunConfig | None, tyro.conf.arg(name="")] = None
    """The preset's fields."""


@dataclass(frozen=True)
class ResumeArgs:
    """Continue a stopped run."""

    resume: Path
    """Run directory to continue."""
    device: DeviceName = "auto"
    """auto takes cuda, then mps, then cpu."""
    json: bool = False
    """Print one JSON object last."""


@dataclass(frozen=True)
class SampleArgs:
    """Let a trained model write."""

    directory: tyro.conf.Positional[Path]
    """Run directory."""
    num: int = 1
    """Samples."""
    length: int | None = None
    """Tokens per sample, the prompt included; the default is the trained context."""
    prompt: str | None = None
    """Text to continue. Exact for one block; an approximation for stacks (docs/math.md)."""
    seed: int = 0
    """Same seed, same text."""
    temperature: float = 1.0
    """Power 1 / temperature on the mixture weights of block 1; 1 is the model itself."""
    top_k: int | None = None
    """Keep the k most probable components or tokens."""
    top_p: float | None = None
    """Keep the smallest set of components or tokens that holds this probability."""
    decoder: Decoder = "auto"
    """How blocks are inverted: position by position, in parallel sweeps, or by what suits each block."""
    passes: bool = False
    """Show the text decoded after every block."""
    normalize: Literal["text8"] | None = None
    """Normalise the prompt first."""
    device: DeviceName = "auto"
    """auto takes cuda, then mps, then cpu."""
    json: bool = False
    """Print one JSON object last."""


def run_quickstart_command(args: QuickstartArgs) -> None:
    result = run_quickstart(args, Console(stderr=True), Console())
    if args.json:
        print_json(result)


def run_data(args: DataArgs) -> None:
    console = Console(stderr=True)
    with bar(console, f"characters of {args.source}", 1) as update:
        corpus = prepare_corpus(
            args.source, args.tokenizer, args.out, progress=lambda _part, done, total: update(done, total)
        )
    counts = {name: corpus.num_tokens(name) for name in ("train", "valid", "test")}
    result = {"out": str(args.out), "vocab_size": corpus.tokenizer.vocab_size, "tokens": counts}
    if args.json:
        print_json(result)
    else:
        rows = [
            (name, f"{count:,} tokens, {corpus.num_characters(name):,} characters") for name, count in counts.items()
        ]
        print_table(Console(), f"{args.out}: {corpus.tokenizer.vocab_size} symbols", rows)


def overridden(args: TrainArgs) -> RunConfig:
    """The run with the short options put into their fields."""
    run = args.run
    assert run is not None
    if args.data is not None:
        run = replace(run, data=replace(run.data, source=args.data))
    if args.checkpoint_every is not None:
        run = replace(run, train=replace(run.train, checkpoint_every=args.checkpoint_every))
    return run if args.steps is None else with_steps(run, args.steps)


def print_summary(summary: dict[str, Any]) -> None:
    """What a training run came to."""
    test = summary["test"]
    sign = "=" if test["bound"] == "exact" else "<="
    rows = [
        ("test", f"{sign} {test['bpc']:.4f} bits per character ({test['bound']}, {test['tokens']:,} tokens)"),
        ("stages, valid", ", ".join(f"{bpc:.4f}" for bpc in summary["stage_valid_bpc"])),
        ("trained", f"{summary['tokens']:,} tokens in {summary['seconds']:,.0f} s"),
        ("parameters", f"{summary['parameters']:,}, {summary['trunk_parameters']:,} of them in Transformers"),
    ]
    print_table(Console(), summary["preset"], rows)


def run_sample(args: SampleArgs) -> None:
    checkpoint = load_checkpoint(args.directory, pick_device(args.device))
    tokenizer = checkpoint.tokenizer.with_normalization(args.normalize)
    length = checkpoint.run.model.context if args.length is None else args.length
    prompt = None
    if args.prompt is not None:
        text = args.prompt if args.normalize is None else tokenizer.prepare(args.prompt)
        if not args.prompt or not text:
            raise UserError("the prompt is empty: leave --prompt out to sample without one")
        prompt = torch.from_numpy(tokenizer.encode(text))
    start = time.perf_counter()
    with sampling_bar(Console(stderr=True), checkpoint.model, max(length, 1)) as tick:
        result = generate(
            checkpoint.model,
            num_tokens=length,
            num=args.num,
            prompt=prompt,
            generator=torch.Generator().manual_seed(checked_seed(args.seed)),
            temperature=args.temperature,
            top_k=args.top_k,
            top_p=args.top_p,
            return_passes=args.passes,
            decoder=args.decoder,
            tick=tick,
        )
    seconds = time.perf_counter() - start
    if args.json:
        samples = samples_to_json(result.tokens, result.passes, tokenizer)
        rate = result.tokens.numel() / seconds
        print_json({"samples": samples, "sweeps": result.sweeps, "seconds": seconds, "tokens_per_second": rate})
    else:
        print_samples(Console(), result.tokens, result.passes, tokenizer)
