"""What `eval`, `score`, `info`, `runs` and `harness` take. Light to import, as `arguments`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from tarflowlm.cli.arguments import TEMPERATURE, TOP_K, TOP_P, Device, Normalize, PrintJson, ReleasedModel, RunOrModel
from tarflowlm.cli.parsing import parse_known
from tarflowlm.config import Decoder
from tarflowlm.errors import UserError


@dataclass(frozen=True)
class EvalArgs:
    """Arguments of `tarflowlm eval`."""

    directory: RunOrModel = None
    model: ReleasedModel = None
    data: str | None = None
    """Another text: corpus name, file or prepared directory; the default is the run's own corpus."""
    text: str | None = None
    """Not here: `tarflowlm score` takes a single text, of any length."""
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
    """Also samples: generative perplexity, MAUVE, entropy, distinct n-grams, repetition, beside those of the text.
    Needs the extra quality (mauve-text, transformers)."""
    judge: str | None = None
    """With --quality: a run directory or shipped model of the baseline, a directory of transformers, or a hub name
    (gpt2-large)."""
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
        if self.text is not None:
            raise UserError("--text: `tarflowlm score MODEL --text TEXT` scores a single text, of any length")
        if self.samples < 1:
            raise UserError(f"samples {self.samples}: must be at least 1")
        for name in (*SAMPLING, "judge"):
            if getattr(self, name) is not None and not self.quality:
                flag = name.replace("_", "-")
                raise UserError(f"--{flag} has no effect without --quality: add it, or leave this out")


SAMPLING = ("num", "length", "decoder", "temperature", "top_k", "top_p")
"""Arguments of `eval` that say how --quality samples; fields of `quality.SamplingConfig`."""


@dataclass(frozen=True)
class ScoreArgs:
    """Arguments of `tarflowlm score`."""

    directory: RunOrModel = None
    model: ReleasedModel = None
    text: str | None = None
    """The text to score."""
    file: str | None = None
    """A file with the text in place of it, or - for standard input; normalised as the model's training text was."""
    baseline: Path | None = None
    """A second model to score the same text with: run directory, or the name of a model of the package."""
    samples: int = 8
    """Posterior samples that the bound of a flow is the mean of; the baseline is exact."""
    normalize: Normalize = None
    """Normalise the text first, whatever the model's tokenizer does."""
    seed: int = 0
    """Seed of the posterior samples."""
    device: Device = "auto"
    json: PrintJson = False

    def __post_init__(self) -> None:
        if (self.text is None) == (self.file is None):
            raise UserError("give the text to score: either --text TEXT, or --file FILE (- for standard input)")
        if self.samples < 1:
            raise UserError(f"samples {self.samples}: must be at least 1")


@dataclass(frozen=True)
class InfoArgs:
    """Arguments of `tarflowlm info`."""

    directory: Annotated[
        tyro.conf.Positional[Path | None],
        tyro.conf.arg(help="Run directory, hf:OWNER/NAME, or a model of the package; without it those are listed."),
    ] = None
    json: PrintJson = False


@dataclass(frozen=True)
class RunsArgs:
    """Arguments of `tarflowlm runs`."""

    directories: Annotated[
        tyro.conf.Positional[tuple[Path, ...]],
        tyro.conf.arg(help="Run directories, or folders that hold some, at most two levels down."),
    ]
    json: PrintJson = False

    def __post_init__(self) -> None:
        if not self.directories:
            raise UserError("name the directory that holds the runs, say `tarflowlm runs runs`")


@dataclass(frozen=True)
class HarnessArgs:
    """Arguments of `tarflowlm harness`; all others are those of lm-eval."""

    directory: Annotated[
        tyro.conf.Positional[Path], tyro.conf.arg(help="Run directory, or the name of a model that comes along.")
    ]
    posterior_samples: int = 1
    """Posterior samples of a flow: 1 gives the ELBO, more give the importance-weighted bound."""
    noise_seed: int = 0
    """Seed of these samples, and of continuations."""
    normalize: Normalize = None
    """Normalise the texts first, whatever the model's tokenizer does."""
    json: PrintJson = False

    def __post_init__(self) -> None:
        if self.posterior_samples < 1:
            raise UserError(f"posterior samples {self.posterior_samples}: must be at least 1")


def read_harness(argv: list[str]) -> tuple[HarnessArgs, list[str]]:
    """What follows `tarflowlm harness`, and the words among it that are for lm-eval."""
    about = "Evaluate a model with lm-evaluation-harness; other options, --tasks among them, are those of lm-eval."
    return parse_known(HarnessArgs, argv, "tarflowlm harness MODEL --tasks NAMES", description=about)
