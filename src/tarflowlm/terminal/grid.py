"""Rows of coloured tokens for the terminal, the report and the studio, and their HTML."""

import codecs
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import groupby
from pathlib import Path
from typing import Literal

from torch import Tensor

from tarflowlm.data import Tokenizer

Kind = Literal["given", "final", "changed", "noise"]

LEGEND: dict[Kind, str] = {
    "given": "given",
    "final": "as in the final text",
    "changed": "new in this row",
    "noise": "noise",
}
END = "∎"
"""The sign for the end of a document."""

CSS = Path(__file__).with_name("grid.css").read_text(encoding="utf-8")
"""The style of `to_html`, light or dark; the page must include it."""


@dataclass(frozen=True)
class Token:
    """One token of a row; it is the fainter the lower its `probability`."""

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
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    places = tokens.tolist()
    found = [decoder.decode(tokenizer.token_bytes[token]) for token in places]
    if found:
        found[-1] += decoder.decode(b"", final=True)
    ended = [token == tokenizer.end for token in places]
    return [END if end else visible(text) for text, end in zip(found, ended, strict=True)]


UNREADABLE = re.compile("[\ufffd\u2400-\u241f]")
"""Parts of characters, and pictures of control characters, which many fonts show as boxes."""
PICTURES = {code: chr(0x2400 + code) for code in range(32)} | {ord("\n"): "↵\n"}


def visible(text: str) -> str:
    """`text` with control characters as their pictures; ↵ precedes a new line."""
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
    """A text [T]. A token has the first of the `kinds` whose mask [T] holds there, else final."""
    found = []
    for place, symbol in enumerate(symbols(tokens, tokenizer)):
        kind: Kind = next((kind for kind, mask in kinds.items() if mask[place]), "final")
        p = 1.0 if probabilities is None else probabilities[place].item()
        shown = UNREADABLE.sub("·", symbol) if kind == "noise" else symbol
        found.append(Token(shown, kind, p))
    return found


def pass_rows(
    passes: Sequence[Tensor],
    tokenizer: Tokenizer,
    *,
    given: Tensor | None = None,
    probabilities: Sequence[Tensor] | None = None,
) -> list[Row]:
    """One row for each of the `passes` [T] of a text, noise first.

    Tokens where `given` [T] is true are marked in the last row. `probabilities` are [T] for every
    pass.
    """
    rows: list[Row] = []
    before = passes[0]
    last = len(passes) - 1
    for index, tokens in enumerate(passes):
        changed = tokens != before
        count = int(changed.sum())
        noise = tokens != passes[-1] if index > 0 else ~changed
        kinds: dict[Kind, Tensor] = {"changed": changed, "noise": noise}
        if index == last and given is not None:
            kinds = {"given": given, "changed": changed}
        label = f"after block {last - index + 1}: {count} of {len(tokens)} changed"
        p = None if probabilities is None else probabilities[index]
        shown = text_tokens(tokens, tokenizer, kinds, p)
        rows.append(Row(label if index > 0 else "noise", shown))
        before = tokens
    return rows


def div(name: str, *parts: str) -> str:
    """Parts in HTML in an element of a class."""
    return f'<div class="{name}">{"".join(parts)}</div>'


def to_html(rows: Sequence[Row]) -> str:
    """The rows, escaped, under a legend of the kinds that occur."""
    present = {token.kind for row in rows for token in row.tokens}
    legend = ""
    for kind, name in LEGEND.items():
        if kind in present:
            legend += f'<span class="tl-{kind}">{name}</span>'
    body = ""
    for row in rows:
        label = div("tl-label", escape(row.label))
        body += div("tl-row", label, div("tl-text", spans(row.tokens)))
    return div("tl-grid", div("tl-legend", legend), body)


def spans(tokens: Sequence[Token]) -> str:
    """The tokens of one row as HTML; the probability of a token is shown under the pointer."""

    def opening(token: Token) -> str:
        p = token.probability
        # at least 0.3, so that every token stays readable
        look = f' style="opacity:{0.3 + 0.7 * p:.1f}" title="p = {p:.2f}"'
        return f'<span class="tl-{token.kind}"{look if p < 0.995 else ""}>'

    found = ""
    # neighbours that look alike share an element, so that a long text in many rows stays light
    for start, run in groupby(tokens, key=opening):
        text = escape("".join(token.symbol for token in run)).replace("↵\n", "<i>↵</i>\n")
        found += f"{start}{text}</span>"
    return found
