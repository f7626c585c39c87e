"""A page of HTML without scripts: sections, tables and pictures, light or dark."""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from importlib.resources import files

GENERATOR = "tarflowlm report"


@dataclass(frozen=True)
class Section:
    """Notes, then parts in HTML, under a title; a folded section opens at a click."""

    title: str
    notes: Sequence[str] = ()
    parts: Sequence[str] = ()
    is_folded: bool = False

    def to_html(self) -> str:
        """The section; title and notes are escaped."""
        notes = "".join(f'<p class="note">{escape(note)}</p>\n' for note in self.notes)
        body = f'{notes}<div class="parts">\n{"".join(self.parts)}</div>'
        if self.is_folded:
            return f"<details><summary>{escape(self.title)}</summary>\n{body}</details>"
        return f"<section>\n<h2>{escape(self.title)}</h2>\n{body}</section>"


PAGE = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="generator" content="{generator}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<h1>{title}</h1>
{body}
</body>
</html>
"""


def page_html(title: str, sections: Sequence[Section], css: str, generator: str = GENERATOR) -> str:
    """The whole document; `css` has rules for the parts of the sections."""
    style = files("tarflowlm.views").joinpath("page.css").read_text(encoding="utf-8")
    return PAGE.format(
        generator=generator,
        title=escape(title),
        style=style + css,
        body="\n".join(section.to_html() for section in sections),
    )


def picture_html(name: str, svg: str, caption: str) -> str:
    """A figure with its caption; its name becomes the id."""
    caption = escape(caption)
    svg = svg.replace("<svg ", f'<svg role="img" aria-label="{caption}" ', 1)
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
    return f'<div class="table"><table>\n{table}</table></div>\n'
