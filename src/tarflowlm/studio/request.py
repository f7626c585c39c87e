"""Checks of what a visitor sends; the page can be called with any value."""

from typing import Any

from tarflowlm.data import Tokenizer
from tarflowlm.data.prompts import Reading, read, read_template
from tarflowlm.errors import UserError

CHARACTERS, TOKENS, SAMPLES, PARTICLES = 4000, 1024, 4, 64
"""The most that one request may ask for: characters of a text, tokens of a sample, samples, particles."""
MARK = "_"
"""Stands for one token to fill in."""


def number(value: Any, name: str, least: int | float, most: int | float) -> float:
    """A number within bounds; a whole number if both bounds are."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and least <= value <= most
    is_whole = isinstance(least, int) and isinstance(most, int)
    if not is_number or (is_whole and value != int(value)):
        raise UserError(f"{name}: give a {'whole ' * is_whole}number from {least:,} to {most:,}")
    return float(value)


def whole(value: Any, name: str, least: int, most: int) -> int:
    """A whole number within bounds."""
    return int(number(value, name, least, most))


def choice(value: Any, allowed: tuple[str, ...]) -> str:
    """One of the allowed words: the first one in place of any other value."""
    return value if value in allowed else allowed[0]


def text(value: Any, name: str) -> str:
    """A text that is not too long; empty for None."""
    if not isinstance(value, str | None) or len(value or "") > CHARACTERS:
        raise UserError(f"{name}: give a text of at most {CHARACTERS:,} characters")
    return value or ""


def reading(tokenizer: Tokenizer, value: Any, name: str = "text") -> Reading:
    """A text that is not empty, as the model reads it."""
    return read(tokenizer, text(value, name), name=name)


def template(tokenizer: Tokenizer, value: Any) -> Reading:
    """A text with a blank for every mark; without any, a text to be continued."""
    found = text(value, "text")
    return read_template(tokenizer, found, MARK) if MARK in found else read(tokenizer, found, goes_on=True)
