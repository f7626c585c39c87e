"""Requests on texts: write, edit or score them. One rule behind every front end.

A request is plain data and holds everything on which its result depends. It reads the texts as the
model's training text was read (`data.prompts`), seeds the random stream and calls the model.
`Pretrained`, the command line and the studio make requests, and show progress and results.

    Writing(prompts=("The people",), num_tokens=60).run(lm)
    Edit(text="The king of the land", rewrite=("king",)).run(lm).texts
    Score(texts=("The king of the land",)).run(lm)[0].total
"""

import codecs
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from tarflowlm import chunks, editing
from tarflowlm.checks import as_integer, checked_seed
from tarflowlm.config import Decoder, Normalization
from tarflowlm.data import Tokenizer
from tarflowlm.data.prompts import BLANK, Reading, read, read_template
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
    return torch.Generator().manual_seed(checked_seed(as_integer(seed, "seed")))


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
    num: int = 1
    """Samples, of each prompt."""
    num_tokens: int | None = None
    """Length in tokens, given ones included; None: the trained context, or that of the template."""
    temperature: float | None = None
    """None: the model's own. The settings from here to `decoder` are those of `generate`."""
    top_k: int | None = None
    top_p: float | None = None
    particles: int | None = None
    """Candidates per sample; None: 16 where text stands behind a blank, else 1."""
    decoder: Decoders = "auto"
    stop: tuple[str, ...] = ()
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
            for stop in self.stop
        )
        return Draft(lm, self, tuple(given), stops)

    def run(self, lm: Checkpoint, progress: Progress = SILENT) -> list[str]:
        """The texts: `num` of every prompt, in order."""
        draft = self.read(lm)
        progress.stage("sampling, positions", draft.num_positions)
        return [text for batch in draft.batches(progress) for text in batch.texts]

    def steps(
        self, lm: Checkpoint, progress: Progress = SILENT
    ) -> Generator[Tensor, None, "Written"]:
        """All samples at once: yields the next final tokens [num, n] of all of them."""
        draft = self.read(lm)
        return draft.steps(range(draft.total), progress)

    def command(self, name: str) -> list[str]:
        """The shell command that writes the same with the model called `name`."""
        assert len(self.prompts) <= 1, "one prompt, or none"
        words = ["tarflowlm", "sample", name]
        for prompt in self.prompts:
            words += ["--prompt", prompt]
        for name_here, option in (
            ("template", "template"),
            ("blank", "blank"),
            ("num_tokens", "length"),
            ("temperature", "temperature"),
            ("top_p", "top-p"),
            ("top_k", "top-k"),
            ("particles", "particles"),
            ("num", "num"),
            ("seed", "seed"),
            ("decoder", "decoder"),
            ("normalize", "normalize"),
        ):
            words += _option(self, name_here, option)
        for stop in self.stop:
            words += ["--stop", stop]
        return words


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
            num_positions(self.lm.model, self.num_tokens, max(map(len, self._prompts(rows))))
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
        streams = [
            TextStream(self.lm.tokenizer, self.stops, start=self._start(row)) for row in rows
        ]
        steps = self._asked(generate_steps, rows, progress, decoder)
        parts: list[Tensor] = []
        while not parts or not all(stream.has_stopped for stream in streams):
            try:
                parts.append(next(steps))
            except StopIteration as end:
                generation: Generation = end.value
                break
            for stream, row in zip(streams, parts[-1], strict=True):
                stream.add(row)
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
        return write(
            self.lm.model,
            num_tokens=self.num_tokens,
            num=len(rows),
            prompt=pad_sequence(self._prompts(rows), batch_first=True, padding_value=BLANK),
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

    def _prompts(self, rows: range) -> list[Tensor]:
        if not self.given:
            return [torch.zeros(0, dtype=torch.long)] * len(rows)
        return [self.given[row // self.request.num].tokens for row in rows]

    def _start(self, row: int) -> int:
        """Characters of the prompt of a sample, after which stops count."""
        if not self.given or self.request.template is not None:
            return 0
        return len(self.lm.tokenizer.decode(self._prompts(range(row, row + 1))[0].tolist()))

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


def first_stop(text: str, stops: Sequence[str], start: int = 0) -> int:
    """Where the first complete one of `stops` begins, at or after `start`; else the text's length."""
    found = [(at + len(stop), at) for stop in stops if (at := text.find(stop, start)) >= 0]
    return min(found, default=(0, len(text)))[1]


class TextStream:
    """A text as its tokens come. What may begin a stop waits until it is known not to be one."""

    def __init__(
        self, tokenizer: Tokenizer, stops: Sequence[str] = (), *, start: int = 0, shown: int = 0
    ) -> None:
        """Stops count from character `start` on; the first `shown` characters are left out."""
        self.stops, self.start, self.shown = stops, start, shown
        self.text, self.has_stopped = "", False
        self._bytes = tokenizer.token_bytes
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def add(self, tokens: Tensor) -> str:
        """Read the next tokens [n]; returns the characters that have become certain."""
        if self.has_stopped:
            return ""
        return self._extend(self._decoder.decode(b"".join(self._bytes[i] for i in tokens.tolist())))

    def close(self) -> str:
        """The text has ended: returns what still waited."""
        if self.has_stopped:
            return ""
        return self._extend(self._decoder.decode(b"", final=True), is_last=True)

    def _extend(self, piece: str, *, is_last: bool = False) -> str:
        self.text += piece
        # nothing before what was shown can belong to a stop
        at = first_stop(self.text, self.stops, max(self.start, self.shown))
        self.has_stopped = at < len(self.text)
        self.text = self.text[:at]
        ready = at if self.has_stopped or is_last else at - self._waiting()
        found = self.text[self.shown : ready]
        self.shown = max(self.shown, ready)
        return found

    def _waiting(self) -> int:
        """Characters at the end of the text that may begin a stop."""
        longest = min(max(map(len, self.stops), default=0) - 1, len(self.text) - self.start)
        for count in range(longest, 0, -1):
            if any(stop.startswith(self.text[-count:]) for stop in self.stops):
                return count
        return 0


# ------------------------------------------------------------------------------------ editing


@dataclass(frozen=True, kw_only=True)
class Edit:
    """A text to edit: by default some of its words are drawn anew given all others."""

    text: str
    rewrite: tuple[str, ...] | None = None
    """Draw these pieces of the text anew."""
    everywhere: bool | None = None
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
        as_integer(self.num, "num", least=1)
        seeded_generator(self.seed)
        named = [name for name in NAMED if self._is_given(name)]
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
        return getattr(self, name) is not None

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
            options["pieces"] = [self._piece(tokenizer, text, "piece") for text in self.rewrite]
        if (pair := self.replace or self.counterfactual) is not None:
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
        words = ["tarflowlm", "edit", name, "--text", self.text]
        for piece in self.rewrite or ():
            words += ["--rewrite", piece]
        for name_here in ("replace", "counterfactual"):
            if self._is_given(name_here):
                words += [f"--{name_here}", *getattr(self, name_here)]
        if self.everywhere:
            words.append("--everywhere")
        for option in (
            "around",
            "toward",
            "level",
            "strength",
            "words",
            "pick",
            "weight",
            "candidates",
            "temperature",
            "decoder",
            "num",
            "seed",
            "normalize",
        ):
            words += _option(self, option)
        return words


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
        (text,) = self.texts
        words = ["tarflowlm", "score", name, "--text", text]
        for option in ("samples", "seed", "normalize"):
            words += _option(self, option)
        return words


@dataclass(frozen=True)
class Scored(Scores):
    """The bits of a text, and how the text was read."""

    reading: Reading = field(kw_only=True)

    @property
    def notice(self) -> str | None:
        """A line if the text is not read as it was given."""
        return self.reading.notice

    @property
    def bits_per_character(self) -> float:
        """Bits per character of the text as it was read."""
        return self.total / len(self.reading.text)


# ------------------------------------------------------------------------------------ helpers


def _option(request: Writing | Edit | Score, name: str, option: str | None = None) -> list[str]:
    """An option of a command and its value; nothing if it is the default."""
    value = getattr(request, name)
    default = next(one.default for one in fields(request) if one.name == name)
    if value == default:
        return []
    shown = str(value)
    if isinstance(value, float) and float(f"{value:g}") == value:
        shown = f"{value:g}"
    return [f"--{option or name}", shown]


def _notices(readings: Sequence[Reading]) -> list[str]:
    found = dict.fromkeys(reading.notice for reading in readings)
    return [notice for notice in found if notice is not None]
