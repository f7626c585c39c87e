"""What the commands take. Light to import: `--help` answers, and a wrong argument is reported, before torch is there.

Those that hold configurations are in `configured`, those of benchmarks in `bench.arguments`.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from tarflowlm.choices import RECIPE_NAMES, Decoder, Decoding, DeviceName, Scale
from tarflowlm.errors import UserError

Device = Annotated[DeviceName, tyro.conf.arg(help="auto picks cuda, then mps, then cpu.")]
PrintJson = Annotated[bool, tyro.conf.arg(help="Print one JSON object as the last line.")]
RunDirectory = Annotated[tyro.conf.Positional[Path], tyro.conf.arg(help="Run directory.")]
RunOrModel = Annotated[
    tyro.conf.Positional[Path | None],
    tyro.conf.arg(help="Run directory, or the name of a model that comes with the package."),
]
ReleasedModel = Annotated[
    str | None, tyro.conf.arg(help="In place of a directory: a model that comes with the package, say english-mini.")
]
Normalize = Literal["text8"] | None

ALL = "all"
"""The name of all recipes."""
TEMPERATURE = "raise the probabilities of tokens to the power 1 / temperature; 1 samples from the model itself."
TOP_K = "keep the k most probable tokens."
TOP_P = "keep the smallest set of tokens that holds this probability."


@dataclass(frozen=True)
class QuickstartArgs:
    """Arguments of `tarflowlm quickstart`."""

    out: Path = Path("runs/quickstart")
    """Run directory to create."""
    minutes: float = 5.0
    """Total time, including evaluation and sampling."""
    seed: int = 0
    """Seed of the weights, data order, noise and samples."""
    device: Device = "auto"
    json: PrintJson = False

    def __post_init__(self) -> None:
        if not 0 < self.minutes < math.inf:
            raise UserError(f"minutes {self.minutes}: must be above 0 and finite")


@dataclass(frozen=True)
class SampleArgs:
    """Arguments of `tarflowlm sample`."""

    directory: RunOrModel = None
    model: ReleasedModel = None
    num: int = 1
    """Number of samples."""
    length: int | None = None
    """Tokens per sample, including the prompt; the default is the trained context. Beyond that the window slides: its
    last half is the next prompt, exact for the baseline and one block, an approximation for more."""
    prompt: str | None = None
    """Text to continue. Exact for one block; an approximation for more, see --particles."""
    template: str | None = None
    """Text with a blank for every token to fill in: "the ____ of ____"."""
    blank: str = "_"
    """Character that marks a blank in the template."""
    particles: int = 1
    """Candidates per sample, weighted by the likelihood of the given tokens; exact in the limit of many."""
    seed: int = 0
    """The same seed gives the same text."""
    temperature: Annotated[float, tyro.conf.arg(help=TEMPERATURE.capitalize())] = 1.0
    top_k: Annotated[int | None, tyro.conf.arg(help=TOP_K.capitalize())] = None
    top_p: Annotated[float | None, tyro.conf.arg(help=TOP_P.capitalize())] = None
    decoding: Decoding = "mode"
    """Tokens of the latents: the most probable ones, or drawn from p(x|z), which is exact; alike for sharp codes."""
    decoder: Decoder = "auto"
    """How to invert a block: position by position, in parallel sweeps, by drafts (block 1), or what is quickest."""
    compile: bool = False
    """Compile the step of one position, which takes a quarter of a minute: for many or long samples."""
    passes: bool = False
    """Show the text decoded after every block."""
    rounds: bool = False
    """Show the text after every round of the decoder "drafted": final tokens, and dimmed what is not yet."""
    states: bool = False
    """With --json: the latents after every block as well."""
    normalize: Normalize = None
    """Normalise the prompt first."""
    device: Device = "auto"
    json: PrintJson = False

    def __post_init__(self) -> None:
        if self.rounds and self.decoder not in ("auto", "drafted"):
            raise UserError(f"--rounds with --decoder {self.decoder}: only the decoder drafted has rounds")


@dataclass(frozen=True)
class EvalArgs:
    """Arguments of `tarflowlm eval`."""

    directory: RunOrModel = None
    model: ReleasedModel = None
    data: str | None = None
    """Another text: corpus name, file or prepared directory; the default is the run's own corpus."""
    split: Literal["train", "valid", "test", "all"] = "test"
    """Part of the text; a file is split 90/5/5."""
    samples: int = 1
    """Posterior samples: 1 gives the ELBO, more give the importance-weighted bound with the ELBO beside it."""
    windows: int | None = None
    """At most this many windows, evenly spaced; the default is all of them."""
    stride: int | None = None
    """Tokens between window starts (default: the context). Less lets windows overlap: baseline, one-block flows."""
    latents: bool = False
    """Also the state after every block: norms, cosines, participation ratio, centroid, log-det, KL."""
    quality: bool = False
    """Also samples: generative perplexity, MAUVE, entropy, distinct n-grams, repetition, beside those of the text."""
    judge: str | None = None
    """With --quality: a run directory of the baseline, a directory of transformers, or a hub name (gpt2-large)."""
    num: int | None = None
    """With --quality: number of samples; 5000, as in the paper."""
    length: int | None = None
    """With --quality: tokens per sample; the default is the trained context."""
    decoder: Decoder | None = None
    """With --quality: how to invert a block (auto)."""
    temperature: Annotated[float | None, tyro.conf.arg(help=f"With --quality: {TEMPERATURE}")] = None
    top_k: Annotated[int | None, tyro.conf.arg(help=f"With --quality: {TOP_K}")] = None
    top_p: Annotated[float | None, tyro.conf.arg(help=f"With --quality: {TOP_P}")] = None
    normalize: Normalize = None
    """Normalise the text first, whatever the model's tokenizer does."""
    seed: int = 0
    """Seed of the posterior samples, and of the samples that --quality draws."""
    device: Device = "auto"
    json: PrintJson = False

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise UserError(f"samples {self.samples}: must be at least 1")
        for name in (*SAMPLING, "judge"):
            if getattr(self, name) is not None and not self.quality:
                flag = name.replace("_", "-")
                raise UserError(f"--{flag} has no effect without --quality: add it, or leave this out")


SAMPLING = ("num", "length", "decoder", "temperature", "top_k", "top_p")
"""Arguments of `eval` that say how --quality samples; fields of `quality.SamplingConfig`."""


@dataclass(frozen=True)
class EditArgs:
    """Arguments of `tarflowlm edit`."""

    text: str
    """The text to edit."""
    directory: RunOrModel = None
    model: ReleasedModel = None
    strength: float | None = None
    """Re-noise: h -> sqrt(1 - s^2) h + s eps, with h the state at `level`; 0 keeps the text, 1 forgets it."""
    toward: str | None = None
    """Interpolate to this text of the same length."""
    weight: float = 0.5
    """With --toward: 0 is the text, 1 the other text."""
    replace: tuple[str, str] | None = None
    """OLD NEW: replace the first OLD by NEW, of as many tokens, and regenerate the rest from its noise."""
    level: int | None = None
    """State to change: 0 is the latents, the number of blocks is the noise (the default)."""
    num: int = 1
    """Number of edits, each with its own noise."""
    seed: int = 0
    """The same seed gives the same edits."""
    decoder: Decoder = "auto"
    """How to invert a block: position by position, in parallel sweeps, by drafts (block 1), or what is quickest."""
    normalize: Normalize = None
    """Normalise the texts first."""
    device: Device = "auto"
    json: PrintJson = False

    def __post_init__(self) -> None:
        given = sum(kind is not None for kind in (self.strength, self.toward, self.replace))
        if given != 1:
            raise UserError(f"edit needs one of --strength, --toward and --replace, got {given}")
        if self.num < 1:
            raise UserError(f"num {self.num}: ask for at least 1 edit")


@dataclass(frozen=True)
class ReportArgs:
    """Arguments of `tarflowlm report`."""

    directories: tyro.conf.Positional[tuple[Path, ...]]
    """Run directories; several are drawn into the same figures."""
    out: Path | None = None
    """Directory to write; the default for a single run is DIR/report. An earlier report there is replaced."""
    device: Device = "auto"
    json: PrintJson = False


@dataclass(frozen=True)
class SealArgs:
    """Arguments of `tarflowlm seal`."""

    directory: RunDirectory
    json: PrintJson = False


@dataclass(frozen=True)
class ExportArgs:
    """Arguments of `tarflowlm export`."""

    directory: Annotated[
        tyro.conf.Positional[Path],
        tyro.conf.arg(help="Run directory, or the name of a model that comes with the package."),
    ]
    out: Path
    """Directory to create."""
    half: bool = False
    """Store weight matrices in bfloat16, which halves the size."""
    json: PrintJson = False


@dataclass(frozen=True)
class ReproduceArgs:
    """Arguments of `tarflowlm reproduce`."""

    name: Annotated[tyro.conf.Positional[str], tyro.conf.arg(help=f"One of {', '.join([*RECIPE_NAMES, ALL])}.")]
    scale: Scale = "mini"
    """mini runs on a CPU; paper is the published size, on TEXT8 and OpenWebText."""
    out: Path = Path("reproduced")
    """Directory of runs and results. Recipes share the runs in it, and finished work is not repeated."""
    data: str | None = None
    """Text for mini scale: corpus name or file; the default is the built-in corpus."""
    judge_data: str = "english"
    """Text on which the judge of samples is trained at mini scale; it should differ from --data."""
    second_text: str | None = None
    """table2: also measure the likelihood of this whole text."""
    seeds: int = 1
    """Train each model this many times, with seeds 0, 1, ...; where differences are small, at least twice."""
    steps: int | None = None
    """Optimiser steps of every training in place of the recipe's, for a quick look."""
    dry_run: bool = False
    """Train nothing: list the trainings with a rough time for each, from a few timed steps."""
    device: Device = "auto"
    json: PrintJson = False

    def __post_init__(self) -> None:
        if self.name != ALL and self.name not in RECIPE_NAMES:
            raise UserError(f"{self.name!r} is no recipe: choose one of {', '.join([*RECIPE_NAMES, ALL])}")
        if self.seeds < 1:
            raise UserError(f"seeds {self.seeds}: must be at least 1")
        if self.out.exists() and not self.out.is_dir():
            raise UserError(f"{self.out} is a file: name a directory with --out")
        if self.data is not None and self.scale == "paper":
            raise UserError(f"--data {self.data} has no effect with --scale paper, which keeps the paper's texts")
        if self.second_text is not None and self.name not in ("table2", ALL):
            raise UserError(f"--second-text {self.second_text} has no effect on {self.name}: only table2 measures it")
