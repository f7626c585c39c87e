"""The view of learning curves."""

from functools import lru_cache, partial
from pathlib import Path

from tarflowlm.errors import UserError
from tarflowlm.files import is_written
from tarflowlm.runs.records import read_record
from tarflowlm_apps.grid import div
from tarflowlm_apps.report.figures import AXES, CURVES, draw_bits
from tarflowlm_apps.report.page import labelled
from tarflowlm_apps.report.style import render
from tarflowlm_apps.report.tables import summary_table
from tarflowlm_apps.studio.catalogue import Catalogue
from tarflowlm_apps.studio.pieces import Pages, card, muted, notice, page

MOST = 12  # runs in one figure


def runs(catalogue: Catalogue, names: object) -> Pages:
    """Curves and numbers of the runs `names`, over tokens and seconds of training."""
    places = {}
    state: list[object] = []
    chosen = names if isinstance(names, list) else []
    for name in chosen[:MOST]:
        place = catalogue.entry(name).place
        places[str(name)] = place
        state.append(is_written(place))
        state += [file.stat().st_size for file in place.glob("[!.]*.json*")]
    left = f"The first {MOST} of {len(chosen)} runs are shown: choose fewer to see others."
    more = card(muted(left)) if len(chosen) > MOST else ""
    yield page(_view(tuple(places.items()), tuple(state)), more)


@lru_cache(maxsize=8)
def _view(places: tuple[tuple[str, Path], ...], state: tuple[object, ...]) -> str:
    """Curves and table of runs by name; drawn again when their files have another `state`."""
    records = []
    problems = ""
    for name, place in places:
        try:
            record = read_record(place, name)
        except UserError as error:
            problems += notice(str(error).replace(str(place), name, 1))
        else:
            if record.has_log:
                records.append(record)
    if not records:
        words = "Choose a run to see its curve; `tarflowlm studio runs/mine` shows one of yours."
        return problems + card(muted(words))
    figures = ""
    # of a single run, tokens and seconds would give the same picture twice
    for axis in AXES if len(records) > 1 else AXES[:1]:
        draw = partial(draw_bits, records=records, over=[axis])
        figure = render(draw, f"runs-{axis}", width=4.2, height=3.0 + 0.18 * len(records))
        figures += div("st-figure", labelled(figure, f"bits per character over {axis}"))
    drawn = card(div("st-pair", figures), muted(CURVES))
    return problems + drawn + card(summary_table(records))
