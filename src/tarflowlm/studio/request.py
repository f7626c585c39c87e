"""Checks of what a visitor sends; the page can be called with any value."""

from typing import Any

from tarflowlm.data import Tokenizer
from tarflowlm.data.prompts import Reading, read, read_template
from tarflowlm.errors import UserError

CHARACTERS, TOKENS, SAMPLES, PARTICLES = 4000, 1024, 4, 64
"""The most that one request may ask for: characters of a text, tokens of a sample, samples, particles."""
MARK = "_"
"""Stands for one token to fill in."""


def whole(value: Any, name: str, least: int, most: int) -> int:
    """A whole number within bounds."""
    found = number(value, name, least, most)
    if found != int(found):
        raise UserError(f"{name} {found:g}: give a whole number from {least} to {most:,}")
    return int(found)


def number(value: Any, name: str, least: int | float, most: int | float) -> float:
    """A number within bounds."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
        raise UserError(f"{name}: give a number from {least:,} to {most:,}")
    return float(value)


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


def check_length(length: int, context: int) -> None:
    """Raises UserError for a text of more tokens than the model sees at once."""
    if length > context:
        raise UserError(
            f"the text has {length:,} tokens, more than the {context:,} that this model sees at once: shorten it"
        )
