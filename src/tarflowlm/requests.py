"""Requests as plain data. No torch here: their fields are options of the command line, too.

The type of a field holds its range, and its docstring is the help of its option.
`generation.plan`, `editing` and `evaluation` decide how a request is answered.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

import tyro

from tarflowlm import options
from tarflowlm.config import Decoder, Pick, Unit
from tarflowlm.errors import UserError
from tarflowlm.options import Normalized, Seeded, arg
from tarflowlm.schema import (
    Checked,
    Count,
    Length,
    Million,
    NotNegative,
    Share,
    TopP,
    Whole,
    checked,
)

if TYPE_CHECKING:
    from torch import Tensor

Split = Literal["train", "valid", "test", "all"]
Repeated = Annotated[
    str | Sequence[str], tyro.conf.UseAppendAction, arg("TEXT", constructor=tuple[str, ...])
]
"""Texts of an option that may be given several times."""


@dataclass(frozen=True, kw_only=True)
class Request(Seeded, Normalized):
    """Plain data that holds everything on which the result depends."""

    COMMAND: ClassVar[str]
    REPEATED: ClassVar[tuple[str, ...]] = ()
    """Fields whose option may be given several times."""

    def command(self, name: str) -> list[str]:
        """The shell command that gives the same with the model called `name`.

        UserError for what has no option: several texts at once, and a mask of tokens.
        """
        words = ["tarflowlm", self.COMMAND, name]
        # fields of the class itself before the fields of its bases
        given = self.given()
        owners = [vars(kind).get("__annotations__", {}) for kind in type(self).__mro__]
        for one in (one for names in owners for one in fields(self) if one.name in names):
            if one.name not in given:
                continue
            value = getattr(self, one.name)
            option = options.flag(one.name)
            if isinstance(value, bool):
                words.append(option)
                continue
            if one.name == "replace":
                words += [option, *value]
                continue
            if one.name in ("allowed", "adjust"):
                raise UserError(f"{one.name} has no option of a command: leave it out")
            texts = value if isinstance(value, tuple) else (str(value),)
            if len(texts) != 1 and one.name not in self.REPEATED:
                what = f"{one.name} of {len(texts)} texts has no option of a command"
                raise UserError(f"{what}: ask for the command of each")
            for text in texts:
                # a text that begins with a dash would be read as an option
                words += [f"{option}={text}"] if text.startswith("-") else [option, text]
        return words


@dataclass(frozen=True, kw_only=True)
class Draws(Request):
    """A request with one or several random results for every text."""

    num: Annotated[Length | None, arg("INT")] = None
    """Number of results for every text (1)."""

    @property
    def num_each(self) -> int:
        """Results for every text: `num`, or one."""
        return self.num or 1


@dataclass(frozen=True, kw_only=True)
class Tempered(Checked):
    """The option `temperature`."""

    temperature: Annotated[NotNegative | None, arg("FLOAT")] = None
    """Raise the probabilities of tokens to the power 1 / temperature; 0 takes the most probable
    token. The default is the model's own, and 0.7 for edits by models that have weights of tokens.
    """


@dataclass(frozen=True, kw_only=True)
class Sampling(Tempered):
    """How tokens are drawn. An option of `sample` is a field here, and its effect is below, in
    `Adjustment` and for compiled draws in `compiled.draw.Limits`.
    """

    top_k: Annotated[Count | None, arg("INT")] = None
    """Keep the k most probable tokens."""
    top_p: Annotated[TopP | None, arg("FLOAT")] = None
    """Keep the fewest tokens that together have at least this probability. The default is the
    model's own, unless a temperature or a template is given; then it is 1. Under a constraint
    the model's own one counts among the tokens that may come.
    """
    min_p: Annotated[Share | None, arg("FLOAT")] = None
    """Keep the tokens whose probability is at least this times the largest one."""
    particles: Annotated[Count | None, arg("INT")] = None
    """Candidates per sample, weighted by the likelihood of the given tokens; exact in the limit of
    many. The default is 16 under a constraint and with text after a blank, doubled up to 64 while
    fewer than about 4 of them count; else 1.
    """
    decoder: Annotated[Decoder, arg()] = "auto"
    """steps: one token at a time; sweeps: invert noise in all blocks, in parallel; auto: sweeps in
    the blocks where they cost less.
    """
    adjust: Annotated[object, tyro.conf.Fixed, tyro.conf.Suppress] = None
    """A sampler of your own: a function of log-weights of tokens [..., V] to log-weights, before
    the other options. In Python only.
    """

    def adjustment(self, vocab_size: int, banned: int | None = None) -> "Adjustment | None":
        """What these options and a `banned` token do to log-weights; None for nothing."""
        found = Adjustment(self, vocab_size, banned)
        return None if found.is_plain and banned is None else found


ADJUSTMENTS = {one.name for one in fields(Sampling)} - {"particles", "decoder"}
"""Options that change the weights of tokens."""


class Adjustment:
    """A map of log-weights of tokens [..., V] to log-weights (docs/math.md, 7).

    It applies the function `adjust`, raises weights to the power 1 / `temperature`, keeps the
    `top_k` largest, then the fewest of the largest whose probabilities add up to `top_p`, then all
    of at least `min_p` times the largest probability (Nguyen et al. 2024). Dropped tokens, and the
    `banned` one, get the lowest log-weight of the format, or -inf: probability zero.
    """

    def __init__(self, options: Sampling, vocab_size: int, banned: int | None) -> None:
        # at temperature 0, and at what float32 may round to it, all weight is on one token
        is_greedy = options.temperature is not None and options.temperature < 1e-30
        top_k = 1 if is_greedy else options.top_k or vocab_size
        self.temperature = 1.0 if is_greedy else options.temperature or 1.0
        self.top_k = top_k if top_k < vocab_size else None
        # rounding lets a cumulative sum reach 1 before the last tokens
        self.top_p = options.top_p if (options.top_p or 1.0) < 1.0 else None
        self.min_p = options.min_p or None
        self.banned = banned
        own = options.adjust
        if own is not None and not callable(own):
            raise UserError(f"adjust {own!r:.40}: give a function of log-weights [..., V]")
        self.own = own
        limits = {"raise top-k": self.top_k, "raise top-p": self.top_p, "lower min-p": self.min_p}
        self.remedies = [step for step, limit in limits.items() if limit is not None]
        """What makes each limit drop fewer tokens."""
        self.is_plain = self.temperature == 1.0 and not self.remedies and own is None
        """Whether only the banned token is dropped."""
        self.limits = (
            -1 if banned is None else banned,
            self.temperature,
            self.top_k or vocab_size,
            self.top_p or 1.0,
            self.min_p or 0.0,
        )
        """All of it, as `compiled.draw.Limits`."""

    def __call__(self, log_w: "Tensor") -> "Tensor":
        import torch

        lowest = torch.finfo(log_w.dtype).min
        if self.own is not None:
            log_w = self._adjusted(log_w)
        if self.banned is not None:
            index = torch.tensor([self.banned], device=log_w.device)
            log_w = log_w.index_fill(-1, index, lowest)
        if self.is_plain:
            return log_w
        log_w = torch.log_softmax(log_w / self.temperature, dim=-1)
        if self.top_k is not None:
            # by index, so that ties do not keep more
            kept = log_w.topk(self.top_k, dim=-1).indices
            is_dropped = torch.ones_like(log_w, dtype=torch.bool).scatter(-1, kept, False)
            log_w = log_w.masked_fill(is_dropped, lowest)
        if self.top_p is not None:
            ordered, order = log_w.softmax(-1).sort(dim=-1, descending=True)
            # a token is kept when the mass before it has not reached the share
            is_after = ordered.cumsum(-1) - ordered >= self.top_p
            log_w = log_w.masked_fill(is_after.scatter(-1, order, is_after), lowest)
        if self.min_p is not None:
            least = log_w.amax(-1, True) + math.log(self.min_p)
            log_w = log_w.masked_fill(log_w < least, lowest)
        return log_w

    def _adjusted(self, log_w: "Tensor") -> "Tensor":
        import torch

        found = self.own(log_w) if callable(self.own) else log_w
        if not torch.is_tensor(found) or found.shape != log_w.shape:
            shape = list(found.shape) if torch.is_tensor(found) else type(found).__name__
            wanted = f"return log-weights of the shape {list(log_w.shape)}"
            raise UserError(f"adjust returned {shape}: {wanted}")
        # a function may say -inf
        return found.to(log_w).clamp_min(torch.finfo(log_w.dtype).min)


@dataclass(frozen=True, kw_only=True)
class Writing(Sampling, Draws):
    """Texts to write: prompts continued, the blanks of a template filled in, or free samples."""

    COMMAND = "sample"
    NAMES: ClassVar = options.NAMES
    EXCLUSIVE: ClassVar = {
        "template": ("prompt", "contains", "stop", "stop_at_end", "max_new_tokens"),
        "max_new_tokens": ("length",),
        "contains": ("stop",),
        "without": ("allowed",),
        "sentences": ("template", "stop", "stop_at_end", "words"),
        "words": ("template", "stop", "stop_at_end"),
        "matches": (
            *("template", "contains", "without", "allowed"),
            *("stop", "stop_at_end", "sentences", "words"),
        ),
    }
    NEEDS: ClassVar = {"blank": ("template",)}
    REPEATED = ("stop", "without", "contains")

    prompt: Annotated[str | Sequence[str] | None, arg("TEXT", constructor=str)] = field(
        default=None, kw_only=False
    )
    """Text to continue: exactly where all blocks run left to right, else by an approximation, see
    --particles.
    """
    template: Annotated[str | Sequence[str] | None, arg("TEXT", constructor=str)] = None
    """Text with a blank for every token to fill in: "the ____ of ____". With word pieces, a blank
    includes the space before it. [...] or […] is 1 to 8 tokens, [...12] 1 to 12. With --length
    the text goes on after it, and ends before that only if the template has a [...].
    """
    blank: Annotated[str, arg("CHARACTER")] = "_"
    """Character that marks a blank in the template; a backslash before it makes it plain text."""
    without: Repeated = ()
    """A single letter, or whole words, that must not come, small or capital. Given text may have
    them. May be given several times.
    """
    contains: Repeated = ()
    """Whole words that must appear after the prompt, after a space, unless it has them. May be
    given several times: all of them appear, in any order.
    """
    matches: Annotated[str | None, arg("REGEX")] = None
    """A regular expression that matches all of the text after the prompt. The text ends where the
    expression does. Needs the package llguidance.
    """
    allowed: Annotated[object, tyro.conf.Fixed, tyro.conf.Suppress] = None
    """The tokens that may be drawn, as `generate` takes them."""
    sentences: options.Integer = None
    """End a sample after this many sentences, those of the prompt included, and not before."""
    words: options.Integer = None
    """End a sample after this many words, those of the prompt included, and not before."""
    length: Annotated[Length | None, arg("INT")] = None
    """Tokens per sample, including the prompt; the default is the trained context. Beyond that the
    window slides: its last half is the next prompt.
    """
    max_new_tokens: Annotated[Length | None, arg("INT")] = None
    """Tokens after the prompt, instead of --length."""
    stop: Repeated = ()
    """End a sample before this text occurs after the prompt. May be given several times."""
    # a flag of another default than False begins with "no-"
    stop_at_end: Annotated[bool, arg(name=options.NAMES["stop_at_end"].removeprefix("no-"))] = True
    """Continue past the end of a document."""

    def rules(self) -> Iterator[tuple[str, str]]:
        # an empty prompt alone means no prompt
        if not isinstance(self.prompt, str | None) and "" in self.prompt:
            yield "prompt", "give at least one character"
        if "" in as_texts(self.stop):
            yield "stop", "give at least one character"
        for name in ("contains", "without"):
            value = getattr(self, name)
            if not all(map(str.strip, as_texts(value))) and (name, value) != ("without", ""):
                yield name, "give some words, or leave it out"

    @property
    def may_end(self) -> bool:
        """Whether a text ends with its document: not within a template."""
        goes_on = self.template is None or self.length is not None
        return goes_on and self.stop_at_end and self.count is None

    @property
    def count(self) -> tuple[Unit, int] | None:
        """What a text has a given number of, and the number."""
        if self.sentences is not None:
            return "sentences", self.sentences
        return None if self.words is None else ("words", self.words)


@dataclass(frozen=True, kw_only=True)
class Edit(Tempered, Draws):
    """A text to edit: by default some of its words are resampled given all others."""

    COMMAND = "edit"
    EXCLUSIVE: ClassVar = {
        "rewrite": ("replace", "level", "strength", "words", "pick"),
        "replace": ("level", "strength", "words", "pick"),
        "level": ("candidates", "temperature"),
    }
    NEEDS: ClassVar = {"everywhere": ("rewrite",), "around": ("replace",), "decoder": ("level",)}
    REPEATED = ("rewrite",)

    text: Annotated[str, arg("TEXT")] = field(kw_only=False)
    """The text to edit."""
    rewrite: Annotated[
        str | Sequence[str],
        tyro.conf.UseAppendAction,
        arg("PIECE", constructor=tuple[str, ...]),
    ] = ()
    """Resample this piece of the text, whole words, given everything else. May be given several
    times.
    """
    everywhere: options.Flag = False
    """With --rewrite: every occurrence."""
    replace: Annotated[tuple[str, str] | None, arg("OLD NEW")] = None
    """Put NEW in place of the first OLD, whole words, once per edit. The words next to it may
    change, too, so that the text reads well: see --around.
    """
    around: Annotated[Whole, arg("INT")] = 1
    """With --replace: words on each side that may change; 0 keeps all the rest."""
    level: Annotated[Whole | None, arg("INT")] = None
    """Change a state in latent space, as in the paper: 0 is the latents, the number of blocks is
    the noise. Adds noise by h -> sqrt(1 - s^2) h + s eps, with s the strength.
    """
    strength: Annotated[Share, arg("FLOAT")] = 0.1
    """Share of the words to resample: 0 keeps the text, 0.1 changes a word here and there, 1 leaves
    none. With --level: how much noise the state gets.
    """
    words: Annotated[Count | None, arg("INT")] = None
    """Number of words to resample, instead of a share. With --level: only these words get noise."""
    pick: Annotated[Pick, arg()] = "random"
    """Words to resample: random ones, or the most unlikely ones."""
    candidates: Annotated[Count, arg("INT")] = 32
    """Candidates for every resampled piece, weighted by the rest of the text."""
    decoder: Annotated[Decoder, arg()] = "auto"
    """With --level: how to invert a block, see `tarflowlm sample --help`."""

    def rules(self) -> Iterator[tuple[str, str]]:
        if "" in as_texts(self.rewrite):
            yield "rewrite", "give at least one character"
        # a state takes both: noise of a strength, at a number of words
        if self.level is None and self.words is not None and self.strength != 0.1:
            yield "words", "leave it or the strength out"
        if self.level is not None and self.words is None and self.pick != "random":
            yield "pick", "has no effect on a whole state, add words"

    @property
    def kind(self) -> Literal["words", "rewrite", "replace", "level"]:
        """The kind of edit."""
        if self.level is not None:
            return "level"
        if self.rewrite:
            return "rewrite"
        return "words" if self.replace is None else "replace"


@dataclass(frozen=True, kw_only=True)
class Score(Request):
    """Texts of any length whose tokens are scored in bits."""

    COMMAND = "score"
    REPEATED = ("text",)
    text: Repeated = field(default=(), kw_only=False)
    """The text to score. Several, each with an option of its own, are compared."""
    samples: Million = 8
    """Posterior samples averaged in the bound of a flow; the baseline is exact."""


@dataclass(frozen=True, kw_only=True)
class Evaluation(Request):
    """A text whose likelihood is measured in windows."""

    COMMAND = "eval"
    data: Annotated[str | Path | Sequence[str] | None, arg("SOURCE", constructor=str)] = field(
        default=None, kw_only=False
    )
    """Another text than the run's own: corpus name, file or prepared directory."""
    split: Annotated[Split | None, arg("SPLIT", constructor=str)] = None
    """Part of the text: train, valid or test, 90/5/5, or all of it. The default is test, or all of
    a --data file that the model was not trained on.
    """
    samples: Million = 1
    """Posterior samples: 1 gives the ELBO, more the importance-weighted bound and the ELBO."""
    windows: options.Integer = None
    """At most this many windows, evenly spaced; the default is all of them."""
    precision: Annotated[Literal["float32", "bfloat16"], arg()] = "float32"
    """Format of the products in Transformers. Where bfloat16 is native it takes two thirds of the
    time, and moves a result by some 0.0005 nats per token.
    """
    stride: options.Integer = None
    """Tokens between window starts (default: the context). A smaller number lets windows overlap,
    for the baseline and one-block flows.
    """


def as_texts(value: str | Sequence[str], name: str = "text") -> tuple[str, ...]:
    """One text or several. UserError for anything else."""
    found = checked(value, str | Sequence[str], name)
    return (found,) if isinstance(found, str) else tuple(found)
