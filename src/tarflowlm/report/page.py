"""One self-contained HTML page: no script, nothing from the network, readable in light and dark."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape

from tarflowlm.report.style import COLOURS, GRID, INK, MUTED, PAPER

GENERATOR = "tarflowlm report"

_CSS = f"""
:root {{ --ink: {INK}; --muted: {MUTED}; --grid: {GRID}; --paper: {PAPER}; --blue: {COLOURS[0]};
        color-scheme: light dark; }}
@media (prefers-color-scheme: dark) {{
  :root {{ --ink: #e6e8eb; --muted: #98a1ab; --grid: #33393f; --paper: #16191d; --blue: #3d9be0; }}
}}
body {{ background: var(--paper); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto;
       max-width: 68rem; padding: 0 1rem; }}
h1 {{ font-size: 1.5rem; }} h2 {{ font-size: 1.15rem; margin-top: 2.2rem; }}
figure {{ margin: 1rem 0 1.6rem; }} figcaption, .note {{ color: var(--muted); font-size: .9rem; max-width: 60rem; }}
svg {{ display: block; height: auto; max-width: 100%; }}
.table {{ overflow-x: auto; }}
table {{ border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }}
th, td {{ border-bottom: 1px solid var(--grid); padding: .22rem .9rem .22rem 0; text-align: left;
         vertical-align: top; overflow-wrap: anywhere; min-width: 6rem; }}
th {{ font-weight: 600; }} tbody th {{ color: var(--muted); font-weight: 400; }}
summary {{ cursor: pointer; }}
"""


@dataclass(frozen=True)
class Picture:
    """A figure on the page."""

    name: str
    svg: str
    caption: str


@dataclass(frozen=True)
class Table:
    """Rows of cells under a head; the first cell of a row names it."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Section:
    title: str
    notes: Sequence[str] = ()
    parts: Sequence[Picture | Table] = ()
    is_folded: bool = False
    """Shown on request only."""


@dataclass(frozen=True)
class Page:
    title: str
    sections: list[Section] = field(default_factory=list)

    def to_html(self) -> str:
        body = "\n".join(_section(section) for section in self.sections)
        return (
            f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<meta name="generator" '
            f'content="{GENERATOR}">\n<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            f"<title>{escape(self.title)}</title>\n<style>{_CSS}</style>\n</head>\n<body>\n"
            f"<h1>{escape(self.title)}</h1>\n{body}\n</body>\n</html>\n"
        )


def _section(section: Section) -> str:
    notes = "".join(f'<p class="note">{escape(note)}</p>\n' for note in section.notes)
    parts = "".join(_picture(part) if isinstance(part, Picture) else _table(part) for part in section.parts)
    if section.is_folded:
        return f"<details><summary>{escape(section.title)}</summary>\n{notes}{parts}</details>"
    return f"<section>\n<h2>{escape(section.title)}</h2>\n{notes}{parts}</section>"


def _picture(picture: Picture) -> str:
    label = escape(picture.caption, quote=True)
    svg = picture.svg.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1)
    return (
        f'<figure id="{escape(picture.name)}">\n{svg}<figcaption>{escape(picture.caption)}</figcaption>\n</figure>\n'
    )


def _table(table: Table) -> str:
    head = "".join(f"<th>{escape(cell)}</th>" for cell in table.head)
    rows = "".join(
        f"<tr><th>{escape(row[0])}</th>{''.join(f'<td>{escape(cell)}</td>' for cell in row[1:])}</tr>\n"
        for row in table.rows
    )
    return f'<div class="table"><table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{rows}</tbody></table></div>\n'
