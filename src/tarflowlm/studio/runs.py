"""The view of learning curves."""

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path

from tarflowlm.errors import UserError
from tarflowlm.locks import is_written
from tarflowlm.runs.checkpoint import SUMMARY
from tarflowlm.studio.catalogue import Catalogue
from tarflowlm.studio.pieces import Pages, card, muted, notice, page
from tarflowlm.studio.values import choice
from tarflowlm.training.metrics import METRICS
from tarflowlm.views.curves import AXES, draw_bits
from tarflowlm.views.records import read_record
from tarflowlm.views.style import render
from tarflowlm.views.tables import summary_table

MOST = 12  # runs in one figure

Wanted = tuple[str, Path, tuple[object, ...]]
"""A run: its name, its directory, and what tells whether it has changed."""


def runs(catalogue: Catalogue, names: object, axis: object) -> Pages:
    """HTML with the curves and numbers of the runs `names`, over tokens or seconds of training."""
    chosen: Sequence[object] = names if isinstance(names, list) else []
    if not chosen or not catalogue.runs:
        words = "Choose a run to see its learning curve."
        if not catalogue.runs:
            example = "`tarflowlm studio runs/mine`"
            words = f"No learning curves here: name run directories, as in {example}."
        yield page(card(muted(words)))
        return
    wanted = []
    for name in chosen:
        place = catalogue.entry(name).place
        sizes = [
            file.stat().st_size for file in (place / METRICS, place / SUMMARY) if file.exists()
        ]
        wanted.append((str(name), place, (*sizes, is_written(place))))
    more = ""
    if len(wanted) > MOST:
        more = notice(f"{len(wanted)} runs are chosen, the first {MOST} are drawn.")
    yield page(_view(tuple(wanted[:MOST]), choice(axis, AXES)), more)


@lru_cache(maxsize=8)
def _view(wanted: tuple[Wanted, ...], axis: str) -> str:
    """Curves and table of runs; drawn again when they have changed."""
    records = []
    problems = ""
    for name, place, _ in wanted:
        try:
            record = read_record(place)
        except UserError as error:
            problems += notice(str(error).replace(str(place), name))
            continue
        if record.has_log:
            records.append(replace(record, name=name))
        else:
            problems += notice(f"{name} is a model without its training log: choose another")
    if not records:
        return problems
    draw = partial(draw_bits, records=records, over=[axis])
    figure = render(draw, None, width=4.2, height=3.0 + 0.18 * len(records), name="runs")
    note = muted("Faint: training batches; with markers: validation. Flows have upper bounds (≤).")
    return (
        problems
        + card(f'<div class="st-figure">{figure}</div>', note)
        + card(summary_table(records))
    )
