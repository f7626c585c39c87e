"""Texts as tokens of several kinds: given, final, changed, noise."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from tarflowlm.data import Tokenizer
from tarflowlm.data.prompts import characters

Kind = Literal["given", "final", "changed", "noise", "open"]
END = "∎"
"""The sign for the end of a document."""
NOISE = "·"
"""The sign for a token of noise: its letters mean nothing, and many fonts lack them."""
PICTURES = {code: chr(0x2400 + code) for code in range(32)} | {ord("\n"): "↵\n"}


@dataclass(frozen=True)
class Token:
    """One token of a row; the lower its `probability`, the fainter it is."""

    symbol: str
    kind: Kind = "final"
    probability: float = 1.0


@dataclass(frozen=True)
class Row:
    """A text under its label."""

    label: str
    tokens: Sequence[Token]


def symbols(tokens: Tensor, tokenizer: Tokenizer) -> list[str]:
    """Visible strings of tokens [T], which concatenate to the text.

    A character of several tokens is in the last of them; the others are empty.
    """
    texts = zip(tokens.tolist(), characters(tokens, tokenizer), strict=True)
    return [END if token == tokenizer.end else visible(text) for token, text in texts]


def visible(text: str) -> str:
    """`text` with control characters as pictures; ↵ precedes a new line."""
    shown = ""
    for character in text.translate(PICTURES):
        is_shown = character.isprintable() or character == "\n"
        shown += character if is_shown else character.encode("unicode_escape").decode("ascii")
    return shown


def text_tokens(
    tokens: Tensor,
    tokenizer: Tokenizer,
    kinds: Mapping[Kind, Tensor] = {},
    probabilities: Tensor | None = None,
) -> list[Token]:
    """A text [T]. A token has the first of the `kinds` whose mask [T] is true there, else final."""
    found = []
    for place, symbol in enumerate(symbols(tokens, tokenizer)):
        kind: Kind = next((kind for kind, mask in kinds.items() if mask[place]), "final")
        p = 1.0 if probabilities is None else probabilities[place].item()
        found.append(Token(NOISE if kind == "noise" else symbol, kind, p))
    return found


def pass_rows(
    passes: Sequence[Tensor],
    tokenizer: Tokenizer,
    *,
    given: Tensor | None = None,
    noise: Sequence[Tensor] | None = None,
    probabilities: Sequence[Tensor] | None = None,
) -> list[Row]:
    """One row for each of the `passes` [T] of a text, noise first.

    Changes are marked once most of the text is there: what a later pass filled in is what it could
    tell from the rest. `given` [T] is true where a token was given. `noise`, [T] for every pass, is
    true where a state is noise; by default where a pass differs from the last one. Noise that the
    last pass leaves is `open`. `probabilities` are [T] for every pass.
    """
    last = len(passes) - 1
    told = torch.zeros_like(passes[0], dtype=torch.bool) if given is None else given
    unknown = [passes[0] == passes[0]]
    unknown += noise[1:] if noise else [text != passes[-1] for text in passes[1:]]
    rows: list[Row] = []
    for index, tokens in enumerate(passes):
        label = "noise"
        kinds: dict[Kind, Tensor] = {"noise": unknown[index]}
        if index > 0:
            # the latents of a given token may be noise on the way, too
            left = unknown[index] & ~told
            before = unknown[index - 1] & ~told
            is_first = bool(before.sum() > 0.5 * (~told).sum())
            changed = before | (tokens != passes[index - 1]) & ~told
            changed = (~told if is_first else changed) & ~left
            label = f"after block {last - index + 1}: {int(changed.sum())} of {int((~told).sum())}"
            label += " written" if is_first else " changed"
            if left.any():
                label += f", {int(left.sum())} still noise"
            kinds = {"given": told & ~unknown[index]}
            kinds["open" if index == last else "noise"] = unknown[index]
            if not is_first:
                kinds["changed"] = changed
        p = None if probabilities is None else probabilities[index]
        rows.append(Row(label, text_tokens(tokens, tokenizer, kinds, p)))
    return rows
