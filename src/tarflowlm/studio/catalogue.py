"""The models and runs that a visitor can reach: those named at the start, by short names and never by a path."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from tarflowlm.errors import UserError
from tarflowlm.runs.checkpoint import CONFIG, WEIGHTS, Checkpoint, load_checkpoint, read_run
from tarflowlm.runs.released import DEFAULT, locate, released
from tarflowlm.training.metrics import METRICS


@dataclass(frozen=True)
class Catalogue:
    """Directories by the names that the page shows."""

    places: dict[str, Path]
    baselines: frozenset[str]
    """The names of discrete baselines."""
    weighing: frozenset[str]
    """The names of models whose block 1 has token weights, baselines among them: a temperature suits these."""
    device: str = "cpu"

    @property
    def models(self) -> list[str]:
        """All names: flows first, then baselines."""
        return [*self.flows, *(name for name in self.places if name in self.baselines)]

    @property
    def flows(self) -> list[str]:
        """The names of flows."""
        return [name for name in self.places if name not in self.baselines]

    @property
    def runs(self) -> list[str]:
        """The names of runs that have learning curves now."""
        return [name for name, place in self.places.items() if (place / METRICS).is_file()]

    def place(self, name: object) -> Path:
        """The directory of a name. UserError for any other value that a visitor may send."""
        if not isinstance(name, str) or name not in self.places:
            raise UserError("this page has no model of that name: choose one from the list")
        return self.places[name]

    def load(self, name: object) -> Checkpoint:
        """The model of a name, kept for the next call. UserError if it has no weights yet, or is damaged."""
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
    """The catalogue of released models by name, run directories, and folders of runs; without names, of all released.

    UserError for what is none of them.
    """
    if not names:
        names = sorted(released(), key=lambda name: name != DEFAULT)
    # each run once, by the name that it was given
    found = {place.resolve(): Path(os.path.abspath(place)) for name in names for place in _runs_in(name)}
    places: dict[str, Path] = {}
    for place in found.values():
        name, folder = place.name, place.parent
        # two runs of one name are told apart by their folders
        while name in places:
            name, folder = (f"{folder.name}/{name}", folder.parent) if folder.name else (f"{name}+", folder)
        places[name] = place
    models = {name: read_run(place).model for name, place in places.items()}
    baselines = frozenset(name for name, model in models.items() if model.family == "ar")
    weighing = frozenset(name for name, model in models.items() if model.has_token_weights)
    return Catalogue(places, baselines, weighing, device)


def _runs_in(name: str) -> list[Path]:
    place = locate(name)
    if (place / CONFIG).is_file():
        return [place]
    if not (found := sorted(path.parent for path in place.glob(f"*/{CONFIG}"))):
        known = f"nor one of {', '.join(released())}"
        raise UserError(f"{name!r} is neither a run directory, nor a folder of them, {known}: check the path")
    return found
