"""Figure 6 of the paper as a page: the decoded text before the first and after every block, with the edits marked."""

from collections.abc import Sequence
from itertools import groupby

from tarflowlm.report.grid import CSS, Token, to_html
from tarflowlm.report.grid import Row as TextRow
from tarflowlm.report.page import Page, Section
from tarflowlm.reproduce.recipe import Row

Spans = list[list[int]]
"""[start, stop) of edited characters in a text, ascending and apart."""


def edited_spans(symbols: Sequence[str], is_edited: Sequence[bool]) -> Spans:
    """The characters of the edited symbols of a text."""
    spans: Spans = []
    at = 0
    for symbol, edited in zip(symbols, is_edited, strict=True):
        if edited and symbol:
            if spans and spans[-1][1] == at:
                spans[-1][1] += len(symbol)
            else:
                spans.append([at, at + len(symbol)])
        at += len(symbol)
    return spans


def panels_page(title: str, notes: Sequence[str], rows: Sequence[Row]) -> str:
    """A self-contained page with one grid for every model and seed, from the rows of `passes.measure_fig6`."""
    sections = [Section("How to read it", notes)]
    for (model, seed), states in groupby(rows, lambda row: (row["model"], row["seed"])):
        grid = to_html([TextRow(_label(row), _tokens(row)) for row in states])
        sections.append(Section(f"{model}, seed {seed}", parts=[grid]))
    return Page(title, sections, css=CSS, generator="tarflowlm reproduce").to_html()


def _label(row: Row) -> str:
    final = f"{row['tokens as in the end']:.0%} of all samples' tokens are final"
    if row.get("block") is None:
        return f"noise; {final}"
    edits = f"{row['edits']} of {row['tokens']} tokens edited"
    return f"block {row['block']}, {row['direction']}: {edits}; {final}"


def _tokens(row: Row) -> list[Token]:
    """The text of a row as runs of unchanged and edited characters."""
    text, found, at = row["text"], [], 0
    for start, stop in row.get("edited") or []:
        found += [Token(text[at:start]), Token(text[start:stop], "changed")]
        at = stop
    rest = [*found, Token(text[at:])]
    return rest if row.get("block") is not None else [Token(text, "noise")]
