"""One self-contained HTML page, light or dark, without scripts or network access; and the tables about runs on it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from tarflowlm.report.records import RunRecord
from tarflowlm.report.style import COLOURS, GRID, INK, MUTED, PAPER
from tarflowlm.runs.strict_json import flatten

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
.parts {{ align-items: start; display: grid; gap: 1rem 2rem;
         grid-template-columns: repeat(auto-fit, minmax(min(100%, 28rem), 1fr)); }}
.parts > :not(.picture) {{ grid-column: 1 / -1; }}
figure {{ margin: .5rem 0 1rem; min-width: 0; }} figcaption {{ margin-top: .5rem; }}
figcaption, .note {{ color: var(--muted); font-size: .9rem; max-width: 60rem; }}
svg {{ display: block; height: auto; max-width: 38rem; width: 100%; }}
.table {{ overflow-x: auto; }}
table {{ border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }}
th, td {{ border-bottom: 1px solid var(--grid); padding: .22rem .9rem .22rem 0; text-align: left;
         vertical-align: top; overflow-wrap: anywhere; min-width: 6rem; }}
th {{ font-weight: 600; }} tbody th {{ color: var(--muted); font-weight: 400; }}
summary {{ cursor: pointer; }}
"""


@dataclass(frozen=True)
class Section:
    """Notes, then parts in HTML, under a title. A folded section is closed until the reader opens it."""

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


@dataclass(frozen=True)
class Page:
    """A title and its sections; `css` has rules for the parts of the sections."""

    title: str
    sections: Sequence[Section]
    css: str = ""
    generator: str = GENERATOR

    def to_html(self) -> str:
        """The whole document."""
        body = "\n".join(section.to_html() for section in self.sections)
        return (
            f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<meta name="generator" '
            f'content="{self.generator}">\n<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            f"<title>{escape(self.title)}</title>\n<style>{_CSS}{self.css}</style>\n</head>\n<body>\n"
            f"<h1>{escape(self.title)}</h1>\n{body}\n</body>\n</html>\n"
        )


def picture_html(name: str, svg: str, caption: str) -> str:
    """A figure with its caption; its name becomes the id."""
    svg = svg.replace("<svg ", f'<svg role="img" aria-label="{escape(caption)}" ', 1)
    return f'<figure class="picture" id="{name}">\n{svg}<figcaption>{escape(caption)}</figcaption>\n</figure>\n'


def table_html(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells under a head; the first cell of a row is its name."""
    top = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    body = "".join(
        f"<tr><th>{escape(row[0])}</th>{''.join(f'<td>{escape(cell)}</td>' for cell in row[1:])}</tr>\n"
        for row in rows
    )
    return f'<div class="table"><table>\n<thead><tr>{top}</tr></thead>\n<tbody>\n{body}</tbody></table></div>\n'


def runs_table(records: Sequence[RunRecord], columns: Sequence[dict[str, str]]) -> str:
    """One column per run, one row per key in the order of first appearance; a dash where a run has no value."""
    names = dict.fromkeys(name for column in columns for name in column)
    rows = [(name, *(column.get(name, "–") or "–" for column in columns)) for name in names]
    return table_html(["", *(r.name for r in records)], [row for row in rows if set(row[1:]) != {"–"}])


def summary(record: RunRecord) -> dict[str, str]:
    """Results, text, size and machine of a run by name; empty where unknown."""
    done = record.summary or {}
    test, bpc, speeds = done.get("test", {}), record.valid["bpc"], record.stage_medians("tokens_per_second")
    bits = f"{record.sign} {test['bpc']:.4f} ({test.get('bound', 'bound unknown')})" if test else ""
    valid = f"{record.sign} {bpc[-1]:.4f} at step {int(record.valid['step'][-1]):,}" if len(bpc) else ""
    nats = ""
    if {"nats_per_token", "stderr"} <= test.keys():
        # the standard error of a single window is not a number
        error = f" ± {test['stderr']:.4f}" if math.isfinite(test["stderr"]) else ""
        nats = f"{record.sign} {test['nats_per_token']:.4f}{error}"
    stages = ", ".join(f"{bpc:.4f}" for bpc in done.get("stage_valid_bpc", []))
    return {
        "status": record.status,
        "test, bits per character": bits,
        "test, nats per token, standard error": nats,
        "validation, bits per character": valid,
        "validation after each stage": stages and f"{record.sign} {stages}",
        "preset, seed": f"{record.run.name}, {record.run.seed}",
        "text": Path(record.run.data.source).name,
        "steps": f"{record.last_step:,}" if record.has_log else "",
        "tokens": f"{int(record.train['tokens'].max()):,}" if record.has_log else "",
        "training, seconds": f"{record.seconds[-1]:,.0f}" if record.has_log else "",
        "tokens per second, median of each stage": ", ".join(f"{speed:,.0f}" for speed in speeds),
        "parameters": _plain(done.get("parameters")),
        "of them in Transformers": _plain(done.get("trunk_parameters")),
        "device": _plain(done.get("device")),
        "threads": _plain(done.get("threads")),
        "machine": _plain(done.get("machine")),
        "PyTorch": _plain(done.get("torch")),
    }


def _plain(value: Any) -> str:
    return "" if value is None else f"{value:,}" if isinstance(value, int) else str(value)


def config_table(records: Sequence[RunRecord]) -> str:
    """Every field of the configurations by its dotted name; fields in which the runs differ come first."""
    flat = [flatten(r.run) for r in records]
    names = list(dict.fromkeys(name for one in flat for name in one))
    names.sort(key=lambda name: all(name in one and one[name] == flat[0].get(name) for one in flat))
    return runs_table(records, [{name: _words(one[name]) for name in names if name in one} for one in flat])


def _words(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
