"""Figure 6 of the paper as a page: the decoded text before the first and after every block, with the edits marked."""

from collections.abc import Sequence
from itertools import groupby, zip_longest

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
    for (model, seed), group in groupby(rows, lambda row: (row["model"], row["seed"])):
        states = list(group)
        grid = to_html([TextRow(_label(row), _tokens(row, states[-1]["text"])) for row in states])
        sections.append(Section(f"{model}, seed {seed}", parts=[grid]))
    return Page(title, sections, css=CSS, generator="tarflowlm reproduce").to_html()


def _label(row: Row) -> str:
    final = f"{row['tokens as in the end']:.0%} final in all samples"
    if row.get("block") is None:
        return f"noise; {final}"
    return f"block {row['block']}, {row['direction']}: {row['edits']} of {row['tokens']} edited; {final}"


def _tokens(row: Row, final: str) -> list[Token]:
    """The characters of a row. They are compared with the final text where both have the same length."""
    text = row["text"]
    edited = {i for start, stop in row.get("edited") or [] for i in range(start, stop)}
    is_noise = [len(text) == len(final) and a != b for a, b in zip_longest(text, final)]
    return [
        Token(character, "changed" if i in edited else "noise" if noise or row["state"] == "noise" else "final")
        for i, (character, noise) in enumerate(zip(text, is_noise, strict=False))
    ]
