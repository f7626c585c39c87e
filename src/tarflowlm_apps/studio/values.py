"""Checks of the values that visitors send, which can be anything."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from urllib.parse import urlencode

from tarflowlm.errors import UserError

CHARACTERS = 4000
"""The most that one request may ask for: characters of a text, and so on."""
TOKENS = 1024
SAMPLES = 4
TRIES = 8
PARTICLES = 64
AROUND = 4


def number(value: object, name: str, least: int | float, most: int | float) -> float:
    if not isinstance(value, int | float) or not least <= value <= most:
        raise UserError(f"{name}: give a number from {least:,} to {most:,}")
    return float(value)


def whole(value: object, name: str, least: int, most: int) -> int:
    found = number(value, name, least, most)
    if not found.is_integer():
        raise UserError(f"{name}: give a whole number")
    return int(found)


def seed(value: object) -> int:
    return whole(value, "seed", 0, 2**31)


def text(value: object) -> str:
    """A text that is not too long; empty for None."""
    if not isinstance(value, str | None) or len(value or "") > CHARACTERS:
        raise UserError(f"give a text of at most {CHARACTERS:,} characters")
    return value or ""


def several(value: str) -> list[str]:
    """The texts between commas."""
    return [one for part in value.split(",") if (one := part.strip())]


Value = str | int | float | list[str]
LINKED = (
    *("model", "beside", "text", "length", "temperature", "top_p", "num", "seed"),
    *("contains", "without"),
)
"""Names of the values of a request to write, in the link above its result."""


def to_address(values: Mapping[str, object]) -> str:
    """The link to a request to write."""
    return f"?{urlencode(values)}"


def from_address(
    asked: Mapping[str, str], usual: Sequence[Value], models: Sequence[str]
) -> list[Value]:
    """The values of a link. A missing or unreadable value is replaced by the `usual` one."""
    found = list(usual)
    for place, (name, value) in enumerate(zip(LINKED, usual, strict=True)):
        given = asked.get(name, "")
        if isinstance(value, list):
            found[place] = [given] if given in models else value
        elif name in asked:
            with suppress(ValueError):
                found[place] = type(value)(given)
    if found[0] not in models:
        found[0] = usual[0]
    return found
