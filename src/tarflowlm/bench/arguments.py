"""What the benchmarks take. No torch here: `--help` answers, and a wrong number is reported, without it."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro

from tarflowlm.choices import DeviceName
from tarflowlm.errors import UserError
from tarflowlm.runs.presets import PAPER_PRESETS, preset


def at_least(args: Any, least: int, *names: str) -> None:
    """UserError, naming the option, for a field below `least`. Of tuples every number, and there must be one."""
    for name in names:
        value, option = getattr(args, name), name.replace("_", "-")
        if value == ():
            raise UserError(f"{option}: name at least one")
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, int) and number < least:
                raise UserError(f"{option} {number}: must be at least {least}")


def above_zero(args: Any, *names: str) -> None:
    """UserError, naming the option, for a field that is not above 0 and finite; None passes."""
    for name in names:
        value = getattr(args, name)
        if value is not None and not 0 < value < math.inf:
            raise UserError(f"{name.replace('_', '-')} {value}: must be above 0 and finite")


@dataclass(frozen=True)
class DataArgs:
    """Text to BPE shards: speed as a ratio to the tokenizers library alone, peak memory, and the loader's cost."""

    text: Path | None = None
    """Text file, repeated to the sizes below; the default is the corpus english."""
    tokenizer: str = ""
    """BPE: a tokenizer.json or a hub name. The default trains one of 16,384 tokens on the small text."""
    rounds: int = 3
    """Rounds; each prepares a text and then runs the library alone."""
    speed_mb: int = 50
    """Size of that text, in megabytes (10^6 bytes)."""
    small_mb: int = 10
    """Size of the smaller text whose peak memory is measured, in megabytes."""
    large_mb: int = 100
    """Size of the larger one, in megabytes: does memory grow with the text?"""
    preset: str = "mini-ar"
    """Preset whose training step the loader's cost is compared with."""
    json: bool = False
    """Print one JSON object last."""

    def __post_init__(self) -> None:
        at_least(self, 1, "rounds", "speed_mb", "small_mb", "large_mb")
        preset(self.preset)  # for its error


@dataclass(frozen=True)
class NumericsArgs:
    """Times as ratios to another library in the same run; errors and range; the Mix-d loss against cross-entropy."""

    tokens: int = 4096
    """Rows of the elementwise problem."""
    channels: int = 64
    """Channels per row."""
    components: tuple[int, ...] = (2, 8, 27)
    """Mixture sizes."""
    rounds: int = 7
    """Rounds; every round times each contender once, in turn."""
    accuracy_rows: int = 20_000
    """Mixtures of the error columns; half of them are hard (scales e^-6 to e^2, weights to e^-12, |u| to 30)."""
    zuko: bool = True
    """Compare with zuko's GaussianizationTransform (needs zuko)."""
    head: bool = True
    """Time the Mix-d loss too, and measure its memory in processes of its own."""
    vocabulary: int = 50_257
    """Components of the Mix-d loss."""
    head_tokens: int = 4096
    """Tokens of the Mix-d loss."""
    width: int = 256
    """Features per token of the Mix-d loss."""
    latent_dim: int = 16
    """Latent channels per token of the Mix-d loss."""
    head_rounds: int = 3
    """Rounds for the Mix-d loss."""
    threads: int = 1
    """CPU threads."""
    seed: int = 0
    """Seed of all inputs."""
    json: bool = False
    """Print one JSON object last."""

    def __post_init__(self) -> None:
        at_least(self, 1, "tokens", "channels", "components", "rounds", "vocabulary", "head_tokens", "width")
        at_least(self, 1, "latent_dim", "head_rounds", "threads")
        at_least(self, 2, "accuracy_rows")
        at_least(self, 0, "seed")


@dataclass(frozen=True)
class TrainArgs:
    """Tokens per second of a training step, with ratios to the first preset from interleaved rounds; peak memory;
    scaling to two processes."""

    presets: tuple[str, ...] = ("mini-ar", "mini-mixd", "mini-mix1", "mini-affine")
    """The first is the reference. Progressive presets are timed stage by stage."""
    rounds: int = 7
    """Rounds; every round times each preset once, in turn."""
    steps: int = 2
    """Optimiser steps per timing."""
    vocab_size: int = 27
    """Symbols of the random tokens that are trained on."""
    threads: int | None = None
    """CPU threads; the default is PyTorch's."""
    muon: tuple[Literal["auto", "float32", "bfloat16"], ...] = ("auto",)
    """Precisions of Muon's products, each timed; torch.optim.Muon has bfloat16 alone."""
    compile: bool | None = None
    """Compile the step with torch.compile; the default does as training does."""
    memory: bool = True
    """Measure the peak memory of every preset, each in a process of its own."""
    scaling: bool = True
    """Time the presets in two processes, DDP and FSDP2, against one."""
    scaling_presets: tuple[str, ...] = ("mini-ar", "mini-mixd")
    """Presets of that comparison; a progressive one trains its first stage."""
    peers: bool = False
    """Time the first preset, with AdamW, beside a GPT-2 and a Llama of its shape (extra `quality`)."""
    device: DeviceName = "auto"
    """auto takes cuda, then mps, then cpu."""
    peak_tflops: float | None = None
    """Peak of the accelerator in TFLOP/s, for the model FLOPs utilisation; the default knows some devices."""
    json: bool = False
    """Print one JSON object last."""

    def __post_init__(self) -> None:
        at_least(self, 1, "presets", "rounds", "steps", "vocab_size", "threads", "muon")
        above_zero(self, "peak_tflops")
        for name in (*self.presets, *self.scaling_presets):
            preset(name)  # for its error


@dataclass(frozen=True)
class SizesArgs:
    """Memory per GPU under FSDP2, largest batch, FLOPs per token and hours of the large presets, stage by stage.
    Computed from shapes, without a GPU."""

    presets: tuple[str, ...] = PAPER_PRESETS
    """Presets whose names begin with text8- or owt-."""
    gpus: int = 8
    """GPUs for which to compute the hours."""
    utilisation: float = 0.4
    """Share of the peak that training reaches (model FLOPs utilisation)."""
    peak_tflops: float = 989.0
    """Peak of one GPU in TFLOP/s; the default is an H100 in bfloat16."""
    memory: float = 80.0
    """Memory of one GPU in GB (1e9 bytes)."""
    xl: bool = False
    """The presets of OpenWebText with the body of GPT-2 XL (1.5 B parameters) as well."""
    json: bool = False
    """Print one JSON object last."""

    def __post_init__(self) -> None:
        at_least(self, 1, "presets", "gpus")
        above_zero(self, "utilisation", "peak_tflops", "memory")
        if self.utilisation > 1:
            raise UserError(f"utilisation {self.utilisation}: must be at most 1")


@dataclass(frozen=True)
class EvaluationArgs:
    """Time per token of the ELBO of flows and the likelihood of baselines, over that of the first model."""

    directories: tyro.conf.Positional[tuple[Path, ...]]
    """Run directories or shipped models; times are divided by that of the first, for instance a baseline."""
    data: str | None = None
    """Text to take windows from; the default is each run's own corpus."""
    windows: int = 32
    """Windows of each model's context, evenly spaced over the test split."""
    samples: int = 1
    """Posterior samples of flows."""
    rounds: int = 5
    """Rounds; every round times each model once, in turn."""
    threads: int | None = None
    """CPU threads; the default is PyTorch's."""
    device: DeviceName = "auto"
    """auto takes cuda, then mps, then cpu."""
    json: bool = False
    """Print one JSON object last."""

    def __post_init__(self) -> None:
        at_least(self, 1, "directories", "windows", "samples", "rounds", "threads")


@dataclass(frozen=True)
class GenerationArgs:
    """Tokens per second of trained models, and how much faster sweeps are in each block of a flow."""

    directories: tyro.conf.Positional[tuple[Path, ...]]
    """Run directories; tokens per second are compared with the first, for instance a baseline."""
    batches: tuple[int, ...] = (1, 16)
    """Samples at once."""
    peers: bool = False
    """Also time a GPT-2 and a Llama of `transformers` in the shape of the first model."""
    compile: bool = False
    """Also time every model with --compile."""
    length: int | None = None
    """Tokens per sample; the default is each model's context."""
    rounds: int = 3
    """Rounds; every round times each contender once, in turn."""
    seeds: int = 100
    """Samples whose tokens are compared between steps and sweeps; 0 skips this."""
    threads: int | None = None
    """CPU threads; the default is PyTorch's."""
    device: DeviceName = "auto"
    """auto takes cuda, then mps, then cpu."""
    json: bool = False
    """Print one JSON object last."""

    def __post_init__(self) -> None:
        at_least(self, 1, "directories", "batches", "length", "rounds", "threads")
        at_least(self, 0, "seeds")


@dataclass(frozen=True)
class InfillingArgs:
    """Hide tokens in the middle of held-out sentences; fill them in with and without regard to what follows."""

    directories: tyro.conf.Positional[tuple[Path, ...]]
    """Run directories, flows or baselines."""
    data: str | None = None
    """Text to take sentences from; the default is each run's own corpus."""
    sentences: int = 200
    """Sentences, evenly spaced over the test split."""
    length: int = 64
    """Tokens of a sentence."""
    blanks: int = 12
    """Hidden tokens in the middle of it."""
    particles: tuple[int, ...] = (1, 16)
    """Candidates per sentence; 1 ignores what follows the blanks."""
    strengths: tuple[float, ...] = (0.0, 0.1, 0.3, 0.6, 1.0)
    """Of re-noising, at every state of a flow."""
    examples: int = 5
    """Sentences to print."""
    seed: int = 0
    """Of all noise."""
    device: DeviceName = "auto"
    """auto takes cuda, then mps, then cpu."""
    json: bool = False
    """Print one JSON object last."""

    def __post_init__(self) -> None:
        at_least(self, 1, "directories", "sentences", "particles")
        at_least(self, 0, "examples", "seed")
        if not 0 < self.blanks < self.length:
            raise UserError(f"blanks {self.blanks}: must be at least 1 and less than the length {self.length}")


BENCHMARKS = {
    "data": DataArgs,
    "numerics": NumericsArgs,
    "train": TrainArgs,
    "sizes": SizesArgs,
    "evaluation": EvaluationArgs,
    "generation": GenerationArgs,
    "infilling": InfillingArgs,
}
"""Module of `tarflowlm.bench` -> what its `run` takes."""
