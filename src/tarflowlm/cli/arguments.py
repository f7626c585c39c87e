"""What the commands take. Light to import: `--help` answers, and a wrong argument is reported, before torch is there.

Those that hold configurations are in `configured`, those of benchmarks in `bench.arguments`.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from tarflowlm.config import RECIPE_NAMES, Decoder, Decoding, DeviceName, Precision, Scale
from tarflowlm.errors import UserError

Device = Annotated[DeviceName, tyro.conf.arg(help="auto picks cuda, then mps, then cpu.")]
PrintJson = Annotated[bool, tyro.conf.arg(help="Print one JSON object as the last line.")]
RunDirectory = Annotated[tyro.conf.Positional[Path], tyro.conf.arg(help="Run directory.")]
RunOrModel = Annotated[
    tyro.conf.Positional[Path | None],
    tyro.conf.arg(
        help="Run directory, a model that comes with the package, or hf:OWNER/NAME of the hub. `tarflowlm info` "
        "lists the models and says which one is taken if none is named."
    ),
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
    prompts: str | None = None
    """File with one prompt a line, or - for standard input; --num samples of each. Empty lines are skipped."""
    template: str | None = None
    """Text with a blank for every token to fill in: "the ____ of ____". A BPE token brings the space before it."""
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
    """How to invert a block: position by position, in parallel sweeps, or the cheaper of the two."""
    passes: bool = False
    """Show the text decoded after every block."""
    states: bool = False
    """With --json or --out: the latents after every block as well."""
    stop: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """End a sample before this text, once that follows the prompt. May be given several times."""
    stream: bool = False
    """Show the text while it is written, one sample after the other."""
    out: Path | None = None
    """New file for the samples, one JSON object a line, written as they are finished."""
    interactive: bool = False
    """Read prompts at the terminal and continue each of them; /help there lists the commands."""
    normalize: Normalize = None
    """Normalise the prompt first."""
    device: Device = "auto"
    json: PrintJson = False

    def __post_init__(self) -> None:
        for one, others in EXCLUSIVE.items():
            for other in others:
                if self._is_given(one) and self._is_given(other):
                    raise UserError(f"--{one} with --{other}: leave one of them out")
        for one, others in NEEDED.items():
            if self._is_given(one) and not any(self._is_given(other) for other in others):
                raise UserError(f"--{one} has no effect without --{' or --'.join(others)}: leave it out, or add that")
        if "" in self.stop:
            raise UserError("--stop '': give at least one character")

    def _is_given(self, name: str) -> bool:
        return bool(getattr(self, name) != getattr(SampleArgs, name))

    def writing(self) -> dict[str, Any]:
        """What `generate` takes as it is."""
        return {name: getattr(self, name) for name in WRITING}


WRITING = ("particles", "temperature", "top_k", "top_p", "decoding")
EXCLUSIVE = {
    "interactive": ("num", "prompts", "template", "out", "json", "passes", "states"),
    "stream": ("json", "passes", "particles"),
    "prompts": ("prompt", "template"),
    "stop": ("template", "passes", "states"),
}
"""Arguments of `sample` that contradict each other."""
NEEDED = {
    "states": ("json", "out"),
    "blank": ("template",),
    "particles": ("prompt", "prompts", "template", "interactive"),
}
"""Arguments of `sample` that do nothing without one of these."""


@dataclass(frozen=True)
class EditArgs:
    """Arguments of `tarflowlm edit`."""

    text: str
    """The text to edit."""
    directory: RunOrModel = None
    model: ReleasedModel = None
    strength: float | None = None
    """Share of the words to redraw, given all the others: 0 keeps the text, 0.1 (the default) changes a word here and
    there, 1 leaves none. With --level: how much noise the states get."""
    words: int | None = None
    """Number of words to redraw, in place of a share. With --level: the noise goes to so many words only."""
    pick: Literal["random", "unlikely"] | None = None
    """Which words: at random (the default), or those the model expects least."""
    rewrite: tuple[str, ...] | None = None
    """Redraw these pieces of the text, words or more, given everything else."""
    candidates: int | None = None
    """Candidates for every redrawn piece (32), of which one is taken by how well the rest of the text follows it."""
    temperature: Annotated[float | None, tyro.conf.arg(help=f"Of the candidates (0.7): {TEMPERATURE}")] = None
    toward: str | None = None
    """Take a stretch of this text of the same length, in its place, and redraw what it cuts. With --level:
    interpolate between the states of the two texts."""
    weight: float | None = None
    """With --toward: the share of words to take (0.5); 0 is the text, 1 the other text."""
    replace: tuple[str, str] | None = None
    """OLD NEW: replace the first OLD, as a word if it is one, by NEW, of as many tokens, and regenerate the rest from
    its noise."""
    level: int | None = None
    """Change a state in latent space, as in the paper: 0 is the latents, the number of blocks is the noise. Re-noises
    by h -> sqrt(1 - s^2) h + s eps with s the strength, or interpolates."""
    num: int = 1
    """Number of edits, each with its own noise (of --replace that is the noise of the new words alone)."""
    seed: int = 0
    """The same seed gives the same edits."""
    decoder: Decoder | None = None
    """With --level: how to invert a block, position by position, in parallel sweeps, by drafts (block 1), or what is
    quickest (auto, the default)."""
    normalize: Normalize = None
    """Normalise the texts first."""
    device: Device = "auto"
    json: PrintJson = False

    def __post_init__(self) -> None:
        if self.num < 1:
            raise UserError(f"num {self.num}: ask for at least 1 edit")
        if self.candidates is not None and self.candidates < 1:
            raise UserError(f"candidates {self.candidates}: must be at least 1")
        if self.words is not None and self.words < 1:
            raise UserError(f"words {self.words}: must be at least 1")
        if self.strength is not None and not 0 <= self.strength <= 1:
            raise UserError(f"strength {self.strength}: must be between 0 (no change) and 1 (all of it is new)")
        given = [name for name in ("rewrite", "toward", "replace") if getattr(self, name) is not None]
        if len(given) > 1:
            raise UserError(f"--{' and --'.join(given)} are different edits: choose one")
        kind = (given or ["level" if self.level is not None else "words"])[0]
        for name in ("strength", "words", "pick", "candidates", "temperature", "weight", "level", "decoder"):
            if getattr(self, name) is not None and name not in EDIT_OPTIONS[kind]:
                which = "redrawn words" if kind == "words" else f"--{kind}"
                raise UserError(f"--{name} has no effect with {which}: leave it out")
        if kind == "words" and self.words is not None and self.strength is not None:
            raise UserError("--words and --strength both say how many words to redraw: give one of them")
        if kind == "level" and self.pick is not None and self.words is None:
            raise UserError("--pick has no effect with --level without --words: add it, or leave this out")
        if kind == "toward":
            others, how = (("decoder",), "without") if self.level is None else (("candidates", "temperature"), "and")
            for name in others:
                if getattr(self, name) is not None:
                    raise UserError(f"--{name} has no effect with --toward {how} --level: leave it out")


EDIT_OPTIONS = {
    "words": ("strength", "words", "pick", "candidates", "temperature"),
    "rewrite": ("candidates", "temperature"),
    "toward": ("weight", "candidates", "temperature", "level", "decoder"),
    "replace": (),
    "level": ("strength", "words", "pick", "level", "decoder"),
}
"""The kinds of `edit`, and which of the other arguments each of them uses."""


@dataclass(frozen=True)
class ReportArgs:
    """Arguments of `tarflowlm report`."""

    directories: tyro.conf.Positional[tuple[Path, ...]]
    """Run directories, shipped models or hf:OWNER/NAME; several are drawn into the same figures."""
    out: Path | None = None
    """Directory to write; by default DIR/report for a single run directory. An earlier report there is replaced."""
    device: Device = "auto"
    json: PrintJson = False


@dataclass(frozen=True)
class StudioArgs:
    """Arguments of `tarflowlm studio`."""

    models: tyro.conf.Positional[tuple[str, ...]] = ()
    """Models by name, run directories, folders of runs; without any, those that come with the package."""
    port: int | None = None
    """Port to serve at; the default is the first free one from 7860 on."""
    host: str = "127.0.0.1"
    """Address to serve at. The default is reached from this machine alone; 0.0.0.0 is reached from everywhere."""
    no_browser: bool = False
    """Open no browser; the address is printed in any case."""
    device: Device = "auto"

    def __post_init__(self) -> None:
        if self.port is not None and not 1 <= self.port <= 65535:
            raise UserError(f"port {self.port}: must be from 1 to 65535")


@dataclass(frozen=True)
class PushArgs:
    """Arguments of `tarflowlm push`."""

    directory: Annotated[
        tyro.conf.Positional[Path], tyro.conf.arg(help="Run directory, or a model that comes with the package.")
    ]
    repository: Annotated[tyro.conf.Positional[str], tyro.conf.arg(help="OWNER/NAME on the hub, made if needed.")]
    private: bool = False
    """Let nobody else see it; for a new repository, or one that is private already."""
    half: bool = False
    """Store weight matrices in bfloat16, which halves the size."""
    licence: str | None = None
    """Licence of the weights, as the hub calls it: apache-2.0, cc-by-sa-4.0."""
    out: Path | None = None
    """Directory to create, to keep what is uploaded."""
    dry_run: bool = False
    """Upload nothing: write the directory, by default ./NAME, and say what would be uploaded."""
    json: PrintJson = False

    def __post_init__(self) -> None:
        if self.dry_run and self.private:
            raise UserError("--private has no effect with --dry-run: leave one of them out")


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
    precision: Precision | None = None
    """Of the matrix products of training; densities are in float32 either way. bfloat16 is faster on some CPUs."""
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
