"""The view of runs: their learning curves and their numbers, while they train and afterwards."""

from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache, partial
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from tarflowlm.errors import UserError
from tarflowlm.report.figures import draw_bits
from tarflowlm.report.records import RunRecord, read_record
from tarflowlm.report.style import render
from tarflowlm.studio import request
from tarflowlm.studio.catalogue import Catalogue
from tarflowlm.studio.pieces import card, muted, notice, page
from tarflowlm.training.metrics import METRICS

AXES = ("tokens", "seconds")
MOST = 12
"""Runs in one figure."""


def runs(catalogue: Catalogue, names: Any, axis: Any) -> Iterator[str]:
    """HTML with the curves and numbers of the runs `names`, over tokens or over seconds of training."""
    wanted = [(str(name), catalogue.place(name)) for name in names] if isinstance(names, list) else []
    if not catalogue.runs:
        yield page(card(muted("No learning curves here: name run directories, as in `tarflowlm studio runs/mine`.")))
        return
    if not wanted:
        yield page(card(muted("Choose a run to see its learning curve.")))
        return
    more = f"{len(wanted)} runs are chosen, the first {MOST} are drawn."
    shown = tuple((name, place, _written(place)) for name, place in wanted[:MOST])
    yield page(_view(shown, request.choice(axis, AXES)), notice(more) if len(wanted) > MOST else "")


def _written(place: Path) -> tuple[int, int]:
    path = place / METRICS
    return (path.stat().st_size, path.stat().st_mtime_ns) if path.exists() else (0, 0)


@lru_cache(maxsize=8)
def _view(wanted: tuple[tuple[str, Path, tuple[int, int]], ...], axis: str) -> str:
    """Curves and table of runs, given by name, directory, and when their metrics were written."""
    records, problems = [], []
    for name, place, _ in wanted:
        try:
            record = read_record(place)
            if not record.has_log:
                raise UserError(f"{name} is a model without its training log: choose another")
            records.append(replace(record, name=name))
        except UserError as error:
            problems.append(notice(str(error).replace(str(place), name)))
    if not records:
        return "".join(problems)
    draw = partial(draw_bits, records=records, over=[axis])
    figure = render(draw, None, width=4.2, height=3.0 + 0.18 * len(records), name="runs")
    note = muted("Bits per character. Flows have an upper bound (≤).")
    return "".join([*problems, card(f'<div class="st-figure">{figure}</div>', note), card(_table(records))])


def _table(records: list[RunRecord]) -> str:
    head = ("run", "validation, bits per character", "test", "tokens", "time", "tokens per second", "status")
    rows = []
    for r in records:
        sign = "" if r.is_exact else "≤ "
        valid = f"{sign}{r.valid['bpc'][-1]:.3f}" if len(r.valid["bpc"]) else "–"
        test = f"{sign}{r.summary['test']['bpc']:.3f}" if r.summary else "–"
        speed = float(np.median(r.train["tokens_per_second"][-20:]))
        tokens = f"{r.train['tokens'].max() / 1e6:,.1f}M"
        rows.append((r.name, valid, test, tokens, f"{r.seconds[-1] / 60:,.1f} min", f"{speed:,.0f}", r.status))
    cells = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    top = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    return f'<div class="st-wide"><table><thead><tr>{top}</tr></thead><tbody>{cells}</tbody></table></div>'
