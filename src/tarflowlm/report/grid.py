"""Rows of coloured tokens as HTML: a text after every pass or round, without scripts, light or dark.

The colours say what a token is: grey noise, green changed in this row, purple draft, plain final, underlined given.
Each colour has a second sign (a ground, a line, a slant), for readers who cannot tell the colours apart.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import groupby
from typing import Literal

Kind = Literal["final", "changed", "noise", "draft", "given"]

KINDS: dict[Kind, str] = {
    "given": "given",
    "final": "final",
    "changed": "new in this row",
    "draft": "draft",
    "noise": "noise",
}
"""What the legend calls them, in its order."""

FAINTEST = 0.3
"""The opacity of a token that has none left; it stays readable."""

_CONTROL = {code: chr(0x2400 + code) for code in range(32)} | {127: "\u2421", ord("\n"): "\u21b5\n"}
"""Control characters as their pictures; after that of a new line, a new line."""

CSS = """
.tl-grid { container-type: inline-size; font: 14px/1.65 ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace;
  color: light-dark(#1b1f24, #e6e8eb); }
.tl-row { display: grid; grid-template-columns: 9.5rem minmax(0, 1fr); gap: 0 .9rem; padding: .3rem 0;
  border-top: 1px solid light-dark(#e3e6ea, #33393f); }
.tl-row:first-child { border-top: 0; }
.tl-label { font: 12.5px/1.85 system-ui, sans-serif; color: light-dark(#5c646d, #a0a8b1);
  font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
.tl-text { white-space: pre-wrap; overflow-wrap: anywhere; unicode-bidi: isolate; }
.tl-text span { border-radius: 2px; }
.tl-changed { color: light-dark(#0b6b34, #6ee7a0); background: light-dark(#dcf5e4, #143d27); }
.tl-noise { color: light-dark(#7b838c, #8b939c); }
.tl-draft { color: light-dark(#7a35b8, #c9a2f5); font-style: italic; }
.tl-given { text-decoration: underline 2px light-dark(#0072b2, #56b4e9); text-underline-offset: 3px; }
.tl-legend { display: flex; flex-wrap: wrap; gap: .1rem 1.1rem; padding: .45rem 0 .1rem; font-size: 12.5px;
  border-top: 1px solid light-dark(#e3e6ea, #33393f); }
.tl-legend span { border-radius: 2px; padding: 0 .2rem; }
@container (max-width: 34rem) { .tl-row { grid-template-columns: minmax(0, 1fr); }
  .tl-label { line-height: 1.4; } .tl-text { font-size: 13px; } }
"""


@dataclass(frozen=True)
class Token:
    """One token of a row."""

    text: str
    kind: Kind
    opacity: float = 1.0
    """From 0 to 1, say the probability of the token."""
    title: str = ""
    """Shown under the pointer."""


@dataclass(frozen=True)
class GridRow:
    """A text under its label."""

    label: str
    tokens: Sequence[Token]


def grid(rows: Sequence[GridRow], *, legend: bool = True) -> str:
    """The rows as one piece of HTML with its own style; `legend` names the kinds of tokens that occur.

    Every text in it is escaped. The colours follow the `color-scheme` of the page.
    """
    body = "".join(map(_row, rows))
    present = {token.kind for row in rows for token in row.tokens}
    if legend and present:
        names = (f'<span class="tl-{kind}">{name}</span>' for kind, name in KINDS.items() if kind in present)
        body += f'<div class="tl-legend">{"".join(names)}</div>'
    return f'<div class="tl-grid"><style>{CSS}</style><div>{body}</div></div>'


def _row(row: GridRow) -> str:
    label = f'<div class="tl-label">{escape(row.label)}</div>'
    return f'<div class="tl-row">{label}<div class="tl-text">{spans(row.tokens)}</div></div>'


def spans(tokens: Sequence[Token]) -> str:
    """The tokens of one row, escaped; `CSS` colours them."""
    # neighbours that look alike share an element: a long text in many rows stays light
    runs = groupby(tokens, key=lambda t: (t.kind, _opacity(t.opacity), t.title))
    return "".join(_span(look, "".join(token.text for token in run)) for look, run in runs)


def _span(look: tuple[Kind, str, str], text: str) -> str:
    kind, opacity, title = look
    style = f' style="opacity:{opacity}"' if opacity else ""
    tip = f' title="{escape(title)}"' if title else ""
    return f'<span class="tl-{kind}"{style}{tip}>{escape(text.translate(_CONTROL))}</span>'


def _opacity(share: float) -> str:
    """The opacity in CSS, rounded so that neighbours agree; empty for a token in full."""
    opacity = round(FAINTEST + (1 - FAINTEST) * min(max(share, 0.0), 1.0), 1)
    return "" if opacity == 1 else f"{opacity:g}"
