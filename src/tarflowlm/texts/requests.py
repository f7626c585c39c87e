"""Requests as plain data. No torch here: their fields are options of the command line, too.

The docstring of a field is the help of its option.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, TypedDict

import tyro

from tarflowlm import options
from tarflowlm.config import Decoder, Pick
from tarflowlm.errors import UserError, unknown
from tarflowlm.options import arg
from tarflowlm.schema import (
    Count,
    Length,
    Seed,
    Share,
    Temperature,
    TopP,
    Whole,
    check_type,
    checked,
)

if TYPE_CHECKING:
    from tarflowlm.generation.gaps import Allowed
    from tarflowlm.generation.inversion import Decoders


@dataclass(frozen=True, kw_only=True)
class Request:
    """Plain data that holds everything on which the result depends."""

    COMMAND: ClassVar[str]
    seed: int = 0
    """The same seed gives the same result."""
    normalize: options.Normalize = None

    def __post_init__(self) -> None:
        """UserError for numbers out of range, before a model is loaded."""
        # a plain integer, also of one of NumPy
        object.__setattr__(self, "seed", checked(self.seed, Seed, "seed"))

    def command(self, name: str) -> list[str]:
        """The shell command that gives the same with the model called `name`."""
        words = ["tarflowlm", self.COMMAND, name]
        shared = fields(Request)
        for one in (*fields(self)[len(shared) :], *shared):
            value = getattr(self, one.name)
            if value == one.default:
                continue
            option = options.flag(one.name)
            many = isinstance(value, (tuple, list))
            if isinstance(value, bool):
                words.append(option)
            elif many and one.name not in ("stop", "rewrite"):
                words += [option, *value]
            else:
                for text in value if many else [str(value)]:
                    # else it would be read as an option
                    words += [f"{option}={text}"] if text.startswith("-") else [option, text]
        return words


@dataclass(frozen=True, kw_only=True)
class Writing(Request):
    """Texts to write: prompts continued, the blanks of a template filled in, or free samples."""

    COMMAND = "sample"
    prompt: Annotated[str | Sequence[str] | None, arg("TEXT", constructor=str)] = None
    """Text to continue. Exact for one block; an approximation for more, see --particles."""
    template: options.Text = None
    """Text with a blank for every token to fill in: "the ____ of ____". A BPE token brings the
    space before it. [...] stands for 1 to 8 tokens, [...12] for 1 to 12.
    """
    blank: Annotated[str, arg("CHARACTER")] = "_"
    """Character that marks a blank in the template; after a backslash it is itself."""
    without: Annotated[str, arg("LETTERS")] = ""
    """Write nothing with these letters, small or capital. Given text may have them."""
    contains: options.Text = None
    """Words that follow the prompt somewhere, unless it has them; the first one begins there."""
    allowed: Annotated[object, tyro.conf.Fixed, tyro.conf.Suppress] = None
    """The tokens that may be drawn, as `generate` takes them."""
    num_tokens: Annotated[int | None, arg("INT", name="length")] = None
    """Tokens per sample, including the prompt; the default is the trained context. Beyond that the
    window slides: its last half is the next prompt.
    """
    max_new_tokens: options.Count = None
    """Tokens after the prompt, instead of --length."""
    temperature: options.Temperature = None
    top_k: options.TopK = None
    top_p: options.TopP = None
    particles: options.Count = None
    """Candidates per sample, weighted by the likelihood of the given tokens; exact in the limit of
    many. The default is 16 under a constraint and with text behind a blank, else 1.
    """
    decoder: Annotated[Decoder | Sequence[Decoder], arg(constructor=Decoder)] = "auto"
    """Invert blocks position by position, in sweeps, or by the cheaper; or draw the last block."""
    num: int = 1
    """Number of samples."""
    stop: Annotated[
        str | Sequence[str],
        tyro.conf.UseAppendAction,
        arg("TEXT", constructor=tuple[str, ...]),
    ] = ()
    """End a sample before this text, once it follows the prompt. May be given several times."""
    stop_at_end: Annotated[
        bool, arg(help="Go on behind the end of a document, with the next one.", name="stop")
    ] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        checked(self.num, Length, "num")
        checked(self.stop_at_end, bool, "stop_at_end")
        checked(self.num_tokens, Length | None, "length")
        if self.max_new_tokens is not None:
            checked(self.max_new_tokens, Length, "max_new_tokens")
            if self.num_tokens is not None or self.template is not None:
                other = "a length" if self.num_tokens is not None else "a template"
                raise UserError(f"max_new_tokens {self.max_new_tokens} and {other}: give one")
        checked(self.particles, Count | None, "particles")
        checked(self.temperature, Temperature | None, "temperature")
        checked(self.top_k, Count | None, "top_k")
        checked(self.top_p, TopP | None, "top_p")
        checked(self.decoder, Decoder | Sequence[Decoder], "decoder")
        if self.prompt is not None and self.template is not None:
            raise UserError("a prompt and a template: put the prompt at the start of the template")
        for name in ("prompt", "stop"):
            texts = getattr(self, name)
            if texts is not None and "" in as_texts(texts, name):
                raise UserError(f"the {name} is empty: give at least one character")
        if self.template is not None and self.stop:
            raise UserError(
                f"stop {self.stop!r} and a template: it would cut given text, leave it out"
            )
        for name in ("without", "contains"):
            check_type(getattr(self, name), name, (str, type(None)), "give a text, a str")
        if self.contains is not None:
            if self.stop:
                raise UserError(f"contains and stop {self.stop!r}: a stop may cut the words off")
            if self.template is not None:
                raise UserError("contains and a template: put [...] and the words into it")
            if not self.contains.strip():
                raise UserError(f"contains {self.contains!r}: give some words, or leave it out")
        if self.without and self.allowed is not None:
            raise UserError(f"without {self.without!r} and allowed: put both into one mask")


@dataclass(frozen=True, kw_only=True)
class Edit(Request):
    """A text to edit: by default some of its words are drawn anew given all others."""

    COMMAND = "edit"
    text: Annotated[str, arg("TEXT")]
    """The text to edit."""
    rewrite: Annotated[
        str | Sequence[str],
        tyro.conf.UseAppendAction,
        arg("PIECE", constructor=tuple[str, ...]),
    ] = ()
    """Draw this piece of the text anew, a word or more, given everything else. May be given several
    times.
    """
    everywhere: options.Flag = False
    """With --rewrite: every occurrence, as whole words."""
    replace: Annotated[tuple[str, str] | None, arg("OLD NEW")] = None
    """Put NEW where OLD first stands, as a word if it is one, and keep the rest."""
    around: Annotated[int, arg("INT")] = 1
    """With --replace: words on each side that may be drawn anew."""
    level: options.Count = None
    """Change a state in latent space, as in the paper: 0 is the latents, the number of blocks is
    the noise. Adds noise by h -> sqrt(1 - s^2) h + s eps, with s the strength.
    """
    strength: Annotated[float, arg("FLOAT")] = 0.1
    """Share of the words to draw anew, given all the others: 0 keeps the text, 0.1 changes a word
    here and there, 1 leaves none. With --level: how much noise the states get.
    """
    words: options.Count = None
    """Number of words to draw anew, not a share. With --level: only these get noise."""
    pick: Annotated[Pick, arg()] = "random"
    """Words to draw anew: random ones, or the most unlikely ones."""
    candidates: Annotated[int, arg("INT")] = 32
    """Candidates for every piece that is drawn anew, weighted by the rest of the text."""
    temperature: options.Temperature = None
    decoder: Annotated[Decoder, arg()] = "auto"
    """With --level: how to invert a block, see `tarflowlm sample --help`."""
    num: int = 1
    """Number of edits, each with its own noise."""

    EXCLUSIVE: ClassVar[dict[str, tuple[str, ...]]] = {
        "rewrite": ("replace", "level", "strength", "words", "pick"),
        "replace": ("level", "strength", "words", "pick"),
        "level": ("candidates", "temperature"),
    }
    NEEDS: ClassVar[dict[str, tuple[str, ...]]] = {
        "everywhere": ("rewrite",),
        "around": ("replace",),
        "decoder": ("level",),
    }

    def __post_init__(self) -> None:
        """UserError for options that contradict each other, and for numbers."""
        super().__post_init__()
        pair = self.replace
        if pair is not None and not (isinstance(pair, (tuple, list)) and len(pair) == 2):
            raise UserError(f"replace {pair!r}: give two texts, (old, new)")
        checked(self.num, Length, "num")
        checked(self.everywhere, bool, "everywhere")
        checked(self.words, Count | None, "words")
        checked(self.candidates, Count, "candidates")
        checked(self.around, Whole, "around")
        checked(self.level, Whole | None, "level")
        checked(self.strength, Share, "strength")
        checked(self.temperature, Temperature | None, "temperature")
        checked(self.pick, Pick, "pick")
        checked(self.decoder, Decoder, "decoder")
        options.check(self, exclusive=self.EXCLUSIVE, needed=self.NEEDS)
        # to a state both apply: noise of a strength, at a number of words
        if self.level is None and self.words is not None and self.strength != 0.1:
            raise UserError(f"words {self.words} with strength: leave one of them out")
        if self.level is not None and self.words is None and self.pick != "random":
            raise UserError(f"pick {self.pick!r} has no effect on a whole state: add words")

    @property
    def kind(self) -> Literal["words", "rewrite", "replace", "level"]:
        """What the edit changes."""
        if self.level is not None:
            return "level"
        if self.rewrite:
            return "rewrite"
        return "words" if self.replace is None else "replace"


@dataclass(frozen=True, kw_only=True)
class Score(Request):
    """Texts of any length, whose tokens are given their bits."""

    COMMAND = "score"
    text: Annotated[str | Sequence[str] | None, arg("TEXT", constructor=str)] = None
    """The text to score."""
    samples: int = 8
    """Posterior samples averaged in the bound of a flow; the baseline is exact."""

    def __post_init__(self) -> None:
        super().__post_init__()
        checked(self.samples, Count, "samples")


def as_texts(value: str | Sequence[str], name: str) -> tuple[str, ...]:
    """One text or several. UserError for anything else."""
    if isinstance(value, str):
        return (value,)
    is_list = isinstance(value, Sequence) and not isinstance(value, bytes)
    if not is_list or not all(isinstance(one, str) for one in value):
        check_type(value, name, str, "give a text, a str, or a list of them")
    return tuple(value)


class WritingOptions(TypedDict, total=False):
    """The options of `write`, `fill` and `stream`: fields of `Writing`."""

    num_tokens: int | None
    max_new_tokens: int | None
    temperature: float | None
    top_k: int | None
    top_p: float | None
    particles: int | None
    decoder: "Decoders"
    blank: str
    without: str
    contains: str | None
    allowed: "Allowed | None"
    stop: str | Sequence[str]
    stop_at_end: bool
    seed: int


class EditOptions(TypedDict, total=False):
    """The options of `edit`: fields of `Edit`."""

    rewrite: str | Sequence[str]
    everywhere: bool
    replace: tuple[str, str] | None
    around: int
    level: int | None
    strength: float
    words: int | None
    pick: Pick
    candidates: int
    temperature: float | None
    decoder: Decoder
    seed: int


def check_names(given: Iterable[str], options: type) -> None:
    """UserError for a name that is not among the `options`, a TypedDict."""
    for name in given:
        if name not in options.__annotations__:
            raise unknown("option", name, options.__annotations__)
