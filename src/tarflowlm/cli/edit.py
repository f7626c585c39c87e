"""`tarflowlm edit`: some words of a text resampled, or its states changed in latent space."""

from dataclasses import dataclass
from typing import Annotated, Literal

from tarflowlm.cli.options import (
    TEMPERATURE,
    Count,
    Device,
    Model,
    ModelName,
    Normalize,
    Number,
    PrintJson,
    Text,
    arg,
    check_at_least_one,
)
from tarflowlm.config import Decoder
from tarflowlm.errors import UserError

EDIT_OPTIONS = {
    "words": ("strength", "words", "pick", "candidates", "temperature"),
    "rewrite": ("candidates", "temperature"),
    "toward": ("weight", "candidates", "temperature", "level", "decoder"),
    "replace": (),
    "level": ("strength", "words", "pick", "level", "decoder"),
}
"""The kinds of `edit`, and which of the other arguments each of them uses."""


@dataclass(frozen=True)
class Args:
    """Arguments of `tarflowlm edit`."""

    text: Annotated[str, arg("TEXT")]
    """The text to edit."""
    directory: Model = None
    model: ModelName = None
    strength: Number = None
    """Share of the words to redraw, given all the others: 0 keeps the text, 0.1 (the default) changes a word here and
    there, 1 leaves none. With --level: how much noise the states get."""
    words: Count = None
    """Number of words to redraw, in place of a share. With --level: the noise goes to so many words only."""
    pick: Annotated[Literal["random", "unlikely"] | None, arg()] = None
    """Which words: at random (the default), or those the model expects least."""
    rewrite: Annotated[tuple[str, ...] | None, arg("TEXT ...")] = None
    """Redraw these pieces of the text, words or more, given everything else."""
    candidates: Count = None
    """Candidates for every redrawn piece (32), of which one is taken by how well the rest of the text follows it."""
    temperature: Annotated[float | None, arg("FLOAT", f"Temperature of the candidates (0.7): {TEMPERATURE}")] = None
    toward: Text = None
    """Take a stretch of this text of the same length, in its place, and redraw what it cuts. With --level:
    interpolate between the states of the two texts."""
    weight: Number = None
    """With --toward: the share of words to take (0.5); 0 is the text, 1 the other text."""
    replace: Annotated[tuple[str, str] | None, arg("OLD NEW")] = None
    """OLD NEW: replace the first OLD, as a word if it is one, by NEW, of as many tokens, and regenerate the rest from
    its noise."""
    level: Count = None
    """Change a state in latent space, as in the paper: 0 is the latents, the number of blocks is the noise. Re-noises
    by h -> sqrt(1 - s^2) h + s eps with s the strength, or interpolates."""
    num: int = 1
    """Number of edits, each with its own noise (of --replace that is the noise of the new words alone)."""
    seed: int = 0
    """The same seed gives the same edits."""
    decoder: Annotated[Decoder | None, arg()] = None
    """With --level: how to invert a block, position by position, in parallel sweeps, or the cheaper of the two
    (auto, the default)."""
    normalize: Normalize = None
    device: Device = "auto"
    json: PrintJson = False

    def __post_init__(self) -> None:
        check_at_least_one(self, "num", "candidates", "words")
        if self.strength is not None and not 0 <= self.strength <= 1:
            raise UserError(f"strength {self.strength}: must be between 0 (no change) and 1 (all of it is new)")
        if self.weight is not None and not 0 <= self.weight <= 1:
            raise UserError(f"weight {self.weight}: must be between 0 (the text) and 1 (the other text)")
        given = [name for name in ("rewrite", "toward", "replace") if getattr(self, name) is not None]
        if len(given) > 1:
            raise UserError(f"--{' and --'.join(given)} are different edits: choose one")
        kind = self.kind
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

    @property
    def kind(self) -> str:
        """The name of the edit in `editing.EDITS`."""
        given = [name for name in ("rewrite", "toward", "replace") if getattr(self, name) is not None]
        return (given or ["level" if self.level is not None else "words"])[0]


def run(args: Args) -> None:
    from tarflowlm.cli.edits import run_edit

    run_edit(args)
