"""The view of learning curves."""

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
    if not catalogue.runs:
        words = "No learning curves here: name run directories, as in `tarflowlm studio runs/mine`."
        yield page(card(muted(words)))
        return
    wanted = []
    for name in names[:MOST] if isinstance(names, list) else ():
        place = catalogue.entry(name).place
        files = (place / METRICS, place / SUMMARY)
        sizes = [file.stat().st_size for file in files if file.exists()]
        wanted.append((str(name), place, (*sizes, is_written(place))))
    yield page(_view(tuple(wanted), choice(axis, AXES)))


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
        else:
            if record.has_log:
                records.append(replace(record, name=name))
    if not records:
        return problems + card(muted("Choose a run to see its learning curve."))
    draw = partial(draw_bits, records=records, over=[axis])
    figure = render(draw, None, width=4.2, height=3.0 + 0.18 * len(records), name="runs")
    note = muted("Faint: training batches; with markers: validation. Flows have upper bounds (≤).")
    drawn = card(f'<div class="st-figure">{figure}</div>', note)
    return problems + drawn + card(summary_table(records))
