"""Rows of coloured tokens, for the terminal, the report and the studio, and their HTML, light or
dark. The kind of a token is its colour: green for new in its row, plain for final, grey for noise,
underlined for given. Green has a ground as a second sign, for readers who cannot distinguish the
colours.
"""

import codecs
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import groupby
from typing import Literal

from torch import Tensor

from tarflowlm.data import Tokenizer

Kind = Literal["given", "final", "changed", "noise"]

LEGEND: dict[Kind, str] = {"given": "given", "final": "as in the final text"}
LEGEND |= {"changed": "new in this row", "noise": "noise"}
FAINTEST = 0.3  # the least opacity: every token stays readable

CSS = """
.tl-grid { container-type: inline-size; font: 14px/1.65 ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace;
  color: light-dark(#1b1f24, #e6e8eb); }
.tl-row { display: grid; grid-template-columns: 9.5rem minmax(0, 1fr); gap: 0 .9rem; padding: .3rem 0;
  border-top: 1px solid light-dark(#e3e6ea, #33393f); }
.tl-label { font: 12.5px/1.85 system-ui, sans-serif; color: light-dark(#5c646d, #a0a8b1);
  font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
.tl-text { white-space: pre-wrap; overflow-wrap: anywhere; unicode-bidi: isolate; }
.tl-text i { font-style: normal; }
.tl-text span, .tl-legend span { border-radius: 2px; }
.tl-changed { color: light-dark(#0b6b34, #6ee7a0); background: light-dark(#dcf5e4, #143d27); }
.tl-noise { color: light-dark(#7b838c, #8b939c); }
.tl-given { text-decoration: underline 2px light-dark(#0072b2, #56b4e9); text-underline-offset: 3px; }
.tl-legend { display: flex; flex-wrap: wrap; gap: .1rem 1.1rem; padding: .1rem 0 .45rem; font-size: 12.5px; }
.tl-legend span { padding: 0 .2rem; }
@container (max-width: 34rem) { .tl-row { grid-template-columns: minmax(0, 1fr); }
  .tl-label { line-height: 1.4; } .tl-text { font-size: 13px; } }
"""


@dataclass(frozen=True)
class Token:
    """One token of a row; `title` is shown under the pointer."""

    symbol: str
    kind: Kind = "final"
    opacity: float = 1.0  # from 0 to 1, for instance the probability of the token
    title: str = ""


@dataclass(frozen=True)
class Row:
    """A text under its label."""

    label: str
    tokens: Sequence[Token]


def symbols(tokens: Tensor, tokenizer: Tokenizer) -> list[str]:
    """Visible strings of tokens [T]. They concatenate to the text; a character of several tokens is
    in the last.
    """
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    found = [decoder.decode(tokenizer.token_bytes[token]) for token in tokens.tolist()]
    if found:
        found[-1] += decoder.decode(b"", final=True)
    return [visible(text) for text in found]


PICTURES = {code: chr(0x2400 + code) for code in range(32)} | {ord("\n"): "↵\n"}


def visible(text: str) -> str:
    """`text` with control characters as their pictures; ↵ precedes a new line."""
    plain = (
        c if c < " " or c.isprintable() else c.encode("unicode_escape").decode("ascii")
        for c in text
    )
    return "".join(plain).translate(PICTURES)


def text_tokens(
    tokens: Tensor,
    tokenizer: Tokenizer,
    *,
    before: Tensor | None = None,
    given: Tensor | None = None,
) -> list[Token]:
    """A text [T]: given where `given` [T] is true, changed where it differs from `before` [T],
    final elsewhere.
    """
    is_given = [False] * len(tokens) if given is None else given.tolist()
    is_new = [False] * len(tokens) if before is None else (tokens != before).tolist()
    marks = zip(symbols(tokens, tokenizer), is_given, is_new, strict=True)
    return [
        Token(symbol, "given" if locked else "changed" if new else "final")
        for symbol, locked, new in marks
    ]


def pass_rows(
    passes: Sequence[Tensor],
    tokenizer: Tokenizer,
    *,
    given: Tensor | None = None,
    probabilities: Sequence[Tensor] | None = None,
    least_change: float = 0.0,
) -> list[Row]:
    """One row for each of the `passes` [T] of a text, noise first: its new tokens, and which are
    already final. Tokens where `given` [T] is true are marked in the last row. `probabilities` [T]
    of every pass become opacities. Passes in the middle that change a smaller share of tokens than
    `least_change` are left out.
    """
    rows: list[Row] = []
    before, last = passes[0], len(passes) - 1
    for index, tokens in enumerate(passes):
        changed = (tokens != before).tolist()
        if 0 < index < last and sum(changed) < least_change * len(tokens):
            continue
        is_given = given.tolist() if given is not None and index == last else [False] * len(tokens)
        is_final = (tokens == passes[-1]).tolist() if index else [False] * len(tokens)
        opacity = [1.0] * len(tokens) if probabilities is None else probabilities[index].tolist()
        row = []
        for n, symbol in enumerate(symbols(tokens, tokenizer)):
            kind: Kind = (
                "given"
                if is_given[n]
                else "changed"
                if changed[n]
                else "final"
                if is_final[n]
                else "noise"
            )
            row.append(
                Token(
                    symbol, kind, opacity[n], f"p = {opacity[n]:.2f}" if opacity[n] < 0.995 else ""
                )
            )
        name = (
            f"after block {last - index + 1}: {sum(changed)} of {len(tokens)} changed"
            if index
            else "noise"
        )
        rows.append(Row(name, row))
        before = tokens
    return rows


def to_html(rows: Sequence[Row]) -> str:
    """The rows, escaped, under a legend of the kinds that occur. The page must include `CSS`."""
    present = {token.kind for row in rows for token in row.tokens}
    legend = "".join(
        f'<span class="tl-{kind}">{name}</span>' for kind, name in LEGEND.items() if kind in present
    )
    body = ""
    for row in rows:
        label, text = f'<div class="tl-label">{escape(row.label)}</div>', spans(row.tokens)
        body += f'<div class="tl-row">{label}<div class="tl-text">{text}</div></div>'
    return f'<div class="tl-grid"><div class="tl-legend">{legend}</div>{body}</div>'


def spans(tokens: Sequence[Token]) -> str:
    """The tokens of one row as HTML."""

    def look_of(token: Token) -> tuple[Kind, float, str]:
        share = min(max(token.opacity, 0.0), 1.0)
        return token.kind, round(FAINTEST + (1 - FAINTEST) * share, 1), escape(token.title)

    found = []
    # neighbours that look alike share an element, so that a long text in many rows stays light
    for (kind, opacity, title), run in groupby(tokens, key=look_of):
        text = escape("".join(token.symbol for token in run)).replace("↵\n", "<i>↵</i>\n")
        look = (f' style="opacity:{opacity:g}"' if opacity < 1 else "") + (
            f' title="{title}"' if title else ""
        )
        found.append(f'<span class="tl-{kind}"{look}>{text}</span>')
    return "".join(found)
