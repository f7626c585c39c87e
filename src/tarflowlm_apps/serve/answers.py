"""A request for completions, and its choices, in the words of the OpenAI interface."""

import codecs
import math
import re
import secrets
from collections.abc import Generator, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Annotated, Any, ClassVar, cast

import torch
import torch.nn.functional as F
from annotated_types import Interval
from torch import Tensor

from tarflowlm.baseline import TokenLM
from tarflowlm.data.prompts import GAP, Gap, Reading, TextStream, read
from tarflowlm.data.windows import spans
from tarflowlm.errors import Progress, UserError
from tarflowlm.evaluation.scores import score
from tarflowlm.generation.texts import Samples
from tarflowlm.requests import Writing, as_texts
from tarflowlm.runs.checkpoint import Checkpoint
from tarflowlm.schema import Checked, Count, NotNegative, Seed, Share, TopP, Whole

MOST = 65_536  # tokens of all texts of a request, given and new ones
EVERY = 16  # tokens between two looks whether the client still waits, unless it gets a stream
BLANK = "\ue000"  # for private use: no text has it
NoPenalty = Annotated[float, Interval(ge=0, le=0), "there are no penalties, leave it out"]
NOTHING = torch.zeros(0, dtype=torch.long)
Part = dict[str, Any]
"""The next text of a choice; the last part has its `finish_reason`."""
Scored = tuple[str, float | None, dict[str, float | None]]
"""A token, its log-probability in nats, and those of others; None for the start of a text."""


@dataclass(frozen=True, kw_only=True)
class Completion(Checked):
    """The body of a request. A field that would have no effect is unknown here, and refused."""

    EXCLUSIVE: ClassVar = {"suffix": ("stop", "echo", "logprobs")}

    model: str
    prompt: str | Sequence[str] | Sequence[int] | Sequence[Sequence[int]] = ""
    suffix: str = ""
    max_tokens: Whole = 16
    temperature: NotNegative | None = None
    top_p: TopP | None = None
    top_k: Count | None = None
    min_p: Share | None = None
    n: Annotated[int, Interval(ge=1, le=128)] = 1
    stop: str | Sequence[str] = ()
    seed: Seed | None = None
    stream: bool = False
    stream_options: object = None
    logprobs: Annotated[int, Interval(ge=0, le=20)] | None = None
    echo: bool = False
    presence_penalty: NoPenalty = 0.0
    frequency_penalty: NoPenalty = 0.0

    def rules(self) -> Iterator[tuple[str, str]]:
        stops = as_texts(self.stop)
        if len(stops) > 16 or any(len(stop) > 1000 for stop in stops):
            yield "stop", "give at most 16 texts, of at most 1,000 characters"
        if not self.prompt and not isinstance(self.prompt, str):
            yield "prompt", "give at least one"
        one = [self.prompt] if isinstance(self.prompt, str) else list(self.prompt)
        if self.suffix and not (len(one) == 1 and isinstance(one[0], str)):
            yield "suffix", "it needs one prompt, a text"
        if not isinstance(self.stream_options, Mapping | None):
            yield "stream_options", 'give {"include_usage": true}'
        if self.suffix and not self.suffix.strip():
            yield "suffix", "it is white space: give a text, or leave it out"
        if self.suffix and not 1 <= self.max_tokens <= 9999:
            yield "max_tokens", "give 1 to 9999 with a suffix"

    @property
    def wants_usage(self) -> bool:
        """Whether the last event of a stream counts tokens."""
        return isinstance(self.stream_options, Mapping) and bool(
            self.stream_options.get("include_usage")
        )

    def writing(self, prompts: list[str]) -> Writing:
        """The request for texts. A greedy one has temperature 0."""
        gap = None
        if self.suffix:
            gap = f"{prompts[0]}[...{self.max_tokens}]{self.suffix}"
            if len(re.findall(GAP, gap)) > 1 or gap.count("[...") > 1 or BLANK in gap:
                marks = f"'[...' or {BLANK!a}, a mark of a blank"
                raise UserError(f"prompt or suffix has {marks}: change it")
        is_free = not any(prompts)
        is_greedy = self.temperature == 0
        return Writing(
            prompt=None if gap or is_free else prompts,
            template=gap,
            blank=BLANK if gap else "_",
            max_new_tokens=None if gap else self.max_tokens,
            temperature=None if is_greedy else self.temperature,
            top_k=1 if is_greedy else self.top_k,
            top_p=None if is_greedy else self.top_p,
            min_p=None if is_greedy else self.min_p,
            stop=self.stop,
            num=self.n * len(prompts) if is_free else self.n,
            seed=secrets.randbelow(2**62) if self.seed is None else self.seed,
        )


class Row:
    """A text that grows: what of it is new, and has not been sent yet."""

    def __init__(self, samples: Samples, index: int) -> None:
        self.index = index
        tokenizer = samples.lm.tokenizer
        reading = samples.plan(index).reading
        pieces = [] if reading is None else reading.parts[::2] or [reading.tokens]
        begun = [] if reading is None else [reading, *reading.parts[1::2]]
        before, after = cast(list[Tensor], [*pieces, NOTHING, NOTHING][:2])
        self.given = len(before) + len(after)
        """Tokens of the prompt and the suffix."""
        text = tokenizer.decode(before)
        self.after = len(tokenizer.decode(after))
        self.leaves_space = any(cast(Gap, x).begins is not None for x in begun)
        """Whether a space at the end of the prompt is left to the first new token."""
        self.start, self.sent = len(text), 0
        end = samples.plan(index).end
        self.stream = TextStream(tokenizer, samples.stops, start=self.start, end=end)

    def add(self, tokens: Tensor) -> str:
        """Read the next tokens; returns what can be sent."""
        self.stream.add(tokens)
        return self.new(self.stream.text[: self.stream.shown])

    def new(self, text: str) -> str:
        """The part of a text, as far as it is known, that has not been sent."""
        space = self.leaves_space and text[self.start : self.start + 1] == " "
        first = max(self.sent, self.start + space)
        self.sent = len(text) - self.after
        return text[first : self.sent]


class Waiting(Progress):
    """Work that ends where it advances, by CancelledError, once nobody waits for it."""

    is_over = False

    def advance(self, count: int = 1) -> None:
        if self.is_over:
            raise CancelledError


class Answer:
    """The choices that answer a request: `n` for each prompt, in order.

    UserError for more than `most` of them. `draws` are the posterior samples of a flow's scores.
    """

    def __init__(self, ask: Completion, lm: Checkpoint, draws: int, most: int) -> None:
        self.ask, self.lm, self.draws = ask, lm, draws
        self.tokenizer = lm.tokenizer
        several = ask.prompt if isinstance(ask.prompt, tuple) else (ask.prompt,)
        self.prompts = (ask.prompt,) if isinstance(several[0], int) else several
        count = ask.n * len(self.prompts)
        if count > most:
            raise UserError(f"{count:,} texts in all: ask for at most {most:,} in one request")
        self.starts = [self._has_start(one) for one in self.prompts]
        self.given: list[Tensor] = []
        """The tokens of the prompts, once they are read."""
        self.samples: Samples | None = None
        self.num_given = 0
        """Given tokens of the prompts of finished choices."""
        self.new = 0
        """New tokens of finished choices."""
        self.progress = Waiting()

    def _has_start(self, prompt: str | tuple[int, ...]) -> bool:
        """Whether tokens begin with the start of a text, as those of `export --causal-lm` do.

        It has a number of its own, or in a Qwen3 that of the byte 255, which no text has.
        """
        if not prompt or isinstance(prompt, str):
            return False
        first, tokens = prompt[0], self.tokenizer.token_bytes
        return first == len(tokens) or (0 <= first < len(tokens) and tokens[first] == b"\xff")

    def _read(self) -> None:
        """Read the prompts. UserError for what the model cannot do."""
        ask = self.ask
        pairs = list(zip(self.prompts, self.starts, strict=True))
        self.given = [self._tokens(one[start:]) for one, start in pairs]
        total = ask.n * sum(len(tokens) + ask.max_tokens for tokens in self.given)
        if total > MOST:
            raise UserError(f"{total:,} tokens in all: ask for at most {MOST:,} in one request")
        if not ask.max_tokens:
            self.num_given = sum(map(len, self.given))
            return
        texts = [
            one if isinstance(one, str) else self.tokenizer.decode(tokens)
            for one, tokens in zip(self.prompts, self.given, strict=True)
        ]
        if any(texts) and not all(texts):
            where = f"prompt {texts.index('') + 1} of {len(texts)}"
            raise UserError(f"{where} is empty: give it a text, or send it alone")
        readings = None
        if any(texts) and not isinstance(self.prompts[0], str):
            readings = [
                Reading(self._within(tokens), text, text)
                for tokens, text in zip(self.given, texts, strict=True)
            ]
        self.samples = Samples(ask.writing(texts), self.lm, prompts=readings)

    def _tokens(self, prompt: Any) -> Tensor:
        self.progress.advance()
        if isinstance(prompt, str):
            return read(self.tokenizer, prompt, name="prompt").tokens if prompt else NOTHING
        self.tokenizer.decode(prompt)  # UserError for numbers that are no tokens
        return torch.tensor(prompt, dtype=torch.long)

    def _within(self, tokens: Tensor) -> Tensor:
        """The tokens of a prompt to continue, which must not end a document."""
        if self.tokenizer.end in tokens.tolist():
            rule = "send the tokens after it, or max_tokens 0"
            raise UserError(f"prompt: token {self.tokenizer.end} ends a document, {rule}")
        return tokens

    @property
    def notices(self) -> dict[str, list[str]]:
        """How texts are read, where this is not how they were given."""
        found = self.samples.notices if self.samples else []
        return {"notices": found} if found else {}

    @property
    def usage(self) -> dict[str, int]:
        """Tokens of the prompts, and of the finished choices."""
        found = {"prompt_tokens": self.num_given, "completion_tokens": self.new}
        return found | {"total_tokens": self.num_given + self.new}

    def parts(self) -> Generator[list[Part], None, None]:
        """The next parts of the choices; an empty list is a sign of life.

        The first one says that the prompts are read. UserError for what the model cannot do.
        """
        with suppress(CancelledError):
            self._read()
            yield []
            yield from self._parts()

    def _parts(self) -> Iterator[list[Part]]:
        rows = range(self.ask.n * len(self.given))
        if self.ask.echo:
            yield [part(row, self.tokenizer.decode(self.given[row // self.ask.n])) for row in rows]
        if self.samples is None:
            for row in rows:
                given = self.given[row // self.ask.n]
                yield [part(row, "", "length", self._logprobs(row, given, len(given)))]
            return
        for some in self.samples.own:
            yield from self._written(self.samples, some)

    def _written(self, samples: Samples, batch: range) -> Iterator[list[Part]]:
        """Choices of one batch. Only the end of an infill tells what it is."""
        rows = [Row(samples, index) for index in batch]
        every = 1 if self.ask.stream or samples.stops else EVERY
        steps = samples.batch(batch, self.progress, every=every)
        is_shown = self.ask.stream and not self.ask.suffix
        for tokens in steps:
            pieces = []
            if is_shown:
                pieces = [(row.index, row.add(new)) for row, new in zip(rows, tokens, strict=True)]
            yield [part(index, piece) for index, piece in pieces if piece]
        for place, row in enumerate(rows):
            stream, text = steps.written.streams[place], steps.written.texts[place]
            count = stream.length + stream.has_ended
            if stream.has_stopped and not stream.has_ended:
                count = min(count, self._count(steps.written.generation.tokens[place], text))
            tokens = steps.written.generation.tokens[place, :count].cpu()
            self.new += count - row.given
            self.num_given += row.given * (row.index % self.ask.n == 0)
            stops = stream.has_stopped or bool(self.ask.suffix)
            logprobs = self._logprobs(row.index, tokens, row.given, row.leaves_space)
            yield [part(row.index, row.new(text), "stop" if stops else "length", logprobs)]

    def _count(self, tokens: Tensor, text: str) -> int:
        """The number of tokens that a text needs, which a stop has cut."""
        ends = accumulate(len(self.tokenizer.token_bytes[token]) for token in tokens.tolist())
        size = len(text.encode())
        return sum(end < size for end in ends) + (size > 0)

    def _logprobs(
        self, row: int, tokens: Tensor, first: int, leaves_space: bool = False
    ) -> dict[str, Any] | None:
        """Log-probabilities in nats of `tokens` from `first` on, with `echo` of all."""
        if self.ask.logprobs is None:
            return None
        is_started = self.ask.echo and self.starts[row // self.ask.n]
        found: list[Scored] = [("", None, {})] * is_started
        whole = self._scored(tokens)
        if self.ask.echo and 0 < first < len(tokens):
            given = self._scored(tokens[:first])
            # the prompt has its own score, and all together that of the whole text
            name, value, others = whole[first]
            rest = math.fsum(v or 0.0 for _, v, _ in whole[:first])
            value = (value or 0.0) + rest - math.fsum(v or 0.0 for _, v, _ in given)
            whole[: first + 1] = [*given, (name, value, others)]
        shown = slice(0 if self.ask.echo else first, None)
        found += whole[shown]
        # a space of the first token that belongs to the prompt is not in the text
        space = leaves_space and not self.ask.echo
        # tokens may hold parts of characters, whose names are longer than the text
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        parts = (self.tokenizer.token_bytes[token] for token in tokens[shown].tolist())
        ends = accumulate((len(decoder.decode(part)) for part in parts), initial=0)
        offsets = [0] * is_started + [max(0, end - space) for end in ends][:-1]
        return {
            "tokens": [name for name, _, _ in found],
            "token_logprobs": [value for _, value, _ in found],
            "top_logprobs": [others | {name: value} for name, value, others in found],
            "text_offset": offsets,
        }

    @cached_property
    def _names(self) -> list[str]:
        return list(map(name_of, self.tokenizer.token_bytes))

    def _scored(self, tokens: Tensor) -> list[Scored]:
        """The text of every token, its log-probability as in `score`, and the most probable."""
        model, most = self.lm.model, self.ask.logprobs or 0
        if not len(tokens):
            return []
        names = self._names
        seed = self.ask.seed or 0
        scored = score(model, tokens, samples=self.draws, seed=seed, progress=self.progress)
        others: list[dict[str, float | None]] = []
        if most and isinstance(model, TokenLM):
            P = model.config.patch
            whole = F.pad(tokens, (0, -len(tokens) % P)).to(model.device)
            for start, end in spans(len(whole), model.config.context, patch=P):
                with torch.no_grad():
                    log_p = model.logits(whole[None, start:end])[0].log_softmax(-1)
                for likely in zip(*log_p[len(others) - start :].topk(most), strict=True):
                    values, places = (one.tolist() for one in likely)
                    others.append({names[i]: x for i, x in zip(places, values, strict=True)})
        others += [{}] * (len(tokens) - len(others))
        values = (-math.log(2) * scored.bits).tolist()
        return [(names[tokens[i]], values[i], others[i]) for i in range(len(tokens))]


def name_of(token: bytes) -> str:
    """The text of a token, or its bytes if it holds a part of a character."""
    try:
        return token.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token)


def part(index: int, text: str, reason: str | None = None, logprobs: object = None) -> Part:
    """A choice, or a part of one, as it is sent."""
    return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}
