"""A page of HTML without scripts: sections, tables and pictures, light or dark."""

from collections.abc import Sequence
from html import escape
from pathlib import Path

from tarflowlm_apps.grid import CSS, div

GENERATOR = '<meta name="generator" content="tarflowlm">'
"""A line of every page, by which a later report recognises it."""
PAGE = Path(__file__).with_name("page.html").read_text(encoding="utf-8")


def page_html(title: str, sections: Sequence[str]) -> str:
    """The whole document."""
    style = Path(__file__).with_name("page.css").read_text(encoding="utf-8") + CSS
    body = "\n".join(sections)
    return PAGE.format(title=escape(title), style=style, body=body)


def section_html(
    title: str, notes: Sequence[str] = (), parts: Sequence[str] = (), *, is_folded: bool = False
) -> str:
    """Notes, then parts in HTML, under a title; a folded section opens at a click."""
    body = "".join(f'<p class="note">{escape(note)}</p>\n' for note in notes)
    body += div("parts", *parts)
    if is_folded:
        return f"<details>\n<summary>{escape(title)}</summary>\n{body}</details>\n"
    return f"<section>\n<h2>{escape(title)}</h2>\n{body}</section>"


def labelled(svg: str, words: str) -> str:
    """A picture that screen readers call by these words."""
    return svg.replace("<svg ", f'<svg role="img" aria-label="{escape(words)}" ', 1)


def picture_html(name: str, svg: str, caption: str) -> str:
    """A figure with its caption; its name becomes the id."""
    svg = labelled(svg, caption)
    caption = escape(caption)
    text = f"<figcaption>{caption}</figcaption>"
    return f'<figure class="picture" id="{name}">\n{svg}{text}\n</figure>\n'


def table_html(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells under a head; the first cell of a row is its name."""
    top = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    body = ""
    for name, *cells in rows:
        values = "".join(f"<td>{escape(cell)}</td>" for cell in cells)
        body += f"<tr><th>{escape(name)}</th>{values}</tr>\n"
    table = f"<thead><tr>{top}</tr></thead>\n<tbody>\n{body}</tbody>"
    return div("table", f"<table>\n{table}</table>\n")
