"""Requests become texts: a plan for every prompt, and samples in batches."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import cast

import torch
from torch import Tensor

from tarflowlm import chunks
from tarflowlm.data.prompts import (
    Gap,
    Reading,
    TextStream,
    read,
    read_stop,
    read_template,
    tokens_after_word,
    tokens_without,
)
from tarflowlm.errors import SILENT, Progress, UserError
from tarflowlm.flow.transformer import Transformer
from tarflowlm.generation.plan import Allowed, Plan, no_room, plan
from tarflowlm.generation.sampling import Generation, Meter, row_generators
from tarflowlm.generation.write import Writer
from tarflowlm.model import as_flow
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
        self.plans = plans(request, lm, past_end, prompts)
        named = [("", one.reading) for one in self.plans if one.reading]
        named += [("stop ", stop) for stop in stops]
        if request.contains is not None:
            words = request.contains.strip()
            named.append(("contains ", read(lm.tokenizer, words, normalize=request.normalize)))
        notices = dict.fromkeys(f"{name}{one.notice}" for name, one in named if one.notice)
        self.notices = list(notices)
        """A line for every text that the model reads differently from how it was given."""
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
            every = 1 if self.stops else one.num_tokens if one.end is None else EVERY
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
        return Batch(self, rows, Writer(self.lm.model, plans, generators, progress, every))

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
        return TextStream(tokenizer, self.stops, start=start, end=end)


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
            # a template ends with its last piece
            ends = generation.filled.ends.tolist()
            for end, stream, tokens in zip(ends, streams, generation.tokens, strict=True):
                stream.add(tokens if one.continues else tokens[:end])
        for stream in streams:
            stream.close()
        texts = [stream.text for stream in streams]
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


def write_texts(request: Writing, lm: Checkpoint, progress: Progress = SILENT) -> list[str]:
    """The texts: `num` of every prompt or template, in order."""
    if () in (request.prompt, request.template):
        return []
    samples = Samples(request, lm)
    progress.stage("sampling, tokens", samples.num_tokens)
    return [text for batch in samples.batches(progress) for text in batch.texts]


def plans(
    request: Writing,
    lm: Checkpoint,
    past_end: bool = False,
    given: Sequence[Reading] | None = None,
) -> list[Plan]:
    """A plan for every prompt, for every template, or for free samples.

    `past_end` and the `given` prompts as in `Samples`. UserError for texts that the model cannot
    read, and for options without effect.
    """
    if request.without:
        allowed = tokens_without(lm.tokenizer, request.without)
        request = replace(request, without="", allowed=allowed)
    how = request.normalize
    prompts = as_texts(request.prompt or (), "prompt")
    is_constrained = request.contains is not None or request.allowed is not None
    draws = lm.model.is_exact or as_flow(lm.model).is_single_mixd
    draws &= request.decoder != "sweeps"
    # only where tokens are drawn by their weights can the next one be made to begin with a space
    goes_on = lm.model.config.patch == 1 and (draws or is_constrained)
    readings = given or [
        read(lm.tokenizer, prompt, name="prompt", normalize=how, goes_on=goes_on)
        for prompt in prompts
    ]
    if request.template is not None:
        readings = [
            read_template(lm.tokenizer, template, request.blank, normalize=how)
            for template in as_texts(request.template, "template")
        ]
    if request.particles is not None and not readings and not is_constrained:
        what = f"particles {request.particles}: nothing is given by which to weight them"
        raise UserError(f"{what}; leave them out, or add a prompt, a template or a constraint")
    words = None
    if request.contains is not None:
        wanted = f" {request.contains.strip()}"
        words = read(lm.tokenizer, wanted, name="contains", normalize=how)
        words = replace(words, begins=tokens_after_word(lm.tokenizer))
    return [
        _of_reading(request, lm, one, words, past_end, draws) for one in (*readings,) or (None,)
    ]


def _of_reading(
    request: Writing,
    lm: Checkpoint,
    reading: Reading | None,
    words: Reading | None,
    past_end: bool,
    draws: bool,
) -> Plan:
    """The plan of a prompt, a template or a free text; `words` are added unless it has them.

    `draws`: whether tokens are drawn by their weights where nothing is constrained.
    """
    tokenizer = lm.tokenizer
    is_template = request.template is not None
    allowed = cast(Allowed | None, request.allowed)
    # an end of document before a free sample, so that it begins a new document; it is hidden
    is_new = reading is None and tokenizer.end is not None
    lead = torch.tensor([tokenizer.end] if is_new else []).long()
    count = 0 if reading is None else len(reading.tokens)
    is_one_window = past_end or allowed is not None or words is not None
    shown = _length(request, count, lm.model.config.context, len(lead), is_one_window)
    template: list[Tensor | Gap] = [lead]
    if reading is not None:
        template += reading.parts or [reading.tokens]
        if not is_template and count >= shown:
            notice = "" if reading.notice is None else f"; {reading.notice}"
            raise UserError(f"{no_room(count, shown)}{notice}")
    text = "" if reading is None else reading.text
    begins = None if reading is None else reading.begins
    whole = "" if words is None else rf"(?<!\w){re.escape(words.text.strip())}"
    is_added = words is not None and not re.search(rf"{whole}(?!\w)", text)
    if words is not None and is_added:
        room = shown - count - len(words.tokens)
        if room < 0:
            what = f"contains {request.contains!r}: with the prompt it has {-room} tokens more"
            raise UserError(f"{what} than the length of {shown}: raise the length")
        template += [Gap(room, least=0, begins=begins, once=True), words.tokens]
        begins = words.begins
    elif words is not None and begins is None and re.search(rf"{whole}\Z", text):
        begins = words.begins
    # the probability of such tokens weighs particles, and is all that stacks can be told
    if begins is not None and not is_added and (not draws or (request.particles or 1) > 1):
        template.append(Gap(shown - count, least=shown - count, begins=begins))
    if request.temperature is None and lm.model.config.takes_temperature:
        request = replace(request, temperature=lm.run.temperature)
        # a constraint may need improbable tokens, all of which top-p could drop
        is_free = allowed is None and not is_template and all(map(torch.is_tensor, template))
        if request.top_p is None and is_free:
            request = replace(request, top_p=lm.run.top_p)
    found = plan(
        lm.model,
        template,
        request,
        num_tokens=len(lead) + shown,
        allowed=allowed,
        # tokens between given pieces belong to the same document
        banned=tokenizer.end if is_template or is_added else None,
        end=tokenizer.end if request.may_end and not past_end else None,
        lead=len(lead),
        continues=not is_template or request.length is not None,
    )
    return replace(found, reading=reading, begins=begins)


def _length(request: Writing, count: int, context: int, lead: int, is_one_window: bool) -> int:
    """Tokens of a text without its lead; `count` are in its prompt or template."""
    asked = request.length
    if request.max_new_tokens is not None:
        asked = count + request.max_new_tokens
    if asked is not None:
        return asked - (lead if is_one_window and asked == context > 1 else 0)
    return count if request.template is not None else max(1, context - lead)
