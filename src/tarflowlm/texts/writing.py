"""Requests to write: texts that continue prompts, fill templates, or are free."""

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypedDict

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from tarflowlm import chunks
from tarflowlm.checks import as_integer
from tarflowlm.data.prompts import BLANK, Reading, read, read_template
from tarflowlm.data.streaming import TextStream
from tarflowlm.errors import UserError
from tarflowlm.generation import Generation, generate_steps
from tarflowlm.generation.generate import usual_particles
from tarflowlm.generation.inversion import Decoders, Kept, check_decoders, finish
from tarflowlm.generation.sampling import adjust_weights, row_generators
from tarflowlm.generation.writing import num_positions
from tarflowlm.parts import WHOLE, share
from tarflowlm.progress import SILENT, Progress
from tarflowlm.runs.checkpoint import Checkpoint
from tarflowlm.texts.requests import Request, as_texts

EVERY = 8
"""Tokens after which it is looked whether all samples have ended."""


@dataclass(frozen=True, kw_only=True)
class Writing(Request):
    """Texts to write: prompts continued, the blanks of a template filled in, or free samples."""

    COMMAND = "sample"
    prompts: tuple[str, ...] = ()
    """Texts to continue, each in `num` samples."""
    template: str | None = None
    """A text with a blank for every token to fill in."""
    blank: str = "_"
    """The character that marks a blank."""
    num_tokens: int | None = None
    """Length in tokens at most, given ones included; None: the trained context, or that of the
    template.
    """
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
    stop_at_end: bool = True
    """It ends with its document, if the model has learnt ends. Else the next document follows."""

    def __post_init__(self) -> None:
        super().__post_init__()
        counts = {"num": self.num, "length": self.num_tokens, "particles": self.particles}
        for name, value in counts.items():
            if value is not None:
                as_integer(value, name, least=1)
        temperature = 1.0 if self.temperature is None else self.temperature
        adjust_weights(temperature, self.top_k, self.top_p)
        check_decoders(self.decoder)
        if self.prompts and self.template is not None:
            raise UserError("a prompt and a template: put the prompt at the start of the template")

    def read(self, lm: Checkpoint) -> "Draft":
        """The request as a model reads it. UserError for texts that it cannot read."""
        tokenizer = lm.tokenizer
        how = self.normalize
        given = [
            read(tokenizer, prompt, name="prompt", normalize=how, goes_on=True)
            for prompt in self.prompts
        ]
        if self.template is not None:
            given = [read_template(tokenizer, self.template, self.blank, normalize=how)]
        if not given:
            given = [Reading(torch.zeros(0, dtype=torch.long), "", "")]
        stops = [
            read(tokenizer, stop, name="stop", normalize=how).text
            for stop in as_texts(self.stop, "stop")
        ]
        return Draft(lm, self, tuple(given), tuple(stops))

    def run(self, lm: Checkpoint, progress: Progress = SILENT) -> list[str]:
        """The texts: `num` of every prompt, in order."""
        draft = self.read(lm)
        progress.stage("sampling, positions", draft.num_positions)
        return [text for batch in draft.batches(progress) for text in batch.texts]


class WritingOptions(TypedDict, total=False):
    """The options of `write`, `fill` and `stream`: fields of `Writing`."""

    num_tokens: int | None
    temperature: float | None
    top_k: int | None
    top_p: float | None
    particles: int | None
    decoder: Decoders
    blank: str
    stop: str | Sequence[str]
    stop_at_end: bool
    seed: int


@dataclass(frozen=True)
class Draft:
    """A `Writing` as a model reads it."""

    lm: Checkpoint
    request: Writing
    given: tuple[Reading, ...]
    """The template, or the prompts; for free samples an empty one."""
    stops: tuple[str, ...]
    part: str = WHOLE
    """The share of the samples that `batches` writes."""
    is_whole: bool = False
    """Whether tokens behind the end of a document are written, though not shown: passes need them.
    """

    @property
    def total(self) -> int:
        """Number of samples. Sample r continues prompt r // num."""
        return self.request.num * len(self.given)

    @property
    def notices(self) -> list[str]:
        """A line for every text that is not read as it was given."""
        found = dict.fromkeys(reading.notice for reading in self.given)
        return [notice for notice in found if notice is not None]

    @cached_property
    def num_tokens(self) -> int:
        """Tokens of every sample, given ones included."""
        context = self.lm.model.config.context
        asked = self.request.num_tokens
        if asked is not None:
            # passes need all in one window
            return asked - len(self.lead) if self.is_whole and asked == context > 1 else asked
        if self.request.template is not None:
            return len(self.given[0].tokens)
        return max(1, context - len(self.lead))

    @cached_property
    def lead(self) -> Tensor:
        """What begins a free sample, and is not shown: the end of the document before."""
        end = self.lm.tokenizer.end
        is_free = end is not None and len(self.given[0].tokens) == 0
        return torch.tensor([end] if is_free else []).long()

    @cached_property
    def num_written(self) -> int:
        """Tokens of every sample with the lead."""
        return len(self.lead) + self.num_tokens

    @property
    def end(self) -> int | None:
        """The token at which samples end."""
        is_text = self.request.template is None and self.request.stop_at_end
        return self.lm.tokenizer.end if is_text else None

    @cached_property
    def particles(self) -> int:
        """Candidates for every sample."""
        if self.request.particles is not None:
            return self.request.particles
        return max(usual_particles(reading.tokens) for reading in self.given)

    @property
    def num_positions(self) -> int:
        """How often the progress advances for all samples."""
        total = 0
        for rows in self._rows_of_batches():
            longest = len(self.lead) + max(len(self.prompt(row)) for row in rows)
            total += num_positions(self.lm.model, self.num_written, longest)
        return total

    def batches(self, progress: Progress = SILENT) -> Iterator["Written"]:
        """The samples in batches of bounded memory, each as it is finished."""
        decoder = None
        # tokens that nobody reads one by one are not decoded one by one
        every = 1 if self.stops else self.num_written if self.end is None else EVERY
        for rows in self._rows_of_batches():
            written = finish(self.steps(rows, progress, decoder, every=every))
            # the choice of auto for the first batch serves the others
            decoder = written.generation.decoders or decoder
            yield written

    def pieces(self, row: int = 0) -> Iterator[str]:
        """The text of one sample, piece by piece as its tokens become final, up to its stop."""
        stream = self._stream(row)
        for tokens in self.steps(range(row, row + 1)):
            yield stream.add(tokens[0])
        yield stream.close()

    def steps(
        self,
        rows: range,
        progress: Progress = SILENT,
        decoder: Decoders | None = None,
        *,
        every: int = 1,
    ) -> Generator[Tensor, None, "Written"]:
        """The samples `rows` in one batch: yields their next final tokens [num, n].

        It ends early once every sample has met a stop or its end. `every` as in `generate_steps`.
        """
        request = self.request
        usual = self.lm.run.temperature
        prompts = [torch.cat((self.lead, self.prompt(row))) for row in rows]
        steps = Kept(
            generate_steps(
                self.lm.model,
                num_tokens=self.num_written,
                num=len(rows),
                prompt=pad_sequence(prompts, batch_first=True, padding_value=BLANK),
                particles=None if len(self.lead) else request.particles,
                temperature=usual if request.temperature is None else request.temperature,
                top_k=request.top_k,
                top_p=request.top_p,
                decoder=request.decoder if decoder is None else decoder,
                # numbered over all batches: a sample does not depend on the others
                generator=row_generators(rows, request.random_stream()),
                progress=progress,
                every=every,
                without=None if request.template is None else self.lm.tokenizer.end,
            )
        )
        streams = list(map(self._stream, rows))
        parts: list[Tensor] = []
        hidden = len(self.lead)
        is_whole = self.is_whole and self.num_written <= self.lm.model.config.context
        for part in steps:
            part = part[:, hidden:]
            hidden = 0
            if not part.shape[1]:
                continue
            parts.append(part)
            yield part
            for stream, tokens in zip(streams, part, strict=True):
                stream.add(tokens)
            if all(stream.has_stopped for stream in streams) and not is_whole:
                generation = Generation(torch.cat(parts, 1))
                break
        else:
            generation = steps.value.behind(len(self.lead)) if len(self.lead) else steps.value
        for stream in streams:
            stream.close()
        return Written(rows, [stream.text for stream in streams], generation, streams)

    @property
    def follows_loosely(self) -> bool:
        """Whether one candidate alone takes little notice of the given text."""
        config = self.lm.model.config
        is_template = self.request.template is not None
        is_exact = config.has_token_weights or (config.continues_exactly and not is_template)
        return len(self.given[0].tokens) > 0 and self.particles == 1 and not is_exact

    def prompt(self, row: int) -> Tensor:
        """The given tokens of a sample."""
        return self.given[row // self.request.num].tokens

    def _rows_of_batches(self) -> Iterator[range]:
        """Consecutive samples; prompts that fill a window are not mixed with others."""
        context = self.lm.model.config.context
        length = min(self.num_written, context)
        size = chunks.written_rows(length * self.particles, self.lm.model.device)
        longest = max(len(reading.tokens) for reading in self.given)
        together = self.request.num if longest >= context else self.total
        own = share(self.part, self.total)
        for first in range(0, self.total, together):
            rows = range(max(first, own.start), min(first + together, own.stop))
            for start in range(0, len(rows), size):
                yield rows[start : start + size]

    def _stream(self, row: int) -> TextStream:
        """Reads the tokens of a sample. Stops count behind its prompt."""
        tokenizer = self.lm.tokenizer
        is_template = self.request.template is not None
        start = 0 if is_template else len(tokenizer.decode(self.prompt(row).tolist()))
        return TextStream(tokenizer, self.stops, start=start, end=self.end)


@dataclass(frozen=True)
class Written:
    """Samples of one batch."""

    rows: range
    """Their numbers among all samples of the request."""
    texts: list[str]
    """Each up to its first stop, or to its end."""
    generation: Generation
    streams: Sequence[TextStream] = ()
    """What read each: whether it came to the end of its document, and its tokens before that."""
