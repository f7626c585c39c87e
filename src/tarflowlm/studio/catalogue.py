"""The models and runs that a visitor can reach, by short names and never by a path; the view of
learning curves.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from itertools import product
from pathlib import Path
from typing import Any

from tarflowlm.config import RunConfig
from tarflowlm.errors import UserError
from tarflowlm.runs.checkpoint import CONFIG, WEIGHTS, Checkpoint, load_checkpoint, read_run
from tarflowlm.runs.hub import DEFAULT, locate, purpose, released
from tarflowlm.studio import request
from tarflowlm.studio.pieces import card, muted, notice, page
from tarflowlm.training.metrics import METRICS
from tarflowlm.views.curves import draw_bits
from tarflowlm.views.records import read_record
from tarflowlm.views.style import render
from tarflowlm.views.tables import runs_table, summary_of

AXES = ("tokens", "seconds")
MOST = 12  # runs in one figure


@dataclass(frozen=True)
class Catalogue:
    """Directories, and the runs in them, by the names that the page shows."""

    places: dict[str, Path]
    configs: dict[str, RunConfig]
    device: str = "cpu"

    def is_baseline(self, name: str) -> bool:
        return self.configs[name].model.family == "ar"

    @property
    def models(self) -> list[str]:
        """All names: flows first, then baselines."""
        return sorted(self.places, key=self.is_baseline)

    @property
    def pair(self) -> list[str]:
        """A flow and a baseline that read texts alike, as far as there are any; else the first
        model.
        """
        names = self.models
        for flow, baseline in product(names, names):
            alike = self.configs[flow].data.tokenizer == self.configs[baseline].data.tokenizer
            if alike and self.is_baseline(baseline) and not self.is_baseline(flow):
                return [flow, baseline]
        return names[:1]

    def about(self, name: object) -> str:
        """A line about a model."""
        if not isinstance(name, str) or name not in self.places:
            return ""
        run = self.configs[name]
        return (
            purpose(self.places[name])
            or f"Preset {run.name}, trained on {Path(run.data.source).name}."
        )

    @property
    def runs(self) -> list[str]:
        """The runs that have learning curves now."""
        return [name for name, place in self.places.items() if (place / METRICS).is_file()]

    def place(self, name: object) -> Path:
        """The directory of a name. UserError for any other value that a visitor may send."""
        if not isinstance(name, str) or name not in self.places:
            raise UserError("this page has no model of that name: choose one from the list")
        return self.places[name]

    def load(self, name: object) -> Checkpoint:
        """The model of a name, kept for the next call. UserError if it has no weights yet, or is
        damaged.
        """
        place = self.place(name)
        if not (place / WEIGHTS).is_file():
            raise UserError(f"{name} has no weights yet: wait until its training has saved some")
        try:
            return _loaded(place, (place / WEIGHTS).stat().st_mtime_ns, self.device)
        except UserError as error:
            # do not show the server's paths to visitors
            raise UserError(str(error).replace(str(place), str(name))) from None


@lru_cache(maxsize=4)
def _loaded(place: Path, saved: int, device: str) -> Checkpoint:
    """The model in a directory; `saved`, when its weights were written, makes a newer one load."""
    return load_checkpoint(place, device)


def collect(names: Sequence[str], device: str = "cpu") -> Catalogue:
    """The catalogue of released models by name, run directories and folders of runs; by default of
    all released.
    """
    names = names or sorted(released(), key=lambda name: name != DEFAULT)
    # each run once, by the name that it was given
    found = {
        place.resolve(): Path(os.path.abspath(place)) for name in names for place in _runs_in(name)
    }
    places: dict[str, Path] = {}
    for place in found.values():
        name, folder = place.name, place.parent
        # two runs of one name are told apart by their folders
        while name in places:
            name, folder = (
                (f"{folder.name}/{name}", folder.parent) if folder.name else (f"{name}+", folder)
            )
        places[name] = place
    return Catalogue(places, {name: read_run(place) for name, place in places.items()}, device)


def _runs_in(name: str) -> list[Path]:
    place = locate(name)
    if (place / CONFIG).is_file():
        return [place]
    if not (found := sorted(path.parent for path in place.glob(f"*/{CONFIG}"))):
        known = f"nor one of {', '.join(released())}"
        raise UserError(
            f"{name!r} is neither a run directory, nor a folder of them, {known}: check the path"
        )
    return found


def runs(catalogue: Catalogue, names: Any, axis: Any) -> Iterator[str]:
    """HTML with the curves and numbers of the runs `names`, over tokens or over seconds of
    training.
    """
    wanted = (
        [(str(name), catalogue.place(name)) for name in names] if isinstance(names, list) else []
    )
    if not catalogue.runs or not wanted:
        none = "No learning curves here: name run directories, as in `tarflowlm studio runs/mine`."
        yield page(
            card(muted("Choose a run to see its learning curve." if catalogue.runs else none))
        )
        return
    more = f"{len(wanted)} runs are chosen, the first {MOST} are drawn."
    logs = [place / METRICS for _, place in wanted]
    written = [
        (log.stat().st_size, log.stat().st_mtime_ns) if log.exists() else (0, 0) for log in logs
    ]
    shown = tuple(
        (name, place, when) for (name, place), when in zip(wanted[:MOST], written, strict=False)
    )
    yield page(_view(shown, request.choice(axis, AXES)), notice(more) if len(wanted) > MOST else "")


@lru_cache(maxsize=8)
def _view(wanted: tuple[tuple[str, Path, tuple[int, int]], ...], axis: str) -> str:
    """Curves and table of runs, given by name, directory, and when their metrics were written."""
    records, problems = [], []
    for name, place, _ in wanted:
        try:
            if (record := read_record(place)).has_log:
                records.append(replace(record, name=name))
            else:
                problems.append(
                    notice(f"{name} is a model without its training log: choose another")
                )
        except UserError as error:
            problems.append(notice(str(error).replace(str(place), name)))
    if not records:
        return "".join(problems)
    draw = partial(draw_bits, records=records, over=[axis])
    figure = render(draw, None, width=4.2, height=3.0 + 0.18 * len(records), name="runs")
    note = muted("Bits per character. Flows have an upper bound (≤).")
    table = runs_table(records, [*map(summary_of, records)])
    return "".join([*problems, card(f'<div class="st-figure">{figure}</div>', note), card(table)])
