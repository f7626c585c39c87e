"""What a visitor asks for, checked on the server: the page can be called with anything."""

from typing import Any

import torch

from tarflowlm.data import Tokenizer
from tarflowlm.errors import UserError
from tarflowlm.generation.sampling import BLANK

CHARACTERS, TOKENS, SAMPLES, PARTICLES = 4000, 1024, 4, 64
"""The most that one request may ask for: characters of a text, tokens of a sample, samples, particles."""
MARK = "_"
"""Stands for one token to fill in."""


def whole(value: Any, name: str, least: int, most: int) -> int:
    """A whole number within bounds; UserError, naming it, for anything else."""
    found = number(value, name, least, most)
    if found != int(found):
        raise UserError(f"{name} {found:g}: give a whole number from {least} to {most:,}")
    return int(found)


def number(value: Any, name: str, least: int | float, most: int | float) -> float:
    """A number within bounds; UserError, naming it, for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
        raise UserError(f"{name}: give a number from {least:,} to {most:,}")
    return float(value)


def one_of(value: Any, name: str, allowed: tuple[str, ...]) -> str:
    """One of the allowed words; UserError for anything else."""
    if value not in allowed:
        raise UserError(f"{name}: choose one of {', '.join(allowed)}")
    return str(value)


def text(value: Any, name: str) -> str:
    """A text that is not too long; UserError for anything else."""
    if value is None:
        return ""
    if not isinstance(value, str):
        raise UserError(f"{name}: give a text")
    if len(value) > CHARACTERS:
        raise UserError(
            f"the {name} has {len(value):,} characters, more than the {CHARACTERS:,} of this page: shorten it"
        )
    return value


def encoded(tokenizer: Tokenizer, piece: str) -> list[int]:
    """The tokens of a piece of text, which is normalised where the tokenizer does not know it as it is."""
    return tokenizer.encode(known(tokenizer, piece)).tolist()


def known(tokenizer: Tokenizer, piece: str) -> str:
    """A piece of text as the tokenizer knows it.

    A space at either end stays one: the piece may continue, or be continued.
    """
    try:
        tokenizer.encode(piece)
    except UserError:
        prepared = tokenizer.prepare(piece).strip()
        before, after = (" " if piece[i : i + 1].isspace() else "" for i in (0, len(piece) - 1))
        return f"{before}{prepared}{after}" if prepared else " "
    return piece


def required(tokenizer: Tokenizer, piece: str, name: str) -> torch.Tensor:
    """The tokens [T] of a text that must not be empty."""
    if not piece.strip():
        raise UserError(f"the {name} is empty: write one")
    return torch.tensor(encoded(tokenizer, piece))


def template(tokenizer: Tokenizer, piece: str) -> torch.Tensor:
    """The tokens [T] of a text that may go on, BLANK for every mark in it."""
    found: list[int] = []
    for part in piece.split(MARK):
        found += [*tokenizer.encode_open(known(tokenizer, part)).tolist(), BLANK]
    return torch.tensor(found[:-1], dtype=torch.long)


def one_window(length: int, context: int) -> None:
    """UserError for a text of more tokens than the model sees at once."""
    if length > context:
        raise UserError(
            f"the text has {length:,} tokens, more than the {context:,} that this model sees at once: shorten it"
        )
