"""From a user's text to tokens, by one rule for all texts, and from tokens back to text."""

import codecs
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from string import ascii_letters

import torch
from torch import Tensor

from tarflowlm.config import Normalization
from tarflowlm.data.counting import Count
from tarflowlm.data.normalize import normalize_text8
from tarflowlm.data.tokenizer import Tokenizer
from tarflowlm.errors import UserError
from tarflowlm.schema import check_type

BLANK = -1  # marks a token of a template that is to be drawn
GAP = r"\[(?:\.{2,3}|…)[0-9]{0,4}\]"  # a gap of unknown length in a template
LONGEST_GAP = 8  # tokens of a gap that names no number
_SHOWN = 200  # characters of a text in a notice
PLAIN = {
    **dict.fromkeys("\u201c\u201d\u201e\u00ab\u00bb", '"'),
    **dict.fromkeys("\u2018\u2019\u201a", "'"),
    "\u2013": "-",
    "\u2014": "--",
    "\u2026": "...",
}
"""Curly quotes, dashes and the ellipsis, and what a model may know instead."""


@dataclass(frozen=True, eq=False)
class Gap:
    """Tokens to draw between given ones: `least` to `most`, with a uniform prior over lengths."""

    most: int
    least: int = 1
    begins: Tensor | None = None
    """The tokens [V] that may come first; None for all."""
    once: bool = False
    """Whether the given tokens after the gap must not occur in it, but in a longer word."""


@dataclass(frozen=True)
class Reading:
    """A user's text as a model reads it.

    `tokens` are int64 [T], `text` is their text, and `given` the text that the user wrote.
    """

    tokens: Tensor
    text: str
    given: str
    begins: Tensor | None = None
    """The tokens [V] that may follow a prompt: those with the space that was left to them."""
    parts: tuple[Tensor | Gap, ...] = ()
    """Pieces and gaps of a template. `tokens` has each gap at its longest, as BLANKs."""

    @property
    def notice(self) -> str | None:
        """A line that shows the text if it differs from the given one, else None."""
        if self.text == self.given:
            return None
        shown = self.text if len(self.text) <= _SHOWN else f"{self.text[:_SHOWN]}..."
        return f"read as: {shown}".replace("\n", " ")


def read(
    tokenizer: Tokenizer,
    text: str,
    *,
    name: str = "text",
    normalize: Normalization | None = None,
    goes_on: bool = False,
) -> Reading:
    """Normalise `text` like the training text of the tokenizer's model, and encode it.

    text8 gives lower case, spelled digits, and one space for everything else; the text keeps a
    space at either end if and only if it was given with white space there. Without normalisation
    the text becomes lower case for an alphabet without upper case. `normalize` replaces the
    tokenizer's normalisation. `goes_on`: the model continues the text, so if tokens hold the space
    before a word, a space at the end is left to the next token, one of the reading's `begins`.

    UserError, calling the text `name`, if it is empty or not UTF-8, has unknown characters, or
    leaves nothing.
    """
    check_text(text, name)
    how = normalize or tokenizer.normalization
    found = _normalized(tokenizer, text, how)
    _check_left(found, text, name, how)
    begins = _with_space(tokenizer, found) if goes_on and found != " " else None
    tokens = tokenizer.encode(found if begins is None else found[:-1])
    return Reading(torch.from_numpy(tokens), found, text, begins)


def read_stop(
    tokenizer: Tokenizer, text: str, *, normalize: Normalization | None = None
) -> Reading:
    """Read a text before which samples end. One that loses its punctuation is a whole word."""
    found = read(tokenizer, text, name="stop", normalize=normalize)
    how = normalize or tokenizer.normalization
    is_word = how != "none" and normalize_text8(text).strip() != text.strip().lower()
    return replace(found, text=f" {found.text.strip()} ") if is_word else found


def read_template(
    tokenizer: Tokenizer, text: str, blank: str = "_", *, normalize: Normalization | None = None
) -> Reading:
    """Read a text in which every `blank` stands for one token to be drawn, BLANK in `tokens`.

    [...] stands for 1 to LONGEST_GAP of them, [...12] for 1 to 12; [..] and […] are the same.
    `read` reads the pieces between the blanks. The model continues a piece before a blank, so the
    first token of a gap brings the space that was left to it. A blank counts as a letter: a comma
    next to it becomes a space. A backslash before the character makes it plain text, also where the
    model's alphabet has it.
    """
    check_text(text, "template")
    if not isinstance(blank, str) or len(blank) != 1:
        raise UserError(f"blank {blank!r}: give a single character, as --blank ☐")
    found = re.split(f"({_mark(blank)})", text)
    texts = [unescaped(piece, blank) for piece in found[::2]]
    marks = found[1::2]
    how = normalize or tokenizer.normalization
    pieces = [
        _normalized(tokenizer, piece, how, i > 0, i < len(marks)) for i, piece in enumerate(texts)
    ]
    _check_marks(text, blank, marks, pieces[-1])
    _check_left("".join(pieces), "".join(texts), "template", how)
    parts: list[Tensor | Gap] = []
    for piece, mark in zip(pieces, marks, strict=False):
        begins = _with_space(tokenizer, piece)
        known = tokenizer.encode(piece if begins is None else piece[:-1])
        most = 1 if mark == blank else int(mark.strip("[.…]") or LONGEST_GAP)
        gap = Gap(most, begins=None if mark == blank else begins)
        parts += [torch.from_numpy(known), gap]
    parts.append(torch.from_numpy(tokenizer.encode(pieces[-1])))
    tokens = [torch.full((part.most,), BLANK) if isinstance(part, Gap) else part for part in parts]
    shown = "".join(piece + mark for piece, mark in zip(pieces, [*marks, ""], strict=True))
    given = unescaped(text, blank)
    return Reading(torch.cat(tokens), shown, given, parts=tuple(parts))


def has_blanks(text: str) -> bool:
    """Whether a text is a template."""
    return re.search(_mark("_"), text) is not None


def has_gaps(text: str) -> bool:
    """Whether a text has a gap of unknown length, or a blank that stands apart."""
    return re.search(rf"{GAP}|(?<!\S)_+(?!\w)", text) is not None


def _mark(blank: str) -> str:
    """The pattern of a blank or a gap."""
    return rf"{GAP}|(?<!\\){re.escape(blank)}"


def unescaped(text: str, blank: str) -> str:
    """The text without the backslashes that make a `blank` plain text."""
    return text.replace(f"\\{blank}", blank)


def _check_marks(text: str, blank: str, marks: list[str], last: str) -> None:
    """UserError for a template without blanks, and for a gap whose length nothing limits."""
    flaw = ""
    if re.search(r"\[(?:\.\.|…)", re.sub(GAP, "", text)):
        flaw = "has a gap that cannot be read: write [...] or [...12]"
    elif not marks:
        how = f"mark tokens to fill in by {blank!r} (or --blank) or [...]"
        flaw = f"has no blank: {how}, or make it a prompt"
    elif any(re.fullmatch(r"\[\D+0+\]", mark) for mark in marks):
        flaw = "has a gap of 0 tokens: give at least 1, as [...1]"
    elif marks[-1] != blank and not last.strip():
        flaw = "ends in a gap, whose length is open: put text after it, or make it a prompt"
    if flaw:
        raise UserError(f"the template {text!r} {flaw}")


def tokens_without(tokenizer: Tokenizer, letters: str) -> Tensor:
    """A mask [V] of the tokens without any of these letters, small or capital.

    A token that holds part of a character is left out with every letter that shares a byte with it.
    UserError if no token with a letter or digit is left.
    """
    check_text(letters, "text of `without`")
    # some letters have no capital, and become several
    banned = {x for letter in letters for x in (letter, letter.lower(), letter.upper())}
    banned = {x for x in banned if len(x) == 1}
    parts = {byte for byte in "".join(banned).encode() if byte > 127}
    free: list[bool] = []
    has_letters = False
    for token in tokenizer.token_bytes:
        text = token.decode("utf-8", errors="ignore")
        is_broken = len(text.encode()) < len(token)
        is_free = banned.isdisjoint(text) and not (is_broken and parts.intersection(token))
        free.append(is_free)
        has_letters |= is_free and any(map(str.isalnum, text))
    if not has_letters:
        raise UserError(f"without {letters!r}: no letters are left to write with; ban fewer")
    return torch.tensor(free)


def tokens_after_word(tokenizer: Tokenizer) -> Tensor | None:
    """A mask [V] of the tokens that cannot continue a word; None if all can."""
    texts = (token.decode("utf-8", errors="replace") for token in tokenizer.token_bytes)
    # a token that begins inside a character may continue a word
    mask = torch.tensor([re.match("[\\w\ufffd]", text) is None for text in texts])
    return mask if mask.any() else None


def _with_space(tokenizer: Tokenizer, text: str) -> Tensor | None:
    """A mask [V] of the tokens that can take the space at the end of a text; None without them."""
    can = text.endswith(" ") and tokenizer.word_starts.any()
    return torch.from_numpy(tokenizer.word_starts) if can else None


def check_text(text: str, name: str) -> None:
    """UserError, which calls the text `name`, if it is no text, empty or not UTF-8."""
    check_type(text, name, str, "give a text, a str")
    if not text:
        raise UserError(f"the {name} is empty: give at least one character")
    # Python keeps a byte that it cannot decode as half of a surrogate pair (PEP 383)
    found = re.search("[\ud800-\udfff]", text)
    if found is not None:
        what = f"character {found.start()} is {found[0]!r}"
        raise UserError(f"the {name} is not UTF-8 ({what}): convert it to UTF-8")


def _check_left(found: str, given: str, name: str, how: Normalization) -> None:
    if given.strip() and not found.strip():
        what = f"nothing is left of the {name} {given!r} once normalised ({how})"
        raise UserError(f"{what}: give some letters a-z")


def _normalized(
    tokenizer: Tokenizer,
    text: str,
    how: Normalization,
    after_blank: bool = False,
    before_blank: bool = False,
) -> str:
    text = _plain(tokenizer, text)
    if how == "none" or not text:
        has_capitals = tokenizer.alphabet != tokenizer.alphabet.lower()
        return text if has_capitals and tokenizer.normalization == "none" else text.lower()
    words = normalize_text8(text).strip()
    # a blank counts as a letter, so as within a text everything else next to it becomes a space
    starts_apart = text[0].isspace() or (after_blank and text[0] not in ascii_letters)
    ends_apart = text[-1].isspace() or (before_blank and text[-1] not in ascii_letters)
    if not words:
        return " " if starts_apart and ends_apart else ""
    return (" " if starts_apart else "") + words + (" " if ends_apart else "")


def _plain(tokenizer: Tokenizer, text: str) -> str:
    """The text with plain quotes and dashes for those that are no token, and so hardly ever were in
    the text of the model. Bytes are tokens of every text.
    """
    if tokenizer.kind == "byte" or text.isascii():
        return text
    known = tokenizer.token_bytes
    for curly, plain in PLAIN.items():
        if curly in text and curly.encode() not in known and plain[:1].encode() in known:
            text = text.replace(curly, plain)
    return text


# from tokens to text


def characters(tokens: Tensor, tokenizer: Tokenizer) -> list[str]:
    """The text of each of the tokens [T]; together they are the text.

    A character of several tokens is in the last of them, so the others may be empty.
    """
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    found = [decoder.decode(tokenizer.token_bytes[token]) for token in tokens.tolist()]
    if found:
        found[-1] += decoder.decode(b"", final=True)
    return found


class TextStream:
    """A text that grows token by token. Characters that may begin a stop are held back."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        stops: Sequence[str] = (),
        *,
        start: int = 0,
        end: int | None = None,
        count: Count | None = None,
    ) -> None:
        """Stops count from character `start` on. The token `end` is a stop, too, and so is the end
        of a `count` of words or sentences.
        """
        self.stops, self.start, self.end, self.count = stops, start, end, count
        self.text, self.has_stopped, self.has_ended = "", False, False
        self.shown = 0
        self.length = 0  # tokens read
        self._bytes = tokenizer.token_bytes
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def add(self, tokens: Tensor) -> str:
        """Read the next tokens [n]; returns the characters that have become certain."""
        if self.has_stopped:
            return ""
        places = tokens.tolist()
        is_last = self.end in places
        if is_last:
            places = places[: places.index(self.end)]
        self.length += len(places)
        piece = self._extend(self._decoder.decode(b"".join(self._bytes[i] for i in places)))
        if is_last and not self.has_stopped:
            piece += self.close()
            self.has_ended = not self.has_stopped
            self.has_stopped = True
        return piece

    def close(self) -> str:
        """End the text, and return the characters that still waited."""
        if self.has_stopped:
            return ""
        return self._extend(self._decoder.decode(b"", final=True), is_last=True)

    def _extend(self, piece: str, *, is_last: bool = False) -> str:
        self.text += piece
        # no character that was shown can belong to a stop
        start = max(self.start, self.shown)
        begins = {stop: self.text.find(stop, start) for stop in self.stops}
        # the text ends where the stop begins that is complete first
        complete = [(at + len(stop), at) for stop, at in begins.items() if at >= 0]
        _, at = min(complete, default=(0, len(self.text)))
        if self.count is not None:
            at = self.count.end(self.text, is_whole=is_last) or at
        self.has_stopped = at < len(self.text)
        self.text = self.text[:at]
        ready = at
        if not self.has_stopped and not is_last:
            # characters at the end wait if they may begin a stop
            longest = min(max(map(len, self.stops), default=0) - 1, at - self.start)
            waiting = (
                count
                for count in range(longest, 0, -1)
                if any(stop.startswith(self.text[-count:]) for stop in self.stops)
            )
            ready -= next(waiting, 0)
            if self.count is not None:
                # a text ends before the space that shows its last word to be over
                ready = min(ready, len(self.text.rstrip()))
        found = self.text[self.shown : ready]
        self.shown = max(self.shown, ready)
        return found
