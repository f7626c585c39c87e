"""The values of visitors, checked: the page can be called with any."""

from collections.abc import Sequence
from contextlib import suppress

from tarflowlm.errors import UserError
from tarflowlm.texts import Writing

CHARACTERS = 4000
"""The most that one request may ask for: characters of a text, and so on."""
TOKENS = 1024
SAMPLES = 4
TRIES = 8
PARTICLES = 64
MARK = "_"  # stands for one token to fill in


def number(value: object, name: str, least: float, most: float) -> float:
    """A number within bounds."""
    found = _within(value, least, most)
    if found is None:
        raise UserError(f"{name}: give a number from {least:g} to {most:g}")
    return found


def whole(value: object, name: str, least: int, most: int) -> int:
    """A whole number within bounds."""
    found = _within(value, least, most)
    if found is None or not found.is_integer():
        raise UserError(f"{name}: give a whole number from {least:,} to {most:,}")
    return int(found)


def _within(value: object, least: int | float, most: int | float) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if least <= value <= most else None


def seed(value: object) -> int:
    """A seed."""
    return whole(value, "seed", 0, 2**31)


def choice(value: object, allowed: Sequence[str]) -> str:
    """One of the allowed words; the first one instead of any other value."""
    return value if isinstance(value, str) and value in allowed else allowed[0]


def text(value: object, name: str = "text") -> str:
    """A text that is not too long; empty for None."""
    if not isinstance(value, str | None) or len(value or "") > CHARACTERS:
        raise UserError(f"{name}: give a text of at most {CHARACTERS:,} characters")
    return value or ""


def writing(
    start: object,
    length: object,
    temperature: object,
    top_p: object,
    num: object,
    seed_value: object,
) -> Writing:
    """A request to write: a text to continue, or one with blanks; without any, from nothing."""
    given = text(start)
    is_template = MARK in given
    cut = number(top_p, "top-p", 0.05, 1.0)
    return Writing(
        prompts=(given,) if given and not is_template else (),
        template=given if is_template else None,
        num_tokens=None if is_template else whole(length, "length", 1, TOKENS),
        temperature=number(temperature, "temperature", 0.1, 2.0),
        top_p=None if cut == 1.0 else cut,
        num=whole(num, "samples", 1, SAMPLES),
        seed=seed(seed_value),
    )


def from_address(
    asked: dict[str, str], usual: Sequence[object], models: Sequence[str]
) -> list[object]:
    """The values of a request to write, as the link above its result names them.

    The `usual` ones stand for those that the link lacks, or that cannot be read.
    """
    model, start, *numbers = usual
    found: list[object] = [choice(asked.get("model"), [str(model), *models])]
    found.append(text(asked.get("text", start)))
    for name, value in zip(("length", "temperature", "top_p", "num", "seed"), numbers, strict=True):
        kind = float if name in ("temperature", "top_p") else int
        with suppress(ValueError):
            value = kind(asked[name]) if name in asked else value
        found.append(value)
    return found
