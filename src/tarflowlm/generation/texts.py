"""Requests become texts: samples in batches."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from tarflowlm import chunks
from tarflowlm.data.prompts import Reading, TextStream, has_gaps, read, read_stop
from tarflowlm.errors import SILENT, Progress, UserError
from tarflowlm.flow.transformer import Transformer
from tarflowlm.generation.plan import Plan
from tarflowlm.generation.requested import count_of, plans
from tarflowlm.generation.sampling import Generation, Meter, row_generators
from tarflowlm.generation.write import DoublingWriter, Writer
from tarflowlm.processes import ALONE, Processes
from tarflowlm.requests import Writing, as_texts
from tarflowlm.runs.checkpoint import Checkpoint
from tarflowlm.runs.weights import check_finite

EVERY = 8
"""Check every 8 tokens whether all samples have ended."""


class Samples:
    """The samples that a request asks for: `num` of every plan, in order.

    `past_end`: keep writing after a document ends, because the view of passes needs the whole
    window. The texts still end there. UserError for texts that the model cannot read, and for
    options without effect.
    """

    def __init__(
        self,
        request: Writing,
        lm: Checkpoint,
        past_end: bool = False,
        processes: Processes = ALONE,
        prompts: Sequence[Reading] | None = None,
    ) -> None:
        """The `processes` share the batches; `processes.in_turn` collects these.

        `prompts` stand for those of the request, where their tokens are given.
        """
        self.request, self.lm, self.past_end, self.processes = request, lm, past_end, processes
        model = lm.model
        check_finite(model.state_dict(), "model")
        stops = [
            read_stop(lm.tokenizer, stop, normalize=request.normalize)
            for stop in as_texts(request.stop, "stop")
        ]
        # a line end is in no text of letters, where it reads as a space
        stops = [stop for stop in stops if stop.text != " " or stop.given == " "]
        self.stops = [stop.text for stop in stops]
        self.count = count_of(request, lm)
        self.plans = plans(request, lm, past_end, prompts)
        named = [("", one.reading) for one in self.plans if one.reading]
        named += [("stop ", stop) for stop in stops]
        words = [("contains ", one) for one in as_texts(request.contains)]
        words += [("without ", one) for one in as_texts(request.without) if len(one) > 1]
        how = request.normalize
        named += [(name, read(lm.tokenizer, one.strip(), normalize=how)) for name, one in words]
        notices = dict.fromkeys(f"{name}{one.notice}" for name, one in named if one.notice)
        self.notices = [*notices, *_remarks(request)]
        """A line for every text that the model reads differently from how it was given, and for
        what may be meant otherwise.
        """
        self.total = request.num_each * len(self.plans)
        """Number of samples."""
        blocks = [m for m in model.modules() if isinstance(m, Transformer)]
        # keys and values of a token in the block with most of them
        cached = max(2 * len(block.layers) * block.config.width for block in blocks)
        batches: list[range] = []
        keys = [one.batch_key for one in self.plans]
        for _, group in groupby(range(self.total), key=lambda row: keys[row // request.num_each]):
            rows = list(group)
            one = self.plan(rows[0])
            length = min(one.num_tokens, model.config.context) * one.particles
            choices = model.config.vocab_size * one.particles
            fitting = chunks.written_rows(length, model.device, cached=cached, choices=choices)
            # all processes make the same batches, which fit into the least memory
            size = min(*processes.in_turn([fitting]), -(-len(rows) // processes.world))
            starts = range(rows[0], rows[-1] + 1, size)
            batches += [range(start, min(start + size, rows[-1] + 1)) for start in starts]
        self.own = batches[processes.rank :: processes.world]
        """The batches that this process writes: consecutive samples that are written together."""
        self.num_tokens = sum(len(rows) * self.plan(rows[0]).num_tokens for rows in self.own)
        """Tokens of all samples of this process, as `progress` counts them."""

    @property
    def follows_loosely(self) -> bool:
        """Whether the model mostly ignores the given text with a single candidate."""
        first = self.plans[0]
        is_exact = self.lm.model.config.has_token_weights or first.way == "inversion"
        return first.reading is not None and first.particles == 1 and not is_exact

    def plan(self, row: int) -> Plan:
        """The plan of a sample."""
        return self.plans[row // self.request.num_each]

    def batches(self, progress: Progress = SILENT) -> Iterator["Written"]:
        """The samples in batches of bounded memory, each batch once it is finished.

        Each of several processes writes its share of the batches. A single one halves a batch for
        which the memory of its GPU is not enough, since rows do not depend on each other.
        """
        left = [*self.own]
        while left:
            rows = left.pop(0)
            one = self.plan(rows[0])
            num_tokens = len(rows) * one.num_tokens
            meter = Meter(progress, num_tokens, num_tokens)
            # decode in batches unless a stop must be found
            may_end = one.end is not None or self.count is not None
            every = 1 if self.stops else EVERY if may_end else one.num_tokens
            try:
                found = self.batch(rows, meter, every=every).finish()
            except torch.OutOfMemoryError:
                if len(rows) == 1 or self.processes.world > 1:
                    raise
                progress.advance(-meter.passed)
                half = len(rows) // 2
                left[:0] = [rows[:half], rows[half:]]
                continue
            yield found

    def pieces(self, row: int = 0) -> Iterator[str]:
        """The text of one sample, piece by piece as its tokens become final, up to its stop."""
        batch = self.batch(range(row, row + 1))
        if self.plan(row).way == "gaps":
            yield batch.finish().texts[0]
            return
        stream = self.stream(row)
        for tokens in batch:
            yield stream.add(tokens[0])
        yield stream.close()

    def batch(self, rows: range, progress: Progress = SILENT, *, every: int = 1) -> "Batch":
        """The samples `rows`, which are written together; `every` as in `Writer`."""
        plans = [self.plan(row) for row in rows]
        # numbered over all batches: a sample does not depend on the others
        generators = row_generators(rows, torch.Generator().manual_seed(self.request.seed))
        doubles = plans[0].particles < plans[0].most_particles
        kind = DoublingWriter if doubles else Writer
        return Batch(self, rows, kind(self.lm.model, plans, generators, progress, every))

    def check_count(self, rows: range, texts: Sequence[str]) -> None:
        """UserError for a text that has reached its length before it has all words or sentences."""
        if self.count is None:
            return
        for row, text in zip(rows, texts, strict=True):
            found = len(self.count.ends(text, is_whole=True))
            if found < self.count.number:
                what = f"{self.count.unit} {self.count.number}: sample {row + 1} has {found}"
                length = self.plan(row).num_tokens - self.plan(row).lead
                raise UserError(f"{what} within the length of {length}: raise the length")

    def stream(self, row: int) -> TextStream:
        """A reader of the tokens of a sample, which looks for stops after its prompt."""
        tokenizer = self.lm.tokenizer
        one = self.plan(row)
        start = 0
        if self.request.template is None and one.reading is not None:
            # with a space that is left to the first new token
            left = one.reading.begins is not None
            start = len(tokenizer.decode(one.reading.tokens.tolist())) + left
        # with `past_end` the writing continues, but the text ends
        end = tokenizer.end if self.request.may_end else None
        return TextStream(tokenizer, self.stops, start=start, end=end, count=self.count)


class Batch:
    """Some samples that are written together.

    Iterating yields their next final tokens [num, n], and ends early once every sample has met a
    stop or its end. Then they are `written`.
    """

    written: "Written"

    def __init__(self, samples: Samples, rows: range, writer: Writer) -> None:
        self.samples, self.rows, self.writer = samples, rows, writer

    def __iter__(self) -> Iterator[Tensor]:
        samples = self.samples
        streams = list(map(samples.stream, self.rows))
        one = samples.plan(self.rows[0])
        hidden = one.lead
        parts: list[Tensor] = []
        for part in self.writer:
            part = part[:, hidden:]
            hidden = 0
            if not part.shape[1]:
                continue
            parts.append(part)
            yield part
            if one.way == "gaps":
                continue  # all tokens come in one part, and only the result tells where texts end
            for stream, tokens in zip(streams, part, strict=True):
                stream.add(tokens)
            # particles come in one part, with their evidence
            over = one.particles == 1 and all(stream.has_stopped for stream in streams)
            if over and not samples.past_end:
                generation = Generation(torch.cat(parts, 1))
                break
        else:
            generation = self.writer.result.drop_context(one.lead)
        if generation.filled is not None:
            # a template ends with its last piece, and a text where a rule ends it
            ends = generation.filled.ends.tolist()
            for end, stream, tokens in zip(ends, streams, generation.tokens, strict=True):
                stream.add(tokens if one.continues and not one.rules else tokens[:end])
        for stream in streams:
            stream.close()
        texts = [stream.text for stream in streams]
        samples.check_count(self.rows, texts)
        self.written = Written(self.rows, texts, generation, streams, one.particles)

    def finish(self) -> "Written":
        """Write all that is left."""
        for _ in self:
            pass
        return self.written


@dataclass(frozen=True)
class Written:
    """Samples of one batch."""

    rows: range
    """Their indices among all samples of the request."""
    texts: list[str]
    """Each up to its first stop, or to its end."""
    generation: Generation
    streams: Sequence[TextStream]
    """The reader of each."""
    particles: int
    """Candidates of each."""

    @property
    def lengths(self) -> list[int]:
        """Tokens of each, up to the end of its document if it has one."""
        return [stream.length for stream in self.streams]


def _remarks(request: Writing) -> Iterator[str]:
    """What a user may have meant otherwise."""
    words = [repr(words.strip()) for words in as_texts(request.without) if len(words) > 1]
    if words:
        yield f"without {', '.join(words)} as whole words; a single letter is a letter"
    if any(map(has_gaps, as_texts(request.prompt or (), "prompt"))):
        yield "the prompt is continued as it is: gaps and blanks are filled in with --template"


def write_texts(request: Writing, lm: Checkpoint, progress: Progress = SILENT) -> list[str]:
    """The texts: `num` of every prompt or template, in order."""
    if () in (request.prompt, request.template):
        return []
    samples = Samples(request, lm)
    progress.stage("sampling, tokens", samples.num_tokens)
    return [text for batch in samples.batches(progress) for text in batch.texts]
