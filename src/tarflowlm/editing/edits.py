"""The kinds of edit with their options and defaults: one table for the command line and the studio.

text = encode(model, tokens[None], generator)
source = Source(model, tokenizer, text.repeated(num), generator, progress)
edit = Redraw(strength=0.2).apply(source)
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence, Sized
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, Literal

import torch

from tarflowlm.config import Decoder
from tarflowlm.data import Tokenizer
from tarflowlm.editing.rewriting import blend, covered, informative_level, rewrite, token_costs
from tarflowlm.editing.states import Edit, Encoded, check_share, interpolate, renoise, substitute
from tarflowlm.editing.words import (
    Span,
    blended_spans,
    find_piece,
    find_words,
    merge_words,
    pick_words,
    words_of,
)
from tarflowlm.errors import UserError
from tarflowlm.model import TarFlowLM
from tarflowlm.progress import SILENT, Progress

TEMPERATURE = 0.7
"""Temperature of new words where block 1 has weights of tokens: rare words are rarely what was
meant.
"""

Pick = Literal["random", "unlikely"]
"""Which words: at random, or those that cost most in block 1."""


def num_words(strength: float, words: Sequence[Span]) -> int:
    """How many words a share `strength` is: rounded, at least one unless it is 0. UserError outside
    of [0, 1].
    """
    check_share(strength, "strength")
    return max(1, round(strength * len(words))) if strength and words else 0


def common_length(text: Sized, other: Sized) -> int:
    """The tokens of the shorter of two texts. UserError where little of the first `text` would be
    left.
    """
    if 2 * len(other) < len(text):
        what = f"the other text has {len(other)} of the {len(text)} tokens of the text"
        raise UserError(f"{what}: give one that is about as long")
    return min(len(text), len(other))


@dataclass(frozen=True)
class Source:
    """A text to edit, in every row of `text`: each row is one edit, with its own noise."""

    model: TarFlowLM
    tokenizer: Tokenizer
    text: Encoded
    generator: torch.Generator
    progress: Progress = SILENT

    @property
    def num(self) -> int:
        """Number of edits."""
        return len(self.text.tokens)

    def stage(self, blocks: int) -> None:
        """Begin the progress of an edit that passes the positions of the text through so many
        blocks.
        """
        self.progress.stage(
            "editing, positions", blocks * (self.text.tokens.shape[1] // self.model.config.patch)
        )

    def symbols(self, text: Encoded | None = None) -> list[bytes]:
        """The bytes of every token of the text, or of another one."""
        text = text or self.text
        return [
            self.tokenizer.token_bytes[token] for token in text.tokens[0, : text.length].tolist()
        ]

    def pick(self, count: int, pick: Pick) -> list[Span]:
        """`count` words of the text."""
        costs = token_costs(self.model, self.text)[0].tolist() if pick == "unlikely" else None
        return pick_words(
            words_of(self.symbols()), count, self.text.length, self.generator, costs=costs
        )


@dataclass(frozen=True, kw_only=True)
class EditKind(ABC):
    """A kind of edit. The fields of a subclass are the options that it uses."""

    @abstractmethod
    def apply(self, source: Source) -> Edit:
        """Edit every row of the text. Names the stages of the progress."""


@dataclass(frozen=True, kw_only=True)
class Resampling(EditKind):
    """An edit that resamples words: one candidate is taken by how well the rest of the text follows
    it.
    """

    candidates: int = 32
    """Candidates for every resampled span."""
    temperature: float | None = None
    """Temperature of the candidates; None is 0.7, or 1 where block 1 has no weights of tokens."""

    def settings(self, source: Source) -> dict[str, Any]:
        """Arguments of `rewrite` and `blend`: words are resampled in the most informative state."""
        usual = TEMPERATURE if source.model.config.has_token_weights else 1.0
        temperature = usual if self.temperature is None else self.temperature
        how = {
            "level": informative_level(source.model, source.text.row(0)),
            "temperature": temperature,
        }
        return {
            "candidates": self.candidates,
            **how,
            "generator": source.generator,
            "progress": source.progress,
        }


@dataclass(frozen=True, kw_only=True)
class Redraw(Resampling):
    """Resample some words, given all others. If the model repeats a word, another one is tried in
    its place.
    """

    strength: float = 0.1
    """Share of the words, from 0 to 1."""
    words: int | None = None
    """Number of words, in place of the share."""
    pick: Pick = "random"

    def apply(self, source: Source) -> Edit:
        words = words_of(source.symbols())
        if not words:
            raise UserError("the text has no words: give some, or name pieces of it to rewrite")
        count = num_words(self.strength, words) if self.words is None else self.words
        spans = [merge_words(source.pick(count, self.pick), words) for _ in range(source.num)]
        source.progress.stage("resampling, pieces", sum(map(len, spans)))
        return rewrite(source.model, source.text, spans, spare=words, **self.settings(source))


@dataclass(frozen=True, kw_only=True)
class Rewrite(Resampling):
    """Resample given pieces of the text, words or more."""

    pieces: Sequence[str]
    everywhere: bool = False
    """Every occurrence as whole words, in place of the first one of each piece."""

    def apply(self, source: Source) -> Edit:
        symbols = source.symbols()
        if not self.pieces:
            raise UserError("no piece of the text is named: give at least one")
        spans = [find_piece(symbols, piece) for piece in self.pieces]
        if self.everywhere:
            spans = list({span for piece in self.pieces for span in find_words(symbols, piece)})
        source.progress.stage("resampling, pieces", len(spans) * source.num)
        return rewrite(
            source.model, source.text, [sorted(spans)] * source.num, **self.settings(source)
        )


@dataclass(frozen=True, kw_only=True)
class Replace(EditKind):
    """Replace the first `old`, as a word if it is one, by `new` of as many tokens; what follows
    keeps its noise.
    """

    old: str
    new: str

    def apply(self, source: Source) -> Edit:
        symbols = source.symbols()
        start, stop = find_piece(symbols, self.old)
        # with everything else in these tokens: tokens of word pieces begin with a space
        held = b"".join(symbols[start:stop]).decode("utf-8", errors="replace")
        tokens = torch.from_numpy(source.tokenizer.encode(held.replace(self.old, self.new, 1)))
        if len(tokens) != stop - start:
            what = (
                f"{held!r} has {stop - start} tokens, with {self.new!r} in its place {len(tokens)}"
            )
            words = (
                token.decode("utf-8", "ignore").strip() for token in source.tokenizer.token_bytes
            )
            near = get_close_matches(self.new, [word for word in words if word.isalpha()], 4, 0.5)
            hint = (
                f", say one of one token: {', '.join(near)}," if near and stop - start == 1 else ","
            )
            raise UserError(
                f"{what}, and these must agree: choose other words{hint} or rewrite {self.old!r}"
            )
        replacements = torch.full((source.text.length,), -1)
        replacements[start:stop] = tokens
        source.stage(1)
        model, generator = source.model, source.generator
        return substitute(
            model, source.text, replacements, generator=generator, progress=source.progress
        )


@dataclass(frozen=True, kw_only=True)
class Toward(Resampling):
    """Move toward another text of the same length: take a stretch of its words, or interpolate the
    states `level`.
    """

    other: Encoded
    """The other text [1, T]."""
    weight: float = 0.5
    """Share of the words to take, or weight of the other state: 0 is the text, 1 the other text."""
    level: int | None = None
    """Interpolate this state; None takes words."""
    decoder: Decoder = "auto"
    """How the blocks below the `level` are inverted."""

    def apply(self, source: Source) -> Edit:
        other = self.other.repeated(source.num)
        if self.level is not None:
            source.stage(self.level)
            how: Any = {
                "level": self.level,
                "generator": source.generator,
                "progress": source.progress,
            }
            return interpolate(
                source.model, source.text, other, weight=self.weight, decoder=self.decoder, **how
            )
        check_share(self.weight, "weight")
        first, second = (words_of(source.symbols(text)) for text in (source.text, other))
        spans, count = [], round(self.weight * len(second))
        for _ in range(source.num):
            start = int(torch.randint(len(second) - count + 1, (), generator=source.generator))
            spans.append(
                blended_spans(first, second, second[start : start + count], source.text.length)
            )
        source.progress.stage("resampling, texts", source.num)
        return blend(source.model, source.text, other, spans, **self.settings(source))


@dataclass(frozen=True, kw_only=True)
class Renoise(EditKind):
    """Add noise to a state in latent space: h -> sqrt(1 - s^2) h + s eps with s the `strength`."""

    level: int
    """0 is the latents, the number of blocks the noise."""
    strength: float = 0.1
    words: int | None = None
    """Change the state at so many words only."""
    pick: Pick = "random"
    decoder: Decoder = "auto"
    """How the blocks below the `level` are inverted."""

    def apply(self, source: Source) -> Edit:
        T = source.text.tokens.shape[1]
        where = None if self.words is None else covered(source.pick(self.words, self.pick), T)
        source.stage(self.level)
        how: Any = {"level": self.level, "generator": source.generator, "progress": source.progress}
        return renoise(
            source.model,
            source.text,
            strength=self.strength,
            where=where,
            decoder=self.decoder,
            **how,
        )


EDITS = dict[str, type[EditKind]](
    words=Redraw, rewrite=Rewrite, replace=Replace, toward=Toward, level=Renoise
)
"""The kinds of edit by name."""
