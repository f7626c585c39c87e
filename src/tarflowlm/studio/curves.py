"""The view of runs: their learning curves, drawn here as SVG, and their numbers, while they train and afterwards."""

import math
from collections.abc import Iterator, Sequence
from functools import lru_cache
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from tarflowlm.errors import UserError
from tarflowlm.report.records import RunRecord, Series, read_record
from tarflowlm.report.style import COLOURS
from tarflowlm.studio.catalogue import Catalogue
from tarflowlm.studio.pieces import card, muted, notice, page, sentence
from tarflowlm.studio.request import one_of
from tarflowlm.training.metrics import METRICS

AXES = ("tokens", "seconds")
MOST = 12
"""Runs in one figure."""
WIDE, NARROW = (1060, 380), (360, 300)
"""Width and height of a figure, for a screen and for a telephone."""
LEFT, RIGHT, TOP, BOTTOM = 46, 12, 12, 36
POINTS = 300
"""Of a curve; longer ones are thinned out."""


def runs(catalogue: Catalogue, names: Any, axis: Any) -> Iterator[str]:
    """HTML with the curves and numbers of the runs `names`, over tokens or over seconds of training."""
    axis, wanted = one_of(axis, "axis", AXES), list(names) if isinstance(names, list) else []
    if not catalogue.runs:
        yield page(card(muted("No learning curves here: name run directories, as in `tarflowlm studio runs/mine`.")))
        return
    if not wanted:
        yield page(card(muted("Choose a run to see its learning curve.")))
        return
    records, problems = [], []
    for name in wanted[:MOST]:
        place = catalogue.place(name)
        try:
            record = _record(place, *_written(place))
            if not record.has_log:
                raise UserError(f"{name} is a model without its training log: choose another")
            records.append((str(name), record))
        except UserError as error:
            problems.append(notice(sentence(str(error).replace(str(place), str(name)))))
    if len(wanted) > MOST:
        problems.append(notice(f"{len(wanted)} runs are chosen, the first {MOST} are drawn."))
    yield page(*problems, *([card(figure(records, axis)), card(table(records))] if records else []))


@lru_cache(maxsize=64)
def _record(place: Path, size: int, time: int) -> RunRecord:
    """The run in a directory; `size` and `time` of its metrics make a longer one be read again."""
    return read_record(place)


def _written(place: Path) -> tuple[int, int]:
    try:
        found = (place / METRICS).stat()
    except OSError:
        return 0, 0
    return found.st_size, found.st_mtime_ns


def figure(records: Sequence[tuple[str, RunRecord]], axis: str) -> str:
    """Bits per character of runs: training thin, validation with dots; drawn for wide and for narrow screens."""
    key = []
    for index, (name, _) in enumerate(records):
        style = ("solid", "dashed", "dotted")[index // len(COLOURS) % 3]
        line = f"border-color:{COLOURS[index % len(COLOURS)]};border-top-style:{style}"
        key.append(f'<span><i style="{line}"></i>{escape(name)}</span>')
    drawn = "".join(
        f'<div class="{name}">{_svg(records, axis, *size)}</div>'
        for name, size in (("st-screen", WIDE), ("st-phone", NARROW))
    )
    note = muted("Bits per character: training thin, validation with dots. Those of a flow are an upper bound.")
    return f'<div class="st-key">{"".join(key)}</div>{drawn}{note}'


def _svg(records: Sequence[tuple[str, RunRecord]], axis: str, width: int, height: int) -> str:
    series = [(name, *_lines(record, axis)) for name, record in records]
    right = float(max(max(x[-1] for x, _ in lines if len(x)) for _, *lines in series))
    low, high = _limits(records)
    top, left = height - BOTTOM, LEFT

    def place(x: Series, y: Series) -> list[tuple[float, float]]:
        across = left + (width - left - RIGHT) * x / right
        return list(zip(across, top - (top - TOP) * (y.clip(low, high) - low) / (high - low), strict=True))

    body = []
    for value in ticks(low, high):
        y = top - (top - TOP) * (value - low) / (high - low)
        body.append(f'<line class="grid" x1="{left}" x2="{width - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        body.append(f'<text x="{left - 8}" y="{y + 4:.1f}" text-anchor="end">{value:g}</text>')
    for value in ticks(0.0, right, max(width // 150, 4)):
        x = left + (width - left - RIGHT) * value / right
        body.append(f'<text x="{x:.1f}" y="{top + 17}" text-anchor="middle">{_short(value)}</text>')
    words = "tokens" if axis == "tokens" else "seconds of training"
    body.append(f'<text x="{width - RIGHT}" y="{height - 2}" text-anchor="end">{words}</text>')
    for index, (_, train, valid) in enumerate(series):
        colour, dashes = COLOURS[index % len(COLOURS)], ("", "6 3", "2 2")[index // len(COLOURS) % 3]
        look = f'stroke="{colour}" stroke-dasharray="{dashes}" fill="none"'
        body.append(f'<path {look} stroke-width="1" opacity=".55" d="{_path(place(*_thinned(*train)))}"/>')
        if len(valid[0]):
            points = place(*_thinned(*valid))
            body.append(f'<path {look} stroke-width="2" d="{_path(points)}"/>')
            body += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.6" fill="{colour}"/>' for x, y in points]
    label = "Bits per character of the runs"
    return f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{label}">{"".join(body)}</svg>'


def table(records: Sequence[tuple[str, RunRecord]]) -> str:
    """One row per run: bits per character, tokens, time, speed, status."""
    head = ("run", "validation, bits per character", "test", "tokens", "time", "tokens a second", "status")
    rows = []
    for name, r in records:
        sign = "" if r.is_exact else "≤ "
        valid = f"{sign}{r.valid['bpc'][-1]:.3f}" if len(r.valid["bpc"]) else "–"
        test = f"{sign}{r.summary['test']['bpc']:.3f}" if r.summary else "–"
        speed = float(np.median(r.train["tokens_per_second"][-20:]))
        rows.append(
            (name, valid, test, _short(r.train["tokens"].max()), _time(r.seconds[-1]), f"{speed:,.0f}", r.status)
        )
    cells = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    top = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    return f'<div class="st-wide"><table><thead><tr>{top}</tr></thead><tbody>{cells}</tbody></table></div>'


def ticks(low: float, high: float, count: int = 6) -> list[float]:
    """At most about `count` round numbers from `low` to `high`."""
    step = 10.0 ** math.floor(math.log10((high - low) / count))
    step *= next(factor for factor in (1, 2, 5, 10) if (high - low) / (factor * step) <= count)
    return [round(i * step, 10) for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def _lines(record: RunRecord, axis: str) -> tuple[tuple[Series, Series], tuple[Series, Series]]:
    train = record.train["tokens"] if axis == "tokens" else record.seconds
    valid = record.valid["tokens"] if axis == "tokens" else record.valid_seconds
    return (train, record.train["bpc"]), (valid, record.valid["bpc"])


def _limits(records: Sequence[tuple[str, RunRecord]]) -> tuple[float, float]:
    """The range of bits, without the first steps, which are high."""
    every = np.concatenate([np.concatenate([r.train["bpc"], r.valid["bpc"]]) for _, r in records])
    settled = [r.train["bpc"][r.train["tokens"] >= 0.03 * r.train["tokens"].max()][0] for _, r in records]
    low, high = float(every.min()), float(max(settled))
    margin = 0.05 * (high - low) + 1e-3
    return low - margin, high + margin


def _thinned(x: Series, y: Series) -> tuple[Series, Series]:
    if len(x) <= POINTS:
        return x, y
    # means of neighbours, so that a thin curve is not a noisy one; the last point stays where it is
    parts = np.array_split(np.arange(len(x)), POINTS)
    return np.array([x[part[-1]] for part in parts]), np.array([y[part].mean() for part in parts])


def _path(points: Sequence[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)


def _short(value: float) -> str:
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:g}"


def _time(seconds: float) -> str:
    minutes = seconds / 60
    return f"{seconds:.0f} s" if minutes < 2 else f"{minutes:.0f} min" if minutes < 120 else f"{minutes / 60:.1f} h"
