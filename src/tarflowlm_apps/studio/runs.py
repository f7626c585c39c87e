"""The view of runs: learning curves, and what a model writes while it learns."""

from functools import lru_cache, partial
from pathlib import Path

from tarflowlm.errors import UserError
from tarflowlm.evaluation.likelihood import sign_of
from tarflowlm.files import is_written
from tarflowlm.runs.records import RunRecord, read_record
from tarflowlm.terminal.tokens import Row, Token, visible
from tarflowlm_apps.grid import div
from tarflowlm_apps.report.figures import AXES, CURVES, draw_bits
from tarflowlm_apps.report.page import labelled
from tarflowlm_apps.report.style import render
from tarflowlm_apps.report.tables import summary_table
from tarflowlm_apps.studio.catalogue import Catalogue
from tarflowlm_apps.studio.pieces import (
    Pages,
    asked,
    card,
    muted,
    notice,
    page,
    slider,
    stage,
    title,
)

MOST = 12  # runs in one figure


def runs(catalogue: Catalogue, names: object) -> Pages:
    """Curves, texts and numbers of the runs `names`; without any run, how to make one."""
    if not catalogue.runs:
        yield page(_first_run())
        return
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
        return problems + card(muted("Choose a run to see how it learnt."))
    figures = ""
    # of a single run, tokens and seconds would give the same picture twice
    for axis in AXES if len(records) > 1 else AXES[:1]:
        draw = partial(draw_bits, records=records, over=[axis])
        figure = render(draw, f"runs-{axis}", width=4.2, height=3.0 + 0.18 * len(records))
        figures += div("st-figure", labelled(figure, f"bits per character over {axis}"))
    drawn = card(div("st-pair", figures), muted(CURVES))
    texts = div("st-pair", *map(_texts, records))
    return problems + drawn + texts + card(summary_table(records))


def _texts(record: RunRecord) -> str:
    """A slider over what a run wrote at its validations."""
    sign = sign_of(record.run.model.bound).replace("<=", "≤")
    rows = [
        Row(f"step {step:,.0f}: {sign} {bpc:.2f} bits per character", [Token(visible(text))])
        for step, bpc, text in zip(
            record.valid["step"], record.valid["bpc"], record.texts, strict=True
        )
        if text
    ]
    if not rows:
        return ""
    how = "The random numbers are always the same: what differs is what the model has learnt."
    return card(
        title(f"What {record.name} wrote while it learnt"),
        stage(rows[-1].tokens),
        slider(rows, f"text of {record.name}", "all of its texts", is_kept=True),
        muted(how),
    )


def _first_run() -> str:
    return card(
        title("No run yet"),
        muted("This trains a small model on short stories, in five minutes:"),
        asked(["tarflowlm", "quickstart"]),
        muted("And this opens the page with it, also while it trains:"),
        asked(["tarflowlm", "studio", "stories", "runs"]),
    )
