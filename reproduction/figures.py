"""Figures that no recipe makes: rows of tables, one a line of docs/reproduce/figures.jsonl.

A line has the name of its table, the cells of the row by their columns, and the command, the seed
and the hardware that gave them (null where that is not known). A page has its tables between
`begin` and END; `python docs/reproduce/claims.py` writes them there.
"""

import json
import re
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
FIGURES = ROOT / "docs" / "reproduce" / "figures.jsonl"
PAGES = (ROOT / "docs" / "comparison.md", ROOT / "docs" / "reproduce.md")
END = "<!-- end of figures -->"

Cells = dict[str, str]


def begin(table: str) -> str:
    """The line above a table in a page."""
    return f"<!-- figures: {table} -->"


@cache
def lines() -> list[dict[str, Any]]:
    """All lines of the file."""
    return [json.loads(line) for line in FIGURES.read_text(encoding="utf-8").splitlines()]


def rows(table: str) -> list[Cells]:
    """The rows of a table, in order."""
    return [line["cells"] for line in lines() if line["table"] == table]


def row(table: str, first: str) -> Cells:
    """The row of a table whose first cell is `first`."""
    [found] = [cells for cells in rows(table) if next(iter(cells.values())) == first]
    return found


def number(cell: str) -> float:
    """The first number in a cell."""
    found = re.search(r"-?\d[\d,]*\.?\d*", cell)
    assert found, cell
    return float(found[0].replace(",", ""))


def markdown(table: str) -> str:
    """A table in Markdown."""
    found = rows(table)
    assert found, table
    every = [list(found[0]), ["---"] * len(found[0]), *(list(cells.values()) for cells in found)]
    return "".join(
        f"|{'|'.join(f' {cell} ' if cell else ' ' for cell in cells)}|\n" for cells in every
    )


def written(page: str) -> str:
    """The text of a page with its tables as they are on record."""

    def table(found: re.Match[str]) -> str:
        return f"{begin(found[1])}\n\n{markdown(found[1])}\n{END}"

    pattern = f"{begin('([a-z0-9-]+)')}.*?{END}"
    return re.sub(pattern, table, page, flags=re.DOTALL)
