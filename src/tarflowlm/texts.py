"""Requests on texts: write, edit or score them. One rule behind every front end.

A request is plain data and holds everything on which its result depends. It reads the texts as the
model's training text was read (`data.prompts`), seeds the random stream and calls the model.
`Pretrained`, the command line and the studio make requests, and show progress and results.

    Writing(prompts=("The people",), num_tokens=60).run(lm)
    Edit(text="The king of the land", rewrite=("king",)).run(lm).texts
    Score(texts=("The king of the land",)).run(lm)[0].total
"""

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from tarflowlm import chunks, editing
from tarflowlm.checks import as_integer, check_type, checked_seed
from tarflowlm.config import Decoder, Normalization
from tarflowlm.data import Tokenizer
from tarflowlm.data.prompts import BLANK, Reading, read, read_template
from tarflowlm.data.streaming import TextStream, first_stop
from tarflowlm.errors import UserError
from tarflowlm.evaluation.likelihood import bits
from tarflowlm.evaluation.scores import Scores, scores
from tarflowlm.generation import Generation, generate, generate_steps
from tarflowlm.generation.generate import usual_particles
from tarflowlm.generation.inversion import Decoders, as_decoders
from tarflowlm.generation.sampling import adjust_weights, row_generators
from tarflowlm.generation.writing import num_positions
from tarflowlm.model import as_flow
from tarflowlm.progress import SILENT, Progress
from tarflowlm.runs.checkpoint import Checkpoint

T = TypeVar("T")


def seeded_generator(seed: int) -> torch.Generator:
    """The random stream of a request. UserError for a seed out of range."""
    return torch.Generator().manual_seed(checked_seed(seed))


def as_texts(value: str | Sequence[str], name: str) -> tuple[str, ...]:
    """One text or several. UserError for anything else."""
    if isinstance(value, str):
        return (value,)
    is_list = isinstance(value, Sequence) and not isinstance(value, bytes)
    if not is_list or not all(isinstance(one, str) for one in value):
        check_type(value, name, str, "give a text, a str, or a list of them")
    return tuple(value)


def num_characters(tokenizer: Tokenizer, tokens: Tensor) -> Tensor:
    """Characters of texts [..., T], and at least 1."""
    counts = torch.from_numpy(tokenizer.characters_per_token)
    return counts[tokens.cpu()].sum(-1).clamp_min(1)


# ------------------------------------------------------------------------------------ writing


@dataclass(frozen=True, kw_only=True)
class Writing:
    """Texts to write: prompts continued, the blanks of a template filled in, or free samples."""

    prompts: tuple[str, ...] = ()
    """Texts to continue, each in `num` samples."""
    template: str | None = None
    """A text with a blank for every token to fill in."""
    blank: str = "_"
    """The character that marks a blank."""
    num_tokens: int | None = None
    """Length in tokens, given ones included; None: the trained context, or that of the template."""
    temperature: float | None = None
    """None: the model's own. The settings from here to `decoder` are those of `generate`."""
    top_k: int | None = None
    top_p: float | None = None
    particles: int | None = None
    """Candidates per sample; None: 16 where text stands behind a blank, else 1."""
    decoder: Decoders = "auto"
    num: int = 1
    """Samples, of each prompt."""
    stop: str | Sequence[str] = ()
    """A sample ends before the first of these texts that follows its prompt."""
    seed: int = 0
    normalize: Normalization | None = None
    """Normalisation of the given texts; None: that of the model's training text."""

    def __post_init__(self) -> None:
        """UserError for numbers out of range, before a model is loaded."""
        as_integer(self.num, "num", least=1)
        for name, value in (("length", self.num_tokens), ("particles", self.particles)):
            if value is not None:
                as_integer(value, name, least=1)
        adjust_weights(
            1.0 if self.temperature is None else self.temperature, self.top_k, self.top_p
        )
        as_decoders(self.decoder)
        seeded_generator(self.seed)
        if self.prompts and self.template is not None:
            raise UserError(
                "both a prompt and a template: put the prompt at the start of the template"
            )

    def read(self, lm: Checkpoint) -> "Draft":
        """The request as a model reads it. UserError for texts that it cannot read."""
        if self.template is not None:
            found = read_template(lm.tokenizer, self.template, self.blank, normalize=self.normalize)
            given = [found]
        else:
            given = [
                read(lm.tokenizer, prompt, name="prompt", normalize=self.normalize, goes_on=True)
                for prompt in self.prompts
            ]
        stops = tuple(
            read(lm.tokenizer, stop, name="stop", normalize=self.normalize).text
            for stop in as_texts(self.stop, "stop")
        )
        return Draft(lm, self, tuple(given), stops)

    def run(self, lm: Checkpoint, progress: Progress = SILENT) -> list[str]:
        """The texts: `num` of every prompt, in order."""
        draft = self.read(lm)
        progress.stage("sampling, positions", draft.num_positions)
        return [text for batch in draft.batches(progress) for text in batch.texts]

    def command(self, name: str) -> list[str]:
        """The shell command that writes the same with the model called `name`."""
        renamed = {"prompts": "prompt", "num_tokens": "length"}
        return ["tarflowlm", "sample", name, *_options(self, renamed)]


@dataclass(frozen=True)
class Draft:
    """A `Writing` as a model reads it."""

    lm: Checkpoint
    request: Writing
    given: tuple[Reading, ...]
    """The template, or the prompts."""
    stops: tuple[str, ...]

    @property
    def total(self) -> int:
        """Number of samples. Sample r continues prompt r // num."""
        return self.request.num * max(len(self.given), 1)

    @property
    def notices(self) -> list[str]:
        """A line for every text that is not read as it was given."""
        return _notices(self.given)

    @cached_property
    def num_tokens(self) -> int:
        """Tokens of every sample, given ones included."""
        if self.request.num_tokens is not None:
            return self.request.num_tokens
        if self.request.template is not None:
            return len(self.given[0].tokens)
        return self.lm.model.config.context

    @cached_property
    def particles(self) -> int:
        """Candidates for every sample."""
        if self.request.particles is not None:
            return self.request.particles
        return max((usual_particles(reading.tokens) for reading in self.given), default=1)

    @property
    def num_positions(self) -> int:
        """How often the progress advances for all samples."""
        return sum(
            num_positions(
                self.lm.model, self.num_tokens, max(len(self.prompt(row)) for row in rows)
            )
            for rows in self._rows_of_batches()
        )

    def batches(self, progress: Progress = SILENT) -> Iterator["Written"]:
        """The samples in batches of bounded memory, each as it is finished."""
        decoder = self.request.decoder
        for rows in self._rows_of_batches():
            if self.stops:
                written = exhaust(self.steps(rows, progress, decoder))
            else:
                # tokens that nobody reads one by one are not decoded one by one
                generation = self._asked(generate, rows, progress, decoder)
                written = Written(rows, self._texts(rows, generation.tokens), generation)
            # the choice of auto for the first batch serves the others
            decoder = written.generation.decoders or decoder
            yield written

    def pieces(
        self, row: int = 0, progress: Progress = SILENT, decoder: Decoders | None = None
    ) -> Generator[str, None, "Written"]:
        """The text of one sample, piece by piece as its tokens become final, up to its stop."""
        stream = TextStream(self.lm.tokenizer, self.stops, start=self._start(row))
        steps = self.steps(range(row, row + 1), progress, decoder)
        while True:
            try:
                piece = stream.add(next(steps)[0])
            except StopIteration as end:
                if piece := stream.close():
                    yield piece
                written: Written = end.value
                return written
            if piece:
                yield piece

    def steps(
        self, rows: range, progress: Progress = SILENT, decoder: Decoders | None = None
    ) -> Generator[Tensor, None, "Written"]:
        """The samples `rows` in one batch: yields the next final tokens [num, n] of all of them.

        The batch ends early once every sample has met a stop.
        """
        steps = self._asked(generate_steps, rows, progress, decoder)
        parts: list[Tensor] = []
        streams = [
            TextStream(self.lm.tokenizer, self.stops, start=self._start(row)) for row in rows
        ]
        while not (self.stops and all(stream.has_stopped for stream in streams)):
            try:
                parts.append(next(steps))
            except StopIteration as end:
                generation: Generation = end.value
                break
            if self.stops:
                for stream, tokens in zip(streams, parts[-1], strict=True):
                    stream.add(tokens)
            yield parts[-1]
        else:
            steps.close()
            generation = Generation(torch.cat(parts, 1))
        return Written(rows, self._texts(rows, generation.tokens), generation)

    def _asked(
        self,
        write: Callable[..., T],
        rows: range,
        progress: Progress = SILENT,
        decoder: Decoders | None = None,
    ) -> T:
        """The result of `generate` or `generate_steps` for the samples `rows`."""
        request = self.request
        prompts = [self.prompt(row) for row in rows]
        return write(
            self.lm.model,
            num_tokens=self.num_tokens,
            num=len(rows),
            prompt=pad_sequence(prompts, batch_first=True, padding_value=BLANK),
            particles=request.particles,
            temperature=self.temperature,
            top_k=request.top_k,
            top_p=request.top_p,
            decoder=request.decoder if decoder is None else decoder,
            # numbered over all batches: a sample does not depend on the others
            generator=row_generators(rows, seeded_generator(request.seed)),
            progress=progress,
        )

    @property
    def follows_loosely(self) -> bool:
        """Whether one candidate alone takes little notice of the given text."""
        config = self.lm.model.config
        is_exact = config.has_token_weights or (
            self.request.template is None and config.continues_exactly
        )
        return bool(self.given) and self.particles == 1 and not is_exact

    def prompt(self, row: int) -> Tensor:
        """The given tokens of a sample."""
        if not self.given:
            return torch.zeros(0, dtype=torch.long)
        return self.given[row // self.request.num].tokens

    @property
    def temperature(self) -> float:
        """The temperature that is asked for, or the model's own."""
        given = self.request.temperature
        return self.lm.run.temperature if given is None else given

    def _rows_of_batches(self) -> Iterator[range]:
        """Consecutive samples; prompts that fill a window are not mixed with others."""
        num, context = self.request.num, self.lm.model.config.context
        length = min(self.num_tokens, context)
        size = chunks.rows_at_once(length * self.particles, chunks.WRITTEN_TOKENS)
        longest = max((len(reading.tokens) for reading in self.given), default=0)
        first = 0
        while first < self.total:
            last = (first // num + 1) * num if longest >= context else self.total
            yield range(first, min(first + size, last))
            first = min(first + size, last)

    def _start(self, row: int) -> int:
        """Characters of the prompt of a sample, after which stops count."""
        if not self.given or self.request.template is not None:
            return 0
        return len(self.lm.tokenizer.decode(self.prompt(row).tolist()))

    def _texts(self, rows: range, tokens: Tensor) -> list[str]:
        texts = map(self.lm.tokenizer.decode, tokens.tolist())
        return [
            text[: first_stop(text, self.stops, self._start(row))]
            for row, text in zip(rows, texts, strict=True)
        ]


@dataclass(frozen=True)
class Written:
    """Samples of one batch."""

    rows: range
    """Their numbers among all samples of the request."""
    texts: list[str]
    """Each up to its first stop."""
    generation: Generation


def exhaust(steps: Generator[object, None, T]) -> T:
    """What a generator returns in the end."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            result: T = end.value
            return result


# ------------------------------------------------------------------------------------ editing


@dataclass(frozen=True, kw_only=True)
class Edit:
    """A text to edit: by default some of its words are drawn anew given all others."""

    text: str
    rewrite: str | Sequence[str] | None = None
    """Draw these pieces of the text anew."""
    everywhere: bool = False
    """With `rewrite`: every occurrence as whole words, not only the first."""
    replace: tuple[str, str] | None = None
    """Put the second text where the first one is, and keep the rest."""
    around: int | None = None
    """With `replace`: so many words on each side of it may be drawn anew."""
    counterfactual: tuple[str, str] | None = None
    """Put the second text where the first one is, and regenerate what follows from its noise."""
    toward: str | None = None
    """Take a stretch of this text; with `level`, interpolate between the states of both."""
    level: int | None = None
    """Change this state in latent space: 0 is the latents, the number of blocks the noise."""
    strength: float | None = None
    words: int | None = None
    pick: editing.Pick | None = None
    weight: float | None = None
    candidates: int | None = None
    temperature: float | None = None
    decoder: Decoder | None = None
    num: int = 1
    """Edits, each with its own noise."""
    seed: int = 0
    normalize: Normalization | None = None
    """Normalisation of all texts; None: that of the model's training text."""

    def __post_init__(self) -> None:
        """UserError for options that contradict each other or have no effect, and for numbers."""
        for name in ("replace", "counterfactual"):
            pair = getattr(self, name)
            if pair is not None and (isinstance(pair, str) or len(pair) != 2):
                raise UserError(f"{name} {pair!r}: give two texts, (old, new)")
        for name, least in (("num", 1), ("words", 1), ("candidates", 1), ("around", 0)):
            if getattr(self, name) is not None:
                as_integer(getattr(self, name), name, least=least)
        seeded_generator(self.seed)
        named = [name for name in NAMED if self._is_given(name)]
        if self.kind == "words":
            named = [name for name in ("words", "strength") if self._is_given(name)]
        if len(named) > 1:
            raise UserError(f"{named[0]} with {named[1]}: leave one of them out")
        known = editing.options_of(self.kind)
        for name in OPTIONS:
            if self._is_given(name) and name not in known:
                takes = ", ".join(sorted(known & OPTIONS))
                raise UserError(
                    f"{name} has no effect on this edit ({self.kind}): leave it out; it takes {takes}"
                )

    def _is_given(self, name: str) -> bool:
        value = getattr(self, name)
        return value is not None and value is not False

    @property
    def kind(self) -> str:
        """The name of the edit in `editing.EDITS`."""
        if self.toward is not None and self.level is not None:
            return "interpolate"
        return next((name for name in (*NAMED, "level") if self._is_given(name)), "words")

    def run(self, lm: Checkpoint, progress: Progress = SILENT) -> "Edited":
        """The edits. UserError for a baseline, and for what the model cannot read."""
        flow = as_flow(lm.model, "a discrete baseline has no latents to edit: give a flow")
        tokenizer = lm.tokenizer
        readings = [self._read(tokenizer, self.text, "text")]
        if self.toward is not None:
            readings.append(self._read(tokenizer, self.toward, "other text"))
        length = len(readings[0].tokens)
        if self.toward is not None:
            length = editing.common_length(readings[0].tokens, readings[1].tokens)
        options: dict[str, object] = {
            name: getattr(self, name) for name in OPTIONS if self._is_given(name)
        }
        if self.rewrite is not None:
            pieces = as_texts(self.rewrite, "rewrite")
            options["pieces"] = [self._piece(tokenizer, text, "piece") for text in pieces]
        pair = self.replace or self.counterfactual
        if pair is not None:
            old, new = pair
            options["old"] = self._piece(tokenizer, old, "text to replace")
            options["new"] = self._piece(tokenizer, new, "replacement")
        generator = seeded_generator(self.seed)
        # the text first, then the other one; every edit starts from the same latents
        source, *others = (
            editing.encode(flow, reading.tokens[None, :length], generator) for reading in readings
        )
        if others:
            options["other"] = others[0]
        rows = source.repeated(self.num)
        found = editing.EDITS[self.kind](
            editing.Source(flow, tokenizer, rows, generator, progress), **options
        )
        return Edited(tokenizer, tuple(readings), found)

    def _read(self, tokenizer: Tokenizer, text: str, name: str) -> Reading:
        return read(tokenizer, text, name=name, normalize=self.normalize)

    def _piece(self, tokenizer: Tokenizer, text: str, name: str) -> str:
        return self._read(tokenizer, text, name).text.strip()

    def command(self, name: str) -> list[str]:
        """The shell command that gives the same edits with the model called `name`."""
        return ["tarflowlm", "edit", name, *_options(self)]


NAMED = ("rewrite", "replace", "counterfactual", "toward")
"""Fields of `Edit` that name the edit."""
OPTIONS = frozenset(
    {
        "around",
        "candidates",
        "decoder",
        "everywhere",
        "level",
        "pick",
        "strength",
        "temperature",
        "weight",
        "words",
    }
)
"""Fields of `Edit` that are options of some kinds of edit only."""


@dataclass(frozen=True)
class Edited:
    """The edits of a text."""

    tokenizer: Tokenizer
    readings: tuple[Reading, ...]
    """The text, and the other one where there is one."""
    edit: editing.Edit

    @property
    def before(self) -> str:
        """The text before the edits, as the model reads it."""
        return self.tokenizer.decode(self.edit.before[0].tolist())

    @property
    def texts(self) -> list[str]:
        """The new texts."""
        return [self.tokenizer.decode(tokens) for tokens in self.edit.tokens.tolist()]

    @property
    def notices(self) -> list[str]:
        """A line for every text that is not read as it was given, or cut."""
        found = []
        length = min(len(reading.tokens) for reading in self.readings)
        for name, reading in zip(("text", "other text"), self.readings, strict=False):
            if reading.notice is not None:
                found.append(reading.notice)
            if (count := len(reading.tokens)) > length:
                found.append(
                    f"the {name} is cut from {count} to {length} tokens, the length of the other"
                )
        return found

    @property
    def bits_before(self) -> Tensor:
        """At most so many bits per character before each edit, [num]."""
        characters = num_characters(self.tokenizer, self.edit.before)
        return bits(self.edit.bound_before.cpu()) / characters

    @property
    def bits(self) -> Tensor:
        """At most so many bits per character after each edit, [num]."""
        return bits(self.edit.bound.cpu()) / num_characters(self.tokenizer, self.edit.tokens)


# ------------------------------------------------------------------------------------ scoring


@dataclass(frozen=True, kw_only=True)
class Score:
    """Texts of any length, whose tokens are given their bits."""

    texts: tuple[str, ...]
    samples: int = 8
    """Posterior samples averaged in the bound of a flow; the baseline is exact."""
    seed: int = 0
    normalize: Normalization | None = None
    """Normalisation of the texts; None: that of the model's training text."""

    def __post_init__(self) -> None:
        """UserError for numbers out of range, before a model is loaded."""
        as_integer(self.samples, "samples", least=1)
        seeded_generator(self.seed)

    def run(self, lm: Checkpoint, progress: Progress = SILENT) -> list["Scored"]:
        """The bits of every text."""
        readings = [read(lm.tokenizer, text, normalize=self.normalize) for text in self.texts]
        tokens = [reading.tokens for reading in readings]
        in_batches = scores(
            lm.model, tokens, samples=self.samples, seed=self.seed, progress=progress
        )
        found = []
        for reading, one in zip(readings, in_batches, strict=True):
            symbols = [lm.tokenizer.symbols[token] for token in reading.tokens.tolist()]
            found.append(Scored(one.bits, one.blocks, one.exact, symbols, reading=reading))
        return found

    def command(self, name: str) -> list[str]:
        """The shell command that scores the same with the model called `name`."""
        return ["tarflowlm", "score", name, *_options(self, {"texts": "text"})]


@dataclass(frozen=True, repr=False)
class Scored(Scores):
    """The bits of a text, and how the text was read."""

    symbols: Sequence[str] = ()
    """[T]: the tokens."""
    reading: Reading = field(kw_only=True)

    @property
    def sign(self) -> str:
        """The sign before its numbers: = if they are exact, else <=."""
        return "=" if self.exact else "<="

    @property
    def notice(self) -> str | None:
        """A line if the text is not read as it was given."""
        return self.reading.notice

    @property
    def bits_per_character(self) -> float:
        """Bits per character of the text as it was read."""
        return self.total / len(self.reading.text)


# ------------------------------------------------------------------------------------ helpers


def _options(request: Writing | Edit | Score, renamed: Mapping[str, str] = {}) -> list[str]:
    """The fields of a request as options of its command, without those at their defaults."""
    words: list[str] = []
    for one in fields(request):
        value = getattr(request, one.name)
        option = "--" + renamed.get(one.name, one.name).replace("_", "-")
        if value == one.default:
            continue
        if value is True:
            words.append(option)
        elif one.name in ("stop", "rewrite"):
            words += [word for text in as_texts(value, one.name) for word in (option, text)]
        elif isinstance(value, (tuple, list)):
            words += [option, *value]
        elif isinstance(value, float) and float(f"{value:g}") == value:
            words += [option, f"{value:g}"]
        else:
            words += [option, str(value)]
    return words


def _notices(readings: Sequence[Reading]) -> list[str]:
    found = dict.fromkeys(reading.notice for reading in readings)
    return [notice for notice in found if notice is not None]
