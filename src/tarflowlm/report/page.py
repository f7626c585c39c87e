"""One self-contained HTML page, light or dark, without scripts or network access; and the tables about runs on it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

from tarflowlm.report.records import RunRecord
from tarflowlm.report.style import COLOURS, GRID, INK, MUTED, PAPER
from tarflowlm.runs.strict_json import to_dict

GENERATOR = "tarflowlm report"
MISSING = "–"
"""In a cell without a value."""

_CSS = f"""
:root {{ --ink: {INK}; --muted: {MUTED}; --grid: {GRID}; --paper: {PAPER}; --blue: {COLOURS[0]};
        color-scheme: light dark; }}
@media (prefers-color-scheme: dark) {{
  :root {{ --ink: #e6e8eb; --muted: #98a1ab; --grid: #33393f; --paper: #16191d; --blue: #3d9be0; }}
}}
body {{ background: var(--paper); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto;
       max-width: 68rem; padding: 0 1rem; }}
h1 {{ font-size: 1.5rem; }} h2 {{ font-size: 1.15rem; margin-top: 2.2rem; }}
.narrow {{ display: none; max-width: 32rem; }}
@media (max-width: 48rem) {{ .wide {{ display: none; }} svg.narrow {{ display: block; }} }}
figure {{ margin: 1rem 0 1.6rem; }} figcaption {{ margin-top: .5rem; }}
figcaption, .note {{ color: var(--muted); font-size: .9rem; max-width: 60rem; }}
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
    """A figure on the page; its name becomes the id."""

    name: str
    svg: str
    caption: str
    narrow: str
    """The same for a phone, as SVG."""


@dataclass(frozen=True)
class Table:
    """Rows of cells under a head; the first cell of a row is its name."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Markup:
    """HTML as it is; its author has escaped the text in it."""

    html: str


@dataclass(frozen=True)
class Section:
    """Notes, then figures, tables and other markup, under a title."""

    title: str
    notes: Sequence[str] = ()
    parts: Sequence[Picture | Table | Markup] = ()
    is_folded: bool = False
    """Closed until the reader opens it."""


@dataclass(frozen=True)
class Page:
    """A title and its sections."""

    title: str
    sections: list[Section] = field(default_factory=list)
    css: str = ""
    """Rules for the markup of its sections."""
    generator: str = GENERATOR

    def to_html(self) -> str:
        """The whole document. Text is escaped; figures are inlined as SVG."""
        body = "\n".join(_section(section) for section in self.sections)
        return (
            f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<meta name="generator" '
            f'content="{self.generator}">\n<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            f"<title>{escape(self.title)}</title>\n<style>{_CSS}{self.css}</style>\n</head>\n<body>\n"
            f"<h1>{escape(self.title)}</h1>\n{body}\n</body>\n</html>\n"
        )


def _section(section: Section) -> str:
    notes = "".join(f'<p class="note">{escape(note)}</p>\n' for note in section.notes)
    parts = "".join(map(_part, section.parts))
    if section.is_folded:
        return f"<details><summary>{escape(section.title)}</summary>\n{notes}{parts}</details>"
    return f"<section>\n<h2>{escape(section.title)}</h2>\n{notes}{parts}</section>"


def _part(part: Picture | Table | Markup) -> str:
    if isinstance(part, Markup):
        return part.html
    return _picture(part) if isinstance(part, Picture) else _table(part)


def _picture(picture: Picture) -> str:
    label = escape(picture.caption, quote=True)
    wide, narrow = (
        svg.replace("<svg ", f'<svg class="{name}" role="img" aria-label="{label}" ', 1)
        for name, svg in (("wide", picture.svg), ("narrow", picture.narrow))
    )
    return (
        f'<figure id="{escape(picture.name)}">\n{wide}{narrow}<figcaption>{escape(picture.caption)}</figcaption>\n'
        "</figure>\n"
    )


def _table(table: Table) -> str:
    head = "".join(f"<th>{escape(cell)}</th>" for cell in table.head)
    rows = "".join(
        f"<tr><th>{escape(row[0])}</th>{''.join(f'<td>{escape(cell)}</td>' for cell in row[1:])}</tr>\n"
        for row in table.rows
    )
    return f'<div class="table"><table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{rows}</tbody></table></div>\n'


def summary_table(records: Sequence[RunRecord]) -> Table:
    """One column per run: results, text, size and machine; without the rows that no run fills."""
    values = [
        ("status", lambda r: r.status),
        ("test, bits per character", _test_bits),
        ("test, nats per token, standard error", _test_nats),
        ("validation, bits per character", _valid_bits),
        ("validation after each stage", _stages),
        ("preset, seed", lambda r: f"{r.run.name}, {r.run.seed}"),
        ("text", lambda r: Path(r.run.data.source).name),
        ("steps", lambda r: f"{r.last_step:,}" if r.has_log else MISSING),
        ("tokens", lambda r: f"{int(r.train['tokens'].max()):,}" if r.has_log else MISSING),
        ("training, seconds", lambda r: f"{r.seconds[-1]:,.0f}" if r.has_log else MISSING),
        ("tokens per second, median of each stage", _speeds),
        ("parameters", lambda r: _count(r, "parameters")),
        ("of them in Transformers", lambda r: _count(r, "trunk_parameters")),
        ("device", lambda r: _plain(r, "device")),
        ("threads", lambda r: _plain(r, "threads")),
        ("machine", lambda r: _plain(r, "machine")),
        ("PyTorch", lambda r: _plain(r, "torch")),
    ]
    rows = [(name, *(value(r) for r in records)) for name, value in values]
    return Table(["", *(r.name for r in records)], [row for row in rows if set(row[1:]) != {MISSING}])


def _test_bits(record: RunRecord) -> str:
    if record.summary is None:
        return MISSING
    test = record.summary["test"]
    return f"{record.sign} {test['bpc']:.4f} ({test.get('bound', 'bound unknown')})"


def _test_nats(record: RunRecord) -> str:
    test = {} if record.summary is None else record.summary["test"]
    if not {"nats_per_token", "stderr"} <= test.keys():
        return MISSING
    # one window alone has no error
    error = f" ± {test['stderr']:.4f}" if math.isfinite(test["stderr"]) else ""
    return f"{record.sign} {test['nats_per_token']:.4f}{error}"


def _valid_bits(record: RunRecord) -> str:
    bits = record.valid["bpc"]
    return f"{record.sign} {bits[-1]:.4f} at step {int(record.valid['step'][-1]):,}" if len(bits) else MISSING


def _stages(record: RunRecord) -> str:
    found = [] if record.summary is None else record.summary.get("stage_valid_bpc", [])
    return f"{record.sign} {', '.join(f'{bits:.4f}' for bits in found)}" if found else MISSING


def _speeds(record: RunRecord) -> str:
    return ", ".join(f"{speed:,.0f}" for speed in record.stage_medians("tokens_per_second")) or MISSING


def _count(record: RunRecord, key: str) -> str:
    value = None if record.summary is None else record.summary.get(key)
    return MISSING if value is None else f"{value:,}"


def _plain(record: RunRecord, key: str) -> str:
    return MISSING if record.summary is None else str(record.summary.get(key, MISSING))


def config_table(records: Sequence[RunRecord]) -> Table:
    """Every field of the configurations by its dotted name; fields in which the runs differ come first."""
    flat = [_flat(to_dict(r.run)) for r in records]
    names = list(dict.fromkeys(name for one in flat for name in one))
    rows = [(name, *(one.get(name, MISSING) for one in flat)) for name in names]
    rows.sort(key=lambda row: len(set(row[1:])) == 1)
    return Table(["", *(r.name for r in records)], rows)


def _flat(value: dict[str, Any], prefix: str = "") -> dict[str, str]:
    found: dict[str, str] = {}
    for key, item in value.items():
        if isinstance(item, list) and item and isinstance(item[0], dict):
            item = {str(index): inner for index, inner in enumerate(item)}
        if isinstance(item, dict):
            found |= _flat(item, f"{prefix}{key}.")
        else:
            found[prefix + key] = ", ".join(map(str, item)) if isinstance(item, list) else str(item)
    return found
