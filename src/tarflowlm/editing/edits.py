"""The edits of a request: the text is read, edited as often as requested, and measured.

edited = edit(Edit(text="The king of the land", rewrite="king", num=2), lm)
edited.texts

Words and pieces of the text are spans of its tokens.
"""

import itertools
import re
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from tarflowlm.data import Tokenizer
from tarflowlm.data.prompts import Reading, read
from tarflowlm.editing.redraw import (
    Candidates,
    Span,
    informative_level,
    rewrite,
    spaces_of,
    token_costs,
)
from tarflowlm.editing.states import Change, Encoded, Source, encode, renoise
from tarflowlm.errors import SILENT, Progress, UserError
from tarflowlm.evaluation.likelihood import bits
from tarflowlm.generation.sampling import row_generators
from tarflowlm.model import as_flow
from tarflowlm.requests import Edit, as_texts
from tarflowlm.runs.checkpoint import Checkpoint
from tarflowlm.runs.weights import check_finite

TEMPERATURE = 0.7
"""Temperature of new words where block 1 has weights of tokens, else 1."""


@dataclass(frozen=True)
class Edited:
    """The edits of a text."""

    reading: Reading
    """The text before the edits, as the model reads it."""
    change: Change
    texts: list[str]
    """The new texts."""
    characters: Tensor
    """The characters of every token, [V]."""

    @cached_property
    def bits_before(self) -> float:
        """Bits per character before the edits, at most."""
        return self._bits(self.change.bounds[0][:1], self.change.before[:1]).item()

    @cached_property
    def bits(self) -> Tensor:
        """The same after each edit, [num]."""
        return self._bits(self.change.bounds[1], self.change.tokens)

    def _bits(self, nats: Tensor, tokens: Tensor) -> Tensor:
        # none under a tokenizer that loses some of a text
        count = self.characters[tokens.cpu()].sum(-1)
        return (bits(nats.cpu()) / count.clamp_min(1)).masked_fill(count == 0, torch.nan)


def edit(request: Edit, lm: Checkpoint, progress: Progress = SILENT) -> Edited:
    """The edits of a text.

    UserError for a state of a baseline, and for a text that the model cannot read.
    """
    model = lm.model
    check_finite(model.state_dict(), "model")
    if request.level is not None:
        as_flow(model, "a discrete baseline has no states to change: leave --level out")
    if model.is_exact and model.config.patch > 1:
        raise UserError(f"patch {model.config.patch}: a baseline edits one token per position")
    text = read(lm.tokenizer, request.text, normalize=request.normalize)
    length = len(text.tokens)
    context = model.config.context
    if length > context:
        what = f"the text has {length:,} tokens, more than the context of {context}"
        raise UserError(f"{what}: shorten it")
    generator = torch.Generator().manual_seed(request.seed)
    # every edit starts from the same latents, if there are any
    encoded = encode(model, text.tokens[None], generator).repeated(request.num_each)
    source = Source(model, encoded, generator, progress)
    edits = {
        "words": redraw_words,
        "rewrite": rewrite_pieces,
        "replace": replace_piece,
        "level": renoise_state,
    }
    change = edits[request.kind](request, lm.tokenizer, source)
    return Edited(
        reading=text,
        change=change,
        texts=[lm.tokenizer.decode(tokens) for tokens in change.tokens.tolist()],
        characters=torch.from_numpy(lm.tokenizer.characters_per_token),
    )


def redraw_words(request: Edit, tokenizer: Tokenizer, source: Source) -> Change:
    """Draw some words given all others: a share `strength` of them, or a number of `words`.

    Where the model repeats a word, another one is tried.
    """
    places = words_of(_bytes_of(source.text, tokenizer))
    if not places:
        raise UserError("the text has no words: give some, or name pieces of it to rewrite")
    count = request.words
    if count is None:
        count = num_words(request.strength, places)
    # numbered: the words of an edit do not depend on how many there are
    picked = [
        _picked(request, places, count, replace(source, generator=generator))
        for generator in row_generators(range(request.num_each), source.generator)
    ]
    spans = [merge_words(chosen, places) for chosen in picked]
    return rewrite(source, spans, _candidates(request, tokenizer, source), spare=places)


def rewrite_pieces(request: Edit, tokenizer: Tokenizer, source: Source) -> Change:
    """Draw pieces of the text given everything else: the first occurrence of each, or all."""
    pieces = _bytes_of(source.text, tokenizer)
    named = [
        _read_piece(request, tokenizer, piece, "piece")
        for piece in as_texts(request.rewrite, "rewrite")
    ]
    found = [find_all(pieces, piece) for piece in named]
    spans = [span for each in found for span in (each if request.everywhere else each[:1])]
    spans = list(dict.fromkeys(spans))
    candidates = _candidates(request, tokenizer, source)
    return rewrite(source, [sorted(spans)] * request.num_each, candidates)


def replace_piece(request: Edit, tokenizer: Tokenizer, source: Source) -> Change:
    """Put other words in, and draw `around` words on each side given all else."""
    assert request.replace is not None
    old = _read_piece(request, tokenizer, request.replace[0], "text to replace")
    new = _read_piece(request, tokenizer, request.replace[1], "replacement")
    pieces = _bytes_of(source.text, tokenizer)
    start, stop = find_all(pieces, old)[0]
    # keep everything else in these tokens: word pieces begin with a space
    held = b"".join(pieces[start:stop]).decode("utf-8", errors="replace")
    tokens = torch.from_numpy(tokenizer.encode(held.replace(old, new, 1)))
    before = source.text.tokens[0, : source.text.length].cpu()
    changed = torch.cat((before[:start], tokens, before[stop:]))
    if len(changed) > source.model.config.context:
        raise UserError(
            f"with {new!r} the text has {len(changed)} tokens, more than the context of "
            f"{source.model.config.context}: shorten it"
        )
    text = encode(source.model, changed[None], source.generator).repeated(request.num_each)
    words = words_of(_bytes_of(text, tokenizer))
    # nothing says that a word begins at the start of the text, or ends at its end
    inner = [word for word in words if 0 < word[0] < word[1] < len(changed)]
    spans = neighbours(inner, start, start + len(tokens), request.around)
    renewed = replace(source, text=text)
    candidates = _candidates(request, tokenizer, renewed)
    return rewrite(
        renewed,
        [spans] * request.num_each,
        replace(candidates, may_repeat=True),
        before=source.text,
        aligned=torch.cat((before[:start], torch.full((len(tokens),), -1), before[stop:])),
    )


def renoise_state(request: Edit, tokenizer: Tokenizer, source: Source) -> Change:
    """Add noise to the state `level`, everywhere or at some `words`."""
    assert request.level is not None
    where = None
    if request.words is not None:
        places = words_of(_bytes_of(source.text, tokenizer))
        picked = _picked(request, places, request.words, source)
        where = covered(picked, source.text.tokens.shape[1])
    return renoise(
        source,
        level=request.level,
        strength=request.strength,
        where=where,
        decoder=request.decoder,
    )


def _read_piece(request: Edit, tokenizer: Tokenizer, text: str, name: str) -> str:
    piece = read(tokenizer, text, name=name, normalize=request.normalize).text.strip()
    if not piece:
        raise UserError(f"the {name} {text!r} is white space: give at least one character")
    return piece


def _bytes_of(text: Encoded, tokenizer: Tokenizer) -> list[bytes]:
    """The bytes of every token of the first text."""
    tokens: list[int] = text.tokens[0, : text.length].tolist()
    return [tokenizer.token_bytes[token] for token in tokens]


def _picked(request: Edit, words: list[Span], count: int, source: Source) -> list[Span]:
    """`count` of the words, as the request picks them."""
    costs = None
    if request.pick == "unlikely":
        costs = token_costs(source.model, source.text.row(0))[0].tolist()
    return pick_words(words, count, source.text.length, source.generator, costs=costs)


def _candidates(request: Edit, tokenizer: Tokenizer, source: Source) -> Candidates:
    """The settings for drawing spans: in the most informative state, and after a start of text."""
    config = source.model.config
    temperature = request.temperature
    if temperature is None:
        temperature = TEMPERATURE if config.has_token_weights else 1.0
    table = tokenizer.token_bytes
    # a text begins after the end of a document, line or word, if there is room for this
    marks = [table.index(mark) for mark in (b"\n", b" ") if mark in table]
    if tokenizer.end is not None:
        marks = [tokenizer.end]
    has_room = config.patch == 1 and source.text.length < config.context
    level = informative_level(source.model, source.text.row(0))
    return Candidates(
        number=request.candidates,
        temperature=temperature,
        level=level,
        banned=tokenizer.end if config.has_token_weights and level == 0 else None,
        spaces=spaces_of(table),
        lead=tuple(marks[:1]) if has_room else (),
    )


# words and pieces as spans


def words_of(pieces: Sequence[bytes]) -> list[Span]:
    """The words of a text, given the bytes of its tokens: the tokens between white space.

    A token that begins with white space begins a word; a token of white space alone is in none.
    """
    spans: list[Span] = []
    inside = False
    for at, piece in enumerate(pieces):
        is_space = not piece.strip()
        if not is_space and (not inside or piece[:1].isspace()):
            spans.append((at, at + 1))
        elif not is_space:
            spans[-1] = (spans[-1][0], at + 1)
        inside = not is_space
    return spans


def num_words(strength: float, words: Sequence[Span]) -> int:
    """The number of words in a share `strength`: rounded, and at least one unless it is 0."""
    return max(1, round(strength * len(words))) if strength else 0


def pick_words(
    words: Sequence[Span],
    count: int,
    length: int,
    generator: torch.Generator,
    costs: Sequence[float] | None = None,
) -> list[Span]:
    """`count` words of a text of `length` tokens: at random, or by the highest mean of `costs`.

    They are listed first to last. Words at either end of the text are picked last, because nothing
    says that a word begins or ends there. UserError for more words than there are.
    """
    if not 0 <= count <= len(words):
        raise UserError(f"words {count}: the text has {len(words)}, give at most that")
    if costs is None:
        order = torch.randperm(len(words), generator=generator).tolist()
    else:
        mean = [sum(costs[start:stop]) / (stop - start) for start, stop in words]
        order = sorted(range(len(words)), key=lambda i: -mean[i])
    order.sort(key=lambda i: words[i][0] == 0 or words[i][1] == length)
    return [words[i] for i in sorted(order[:count])]


def merge_words(chosen: Sequence[Span], words: Sequence[Span]) -> list[Span]:
    """The chosen words, first to last; neighbours and the white space between them are one span."""
    spans: list[Span] = []
    previous = False
    for word in words:
        if word in chosen:
            spans.append((spans.pop()[0] if previous else word[0], word[1]))
        previous = word in chosen
    return spans


def neighbours(words: Sequence[Span], start: int, stop: int, count: int) -> list[Span]:
    """`count` words before the place `start`, and as many from `stop` on: a span for each side."""
    before = [word for word in words if word[1] <= start]
    after = [word for word in words if word[0] >= stop]
    chosen = [*before[max(len(before) - count, 0) :], *after[:count]]
    # the two sides are apart, even if no word is between them
    return [*merge_words(chosen, before), *merge_words(chosen, after)]


def covered(spans: Sequence[Span], length: int) -> Tensor:
    """Which of `length` tokens lie in the spans, [T]."""
    found = torch.zeros(length, dtype=torch.bool)
    for start, stop in spans:
        found[start:stop] = True
    return found


def find_all(pieces: Sequence[bytes], piece: str) -> list[Span]:
    """The tokens that hold each occurrence of `piece`; one that cuts a word does not count.

    Words are cut between two letters of scripts with capitals, or digits, because other scripts may
    write words without spaces. UserError for a piece that does not occur.
    """
    # tokens may hold parts of characters, so places are counted in bytes
    handler = "surrogateescape"
    text = b"".join(pieces).decode("utf-8", handler)
    ends = list(itertools.accumulate(len(part) for part in pieces))
    is_letter = [c.isdigit() or c.lower() != c.upper() for c in text]
    cuts = {at for at, pair in enumerate(itertools.pairwise(is_letter), 1) if all(pair)}
    # a look-ahead also finds an occurrence that begins inside one that cuts a word
    starts = [found.start() for found in re.finditer(f"(?={re.escape(piece)})", text)]
    places: list[tuple[int, int]] = []
    for at in starts:
        place = at, at + len(piece)
        if cuts.isdisjoint(place) and (not places or at >= places[-1][1]):
            places.append(place)
    if not piece or piece not in text:
        raise UserError(f"{piece!r} does not occur in the text: give a piece of it")
    if not places:
        word = re.findall(rf"\w*{re.escape(piece)}\w*", text)[0]
        raise UserError(f"{piece!r} is part of a word: give {word!r}")
    found = [[len(text[:at].encode("utf-8", handler)) for at in place] for place in places]
    return [(bisect_right(ends, start), bisect_left(ends, stop) + 1) for start, stop in found]
