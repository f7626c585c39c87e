"""The edits by name, each a function of a `WordSource` whose keyword arguments are its options.

text = encode(model, tokens[None], generator).repeated(num)
source = WordSource(model, text, generator, progress, tokenizer=tokenizer)
edit = EDITS["words"](source, strength=0.2)
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tarflowlm.config import Decoder, Pick
from tarflowlm.data import Tokenizer
from tarflowlm.editing.rewriting import (
    Candidates,
    covered,
    informative_level,
    rewrite,
    spaces_of,
    token_costs,
)
from tarflowlm.editing.states import (
    Edit,
    Encoded,
    Source,
    encode,
    renoise,
)
from tarflowlm.editing.words import (
    Span,
    find_piece,
    find_words,
    merge_words,
    neighbours,
    pick_words,
    words_of,
)
from tarflowlm.errors import UserError

TEMPERATURE = 0.7
"""Temperature of new words where block 1 has weights of tokens, else 1."""


@dataclass(frozen=True, kw_only=True)
class WordSource(Source):
    """A text to edit by its words, the same in every row."""

    tokenizer: Tokenizer

    @property
    def num(self) -> int:
        """Number of edits."""
        return len(self.text.tokens)

    def symbols(self, text: Encoded) -> list[bytes]:
        """The bytes of every token of a text."""
        tokens: list[int] = text.tokens[0, : text.length].tolist()
        return [self.tokenizer.token_bytes[token] for token in tokens]

    def pick(self, count: int, pick: Pick) -> list[Span]:
        """`count` words of the text."""
        costs = token_costs(self.model, self.text)[0].tolist() if pick == "unlikely" else None
        words = words_of(self.symbols(self.text))
        return pick_words(words, count, self.text.length, self.generator, costs=costs)

    def candidates(
        self, number: int, temperature: float | None, *, may_repeat: bool = False
    ) -> Candidates:
        """Candidates in the most informative state; the usual temperature for None."""
        if temperature is None:
            temperature = TEMPERATURE if self.model.config.has_token_weights else 1.0
        level = informative_level(self.model, self.text.row(0))
        spaces = spaces_of(self.tokenizer.token_bytes)
        return Candidates(number, temperature, level, spaces, may_repeat, self._lead())

    def _lead(self) -> tuple[int, ...]:
        """The end of a document, line or word, behind which a text begins; none without room."""
        config = self.model.config
        if config.patch > 1 or self.text.length >= config.context:
            return ()
        if self.tokenizer.end is not None:
            return (self.tokenizer.end,)
        table = self.tokenizer.token_bytes
        return tuple(table.index(mark) for mark in (b"\n", b" ") if mark in table)[:1]


def redraw_words(
    source: WordSource,
    *,
    strength: float = 0.1,
    words: int | None = None,
    pick: Pick = "random",
    candidates: int = 32,
    temperature: float | None = None,
) -> Edit:
    """Draw some words anew, given all others.

    `strength` is the share of the words, from 0 to 1, and `words` a number of them instead. Where
    the model repeats a word, another one is tried. Of so many `candidates` for every word, or for
    several neighbouring ones, one is taken by how well the rest of the text follows it.
    """
    places = words_of(source.symbols(source.text))
    if not places:
        raise UserError("the text has no words: give some, or name pieces of it to rewrite")
    count = num_words(strength, places) if words is None else words
    spans = [merge_words(source.pick(count, pick), places) for _ in range(source.num)]
    return rewrite(source, spans, source.candidates(candidates, temperature), spare=places)


def rewrite_pieces(
    source: WordSource,
    *,
    pieces: Sequence[str],
    everywhere: bool = False,
    candidates: int = 32,
    temperature: float | None = None,
) -> Edit:
    """Draw these pieces of the text anew, words or more, given everything else.

    The first occurrence of each, or with `everywhere` all of them as whole words.
    """
    symbols = source.symbols(source.text)
    if not pieces:
        raise UserError("no piece of the text is named: give at least one")
    spans = [find_piece(symbols, piece) for piece in pieces]
    if everywhere:
        spans = list({span for piece in pieces for span in find_words(symbols, piece)})
    return rewrite(source, [sorted(spans)] * source.num, source.candidates(candidates, temperature))


def replace_piece(
    source: WordSource,
    *,
    old: str,
    new: str,
    around: int = 1,
    candidates: int = 32,
    temperature: float | None = None,
) -> Edit:
    """Put `new` where `old` first stands, as a word if it is one, and keep the rest.

    `around` words on each side may be drawn anew, given all else; 0 keeps them.
    """
    start, stop, tokens = _replacement(source, old, new)
    before = source.text.tokens[0, : source.text.length].cpu()
    changed = torch.cat((before[:start], tokens, before[stop:]))
    if len(changed) > source.model.config.context:
        raise UserError(
            f"with {new!r} the text has {len(changed)} tokens, more than the context of "
            f"{source.model.config.context}: shorten it"
        )
    text = encode(source.model, changed[None], source.generator).repeated(source.num)
    words = words_of(source.symbols(text))
    # at either end of the text nothing says that a word begins or ends there
    inner = [word for word in words if 0 < word[0] < word[1] < len(changed)]
    spans = neighbours(inner, start, start + len(tokens), around)
    # the old token at every place of the new text
    aligned = torch.cat((before[:start], torch.full((len(tokens),), -1), before[stop:]))
    return rewrite(
        replace(source, text=text),
        [spans] * source.num,
        source.candidates(candidates, temperature, may_repeat=True),
        before=source.text,
        aligned=aligned,
    )


def _replacement(source: WordSource, old: str, new: str) -> tuple[int, int, Tensor]:
    """The first and last place of the tokens that hold `old`, and the tokens to put there."""
    symbols = source.symbols(source.text)
    start, stop = find_piece(symbols, old)
    # with everything else in these tokens: tokens of word pieces begin with a space
    held = b"".join(symbols[start:stop]).decode("utf-8", errors="replace")
    return start, stop, torch.from_numpy(source.tokenizer.encode(held.replace(old, new, 1)))


def renoise_state(
    source: WordSource,
    *,
    level: int,
    strength: float = 0.1,
    words: int | None = None,
    pick: Pick = "random",
    decoder: Decoder = "auto",
) -> Edit:
    """Add noise of a `strength` to the state `level`, everywhere or at some `words`."""
    length = source.text.tokens.shape[1]
    where = None if words is None else covered(source.pick(words, pick), length)
    return renoise(source, level=level, strength=strength, where=where, decoder=decoder)


EDITS: dict[str, Callable[..., Edit]] = {
    "words": redraw_words,
    "rewrite": rewrite_pieces,
    "replace": replace_piece,
    "level": renoise_state,
}
"""The edits by name. `texts.requests.Edit` checks the numbers that they are given."""


def options_of(name: str) -> frozenset[str]:
    """The options of an edit."""
    return frozenset(inspect.signature(EDITS[name]).parameters) - {"source"}


def num_words(strength: float, words: Sequence[Span]) -> int:
    """How many words a share `strength` is: rounded, and at least one unless it is 0."""
    return max(1, round(strength * len(words))) if strength else 0
