"""What each command takes and does; `cli` finds the command and reports what went wrong."""

import time
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from rich.console import Console

from tarflowlm.cli.quickstart import QuickstartArgs, run_quickstart
from tarflowlm.data import TokenizerConfig, prepare_corpus
from tarflowlm.device import DeviceName, pick_device, threads_for
from tarflowlm.errors import UserError
from tarflowlm.files import writer_lock
from tarflowlm.generation import generate
from tarflowlm.generation.inversion import Decoder
from tarflowlm.generation.sampling import encode_template
from tarflowlm.report import write_report
from tarflowlm.runs.checkpoint import export, load_checkpoint, read_run, seal
from tarflowlm.runs.config import RunConfig, checked_seed
from tarflowlm.runs.presets import with_steps
from tarflowlm.runs.released import chosen
from tarflowlm.terminal.console import (
    corpus_bar,
    print_json,
    print_notice,
    print_samples,
    print_table,
    samples_to_json,
    sampling_bar,
    stages_bar,
)


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
    minutes: float | None = None
    """Train for this time instead, evaluation and saving included; the stages keep their shares of it."""
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

    directory: tyro.conf.Positional[Path | None] = None
    """Run directory."""
    model: str | None = None
    """In place of a directory: a model that comes with the package, english-mini or english-mini-ar."""
    num: int = 1
    """Samples."""
    length: int | None = None
    """Tokens per sample, the prompt included; the default is the trained context."""
    prompt: str | None = None
    """Text to continue. Exact for one block; an approximation for stacks, see `particles`."""
    template: str | None = None
    """Text with a blank for every token to fill in: "the ____ of ____"."""
    blank: str = "_"
    """What stands for a blank in the template."""
    particles: int = 1
    """Candidates per sample, weighed by what they give to the given tokens; exact as they grow in number."""
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
    states: bool = False
    """With --json: the latents after every block, too."""
    normalize: Literal["text8"] | None = None
    """Normalise the prompt first."""
    device: DeviceName = "auto"
    """auto takes cuda, then mps, then cpu."""
    json: bool = False
    """Print one JSON object last."""


@dataclass(frozen=True)
class ReportArgs:
    """Draw curves, blocks, codebook and throughput of runs: PNG figures and one page."""

    directories: tyro.conf.Positional[tuple[Path, ...]]
    """Run directories; several are drawn into the same figures."""
    out: Path | None = None
    """Directory to write; DIR/report of a single run is the default. An earlier report there is replaced."""
    device: DeviceName = "auto"
    """auto takes cuda, then mps, then cpu."""
    json: bool = False
    """Print one JSON object last."""


@dataclass(frozen=True)
class SealArgs:
    """Accept the files of a run as they are, after a change by hand: check that they load, write manifest.json."""

    directory: tyro.conf.Positional[Path]
    """Run directory."""


def run_seal(args: SealArgs) -> None:
    read_run(args.directory, check=False)
    with writer_lock(args.directory):
        seal(args.directory)


@dataclass(frozen=True)
class ExportArgs:
    """Copy a model out of its run directory: configuration, tokenizer and weights, and nothing of its training."""

    directory: tyro.conf.Positional[Path]
    """Run directory."""
    out: Path
    """Directory to write; it must not exist."""
    half: bool = False
    """Keep weight matrices in bfloat16: half the size."""


def run_export(args: ExportArgs) -> None:
    out = export(args.directory, args.out, half=args.half)
    size = sum(path.stat().st_size for path in out.iterdir())
    print_table(Console(), str(out), [("size", f"{size / 1e6:.2f} MB")])


def run_quickstart_command(args: QuickstartArgs) -> None:
    result = run_quickstart(args, Console(stderr=True), Console())
    if args.json:
        print_json(result)


def run_data(args: DataArgs) -> None:
    console = Console(stderr=True)
    with corpus_bar(console, args.source) as progress:
        corpus = prepare_corpus(
            args.source, args.tokenizer, args.out, progress=progress, notice=partial(print_notice, console)
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
    if args.minutes is not None:
        if args.steps is not None:
            raise UserError(f"--steps {args.steps} with --minutes {args.minutes}: give one of them")
        if not args.minutes > 0:
            raise UserError(f"minutes {args.minutes}: must be above 0 and finite")
        return replace(run, train=replace(run.train, minutes=args.minutes))
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
    checkpoint = load_checkpoint(chosen(args.directory, args.model), pick_device(args.device))
    tokenizer = checkpoint.tokenizer.with_normalization(args.normalize)
    prompt = template = None
    if args.prompt is not None:
        text = args.prompt if args.normalize is None else tokenizer.prepare(args.prompt)
        if not args.prompt or not text:
            raise UserError("the prompt is empty: leave --prompt out to sample without one")
        prompt = torch.from_numpy(tokenizer.encode(text))
    if args.template is not None:
        template = encode_template(tokenizer, args.template, args.blank)
    context = checkpoint.run.model.context
    default = context if template is None else max(len(template), 1)
    length = default if args.length is None else args.length
    start = time.perf_counter()
    bar_of = sampling_bar(Console(stderr=True), checkpoint.model, max(length, 1))
    with threads_for(args.num * args.particles), bar_of as tick:
        result = generate(
            checkpoint.model,
            num_tokens=length,
            num=args.num,
            prompt=prompt,
            template=template,
            particles=args.particles,
            generator=torch.Generator().manual_seed(checked_seed(args.seed)),
            temperature=args.temperature,
            top_k=args.top_k,
            top_p=args.top_p,
            return_passes=args.passes or args.states,
            decoder=args.decoder,
            tick=tick,
        )
    seconds = time.perf_counter() - start
    if not args.json:
        print_samples(Console(), result, tokenizer)
        return
    rate = result.tokens.numel() / seconds
    print_json(
        {
            "samples": samples_to_json(result, tokenizer, states=args.states),
            "sweeps": result.sweeps,
            "decoders": result.decoders,
            "seconds": seconds,
            "tokens_per_second": rate,
        }
    )


def run_report(args: ReportArgs) -> None:
    with stages_bar(Console(stderr=True)) as progress:
        result = write_report(
            args.directories,
            args.out,
            device=pick_device(args.device),
            progress=progress,
        )
    if args.json:
        print_json(result)
        return
    rows = [("page", result["page"]), ("figures", f"{len(result['figures'])} PNG files beside it")]
    for run in result["runs"]:
        rows.append((run["name"], run["status"]))
        rows += [("", note) for note in run["notes"]]
    print_table(Console(), "report", rows)
