"""Writing: texts that continue prompts, fill templates, or are free."""

import re
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import cast

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from tarflowlm import chunks
from tarflowlm.data.prompts import BLANK, Gap, Reading, read, read_template, tokens_without
from tarflowlm.data.streaming import TextStream
from tarflowlm.errors import SILENT, Progress, UserError
from tarflowlm.generation import Generation, generate_steps
from tarflowlm.generation.gaps import Allowed
from tarflowlm.generation.generate import PARTICLES, no_room, usual_particles
from tarflowlm.generation.inversion import Decoders, Kept, finish
from tarflowlm.generation.sampling import row_generators
from tarflowlm.generation.writing import num_positions
from tarflowlm.processes import ALONE, Processes
from tarflowlm.runs.checkpoint import Checkpoint
from tarflowlm.texts.requests import Writing, as_texts

EVERY = 8
"""Tokens after which it is looked whether all samples have ended."""


def write(request: Writing, lm: Checkpoint, progress: Progress = SILENT) -> list[str]:
    """The texts: `num` of every prompt, in order."""
    draft = Draft.of(request, lm)
    progress.stage("sampling, positions", draft.num_positions)
    return [text for batch in draft.batches(progress) for text in batch.texts]


@dataclass(frozen=True)
class Draft:
    """A `Writing` as a model reads it."""

    lm: Checkpoint
    request: Writing
    given: tuple[Reading, ...]
    """The template, or the prompts; for free samples an empty one."""
    stops: tuple[str, ...]
    words: Reading | None
    """The words that every sample contains, with a space before them."""
    allowed: Allowed | None
    processes: Processes = ALONE
    """They share the batches; `processes.in_turn` puts them together."""
    is_whole: bool = False
    """Whether tokens behind the end of a document are written, though not shown: passes need them.
    """

    @classmethod
    def of(cls, request: Writing, lm: Checkpoint) -> "Draft":
        """The request as a model reads it. UserError for texts that it cannot read."""
        tokenizer = lm.tokenizer
        how = request.normalize
        given = [
            read(tokenizer, prompt, name="prompt", normalize=how, goes_on=True)
            for prompt in as_texts(request.prompt or (), "prompt")
        ]
        if request.template is not None:
            given = [read_template(tokenizer, request.template, request.blank, normalize=how)]
        if not given:
            given = [Reading(torch.zeros(0, dtype=torch.long), "", "")]
        stops = [
            read(tokenizer, stop, name="stop", normalize=how).text
            for stop in as_texts(request.stop, "stop")
        ]
        words = None
        if request.contains is not None:
            words = read(tokenizer, f" {request.contains}", name="contains", normalize=how)
        allowed = cast(Allowed | None, request.allowed)
        if request.without:
            allowed = tokens_without(tokenizer, request.without)
        draft = cls(lm, request, tuple(given), tuple(stops), words, allowed)
        for reading in given if request.template is None else ():
            count = len(reading.tokens)
            if count >= draft.num_tokens:
                notice = "" if reading.notice is None else f"; {reading.notice}"
                raise UserError(f"{no_room(count, draft.num_tokens)}{notice}")
        return draft

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
        new = self.request.max_new_tokens
        if new is not None:
            lengths = {len(reading.tokens) for reading in self.given}
            if len(lengths) > 1:
                what = f"max_new_tokens {new} after prompts of different lengths"
                raise UserError(f"{what}: write them one by one, or give a length")
            asked = max(lengths) + new
        if asked is not None:
            is_one_window = self.is_whole or self.allowed is not None or self.words is not None
            return asked - len(self.lead) if is_one_window and asked == context > 1 else asked
        if self.request.template is not None:
            return len(self.given[0].tokens)
        return max(1, context - len(self.lead))

    @cached_property
    def lead(self) -> Tensor:
        """The end of the document before, which begins a free sample and is not shown."""
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
        if self.is_constrained:
            return PARTICLES
        return max(usual_particles(reading.tokens) for reading in self.given)

    @cached_property
    def is_constrained(self) -> bool:
        """Whether there are gaps of unknown length, words to contain, or tokens not allowed."""
        rows = range(0, self.total, self.request.num)
        return self.allowed is not None or any(map(self._parts, rows))

    @property
    def _allowed(self) -> Allowed | None:
        """`allowed` as `generate` asks it, of the tokens with the lead."""
        allowed = self.allowed
        if not callable(allowed):
            return allowed  # `generate` checks it
        return lambda tokens: allowed(tokens[len(self.lead) :])

    def _parts(self, row: int) -> tuple[Tensor | Gap, ...]:
        """The prompt or template of a sample as pieces and gaps; none if its tokens say it all."""
        reading = self.given[row // self.request.num]
        if self.words is None or re.search(
            rf"{re.escape(self.words.text)}(?!\w)", f" {reading.text}"
        ):
            return reading.parts
        room = self.num_tokens - len(reading.tokens) - len(self.words.tokens)
        if room < 0:
            what = f"contains {self.request.contains!r}: with the prompt it has {-room} tokens more"
            raise UserError(f"{what} than the length of {self.num_tokens}: raise the length")
        before = torch.cat((self.lead, reading.tokens))
        return before, Gap(room, least=0, once=True), self.words.tokens

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
        if self.is_constrained:
            yield finish(self.steps(range(row, row + 1))).texts[0]
            return
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
        # given text on both sides of what is drawn stands in one document
        stands_in_one = request.template is not None or self.words is not None
        prompts = [torch.cat((self.lead, self.prompt(row))) for row in rows]
        padded = pad_sequence(prompts, batch_first=True, padding_value=BLANK)
        steps = Kept(
            generate_steps(
                self.lm.model,
                num_tokens=self.num_written,
                num=len(rows),
                prompt=self._parts(rows.start) or padded,
                particles=request.particles if self.is_constrained or not len(self.lead) else None,
                allowed=self._allowed,
                temperature=usual if request.temperature is None else request.temperature,
                top_k=request.top_k,
                top_p=request.top_p,
                decoder=request.decoder if decoder is None else decoder,
                # numbered over all batches: a sample does not depend on the others
                generator=row_generators(rows, torch.Generator().manual_seed(request.seed)),
                progress=progress,
                every=every,
                without=self.lm.tokenizer.end if stands_in_one else None,
                end=None if self.is_whole else self.end,
                goes_on=request.template is None or request.num_tokens is not None,
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
            if self.is_constrained:
                continue  # all in one part, and only then it is known where the text ends
            for stream, tokens in zip(streams, part, strict=True):
                stream.add(tokens)
            if all(stream.has_stopped for stream in streams) and not is_whole:
                generation = Generation(torch.cat(parts, 1))
                break
        else:
            generation = steps.value.behind(len(self.lead)) if len(self.lead) else steps.value
        if self.is_constrained:
            for index, (stream, tokens) in enumerate(zip(streams, generation.tokens, strict=True)):
                stream.add(tokens[: self._length(index, generation)])
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

    def _rows_of_batches(self) -> list[range]:
        """Consecutive samples of this process; prompts that fill a window are not mixed with
        others, nor, where one length continues exactly, those of several.
        """
        config = self.lm.model.config
        length = min(self.num_written, config.context)
        size = chunks.written_rows(length * self.particles, self.lm.model.device)
        lengths = {len(reading.tokens) for reading in self.given}
        is_alone = max(lengths) >= config.context or self.is_constrained
        is_alone |= config.continues_exactly and len(lengths) > 1
        together = self.request.num if is_alone else self.total
        size = min(size, -(-together // self.processes.world))
        batches: list[range] = []
        for first in range(0, self.total, together):
            rows = range(first, first + together)
            batches += [rows[start : start + size] for start in range(0, len(rows), size)]
        return batches[self.processes.rank :: self.processes.world]

    def _length(self, index: int, generation: Generation) -> int:
        """Tokens of the text of sample `index` of a batch: a template with gaps ends with them."""
        is_open = self.request.num_tokens is not None or not self.given[0].parts
        filled = generation.filled
        return self.num_tokens if is_open or filled is None else int(filled.ends[index])

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
    """The reader of each: it knows the tokens up to an end of the document, if that came."""
