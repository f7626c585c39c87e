"""The view of learning curves."""

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


def runs(catalogue: Catalogue, names: object, axis: object) -> Pages:
    """HTML with the curves and numbers of the runs `names`, over tokens or seconds of training."""
    if not catalogue.runs:
        words = "No learning curves here: name run directories, as in `tarflowlm studio runs/mine`."
        yield page(card(muted(words)))
        return
    places = {}
    state: list[object] = []
    for name in names[:MOST] if isinstance(names, list) else ():
        place = catalogue.entry(name).place
        places[str(name)] = place
        files = (place / METRICS, place / SUMMARY)
        state += [file.stat().st_size for file in files if file.exists()]
        state.append(is_written(place))
    yield page(_view(tuple(places.items()), choice(axis, AXES), tuple(state)))


@lru_cache(maxsize=8)
def _view(places: tuple[tuple[str, Path], ...], axis: str, state: tuple[object, ...]) -> str:
    """Curves and table of runs by name; drawn again when their files have another `state`."""
    records = []
    problems = ""
    for name, place in places:
        try:
            record = read_record(place, name)
        except UserError as error:
            problems += notice(str(error).replace(str(place), name))
        else:
            if record.has_log:
                records.append(record)
    if not records:
        return problems + card(muted("Choose a run to see its learning curve."))
    draw = partial(draw_bits, records=records, over=[axis])
    figure = render(draw, "runs", width=4.2, height=3.0 + 0.18 * len(records))
    note = muted("Faint: training batches; with markers: validation. Flows have upper bounds (≤).")
    drawn = card(f'<div class="st-figure">{figure}</div>', note)
    return problems + drawn + card(summary_table(records))
