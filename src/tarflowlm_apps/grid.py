"""Rows of coloured tokens in HTML, for the report, the studio and notebooks."""

from collections.abc import Sequence
from html import escape
from itertools import groupby
from pathlib import Path

from torch import Tensor

from tarflowlm.flow.codebook import NoisyCodebook
from tarflowlm.flow.numerics import component_finder
from tarflowlm.model import TarFlowLM
from tarflowlm.terminal.tokens import Kind, Row, Token

LEGEND: dict[Kind, str] = {
    "noise": "noise",
    "given": "given",
    "final": "written",
    "changed": "filled in or changed by a later block",
    "open": "noise that stays",
}
CSS = Path(__file__).with_name("grid.css").read_text(encoding="utf-8")
"""The style of `to_html`, light or dark; the page must include it."""


def div(name: str, *parts: str) -> str:
    """Parts in HTML in an element of a class."""
    return f'<div class="{name}">{"".join(parts)}</div>'


def noise_of(model: TarFlowLM, states: Sequence[Tensor]) -> list[Tensor] | None:
    """Where each of the `states` [T, d] is noise, [T]; None unless the model can tell.

    A stack that fills in reads a vector as the code of a token, or as noise.
    """
    if not model.config.fills_in:
        return None
    book = NoisyCodebook(model.codebook)
    find = component_finder(book.mean, book.log_std)
    return [(find(state) == model.codebook.vocab_size).cpu() for state in states]


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
        # not fainter: every token has to be readable
        is_told = p < 0.995 and token.kind != "noise"
        look = f' title="p = {p:.2f}"' if is_told else ""
        return f'<span class="tl-{token.kind}"{look}>'

    found = ""
    # neighbours that look alike share an element, so that a long text in many rows stays light
    for start, run in groupby(tokens, key=opening):
        text = escape("".join(token.symbol for token in run)).replace("↵\n", "<i>↵</i>\n")
        found += f"{start}{text}</span>"
    return found
