"""The models and runs that a visitor can reach, by short names."""

import logging
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations
from pathlib import Path

from tarflowlm.config import RunConfig
from tarflowlm.errors import UserError
from tarflowlm.runs import CONFIG, METRICS, WEIGHTS
from tarflowlm.runs.checkpoint import Checkpoint, load_checkpoint, locate, read_run
from tarflowlm.runs.hub import DEFAULT, purpose, read_card, released, shown_name
from tarflowlm.runs.records import find_runs


@dataclass(frozen=True)
class Entry:
    """A model or run; `command_name` is its name or path on the command line."""

    place: Path
    command_name: str
    run: RunConfig


class Catalogue:
    """Models by name, run directories and folders of runs; by default all released models."""

    def __init__(self, names: Sequence[str] = (), device: str = "cpu") -> None:
        names = names or sorted(released(), key=lambda name: name != DEFAULT)
        # ask the hub only once
        self.folders = {name: locate(name) for name in names}
        self.device = device
        self.entries = _collect(self.folders)

    def refresh(self) -> None:
        """Look at the folders again: runs may have begun there."""
        with suppress(UserError, OSError):
            self.entries = _collect(self.folders, self.entries)

    @property
    def models(self) -> list[str]:
        """All names: flows first, then baselines."""
        return sorted(self.entries, key=lambda name: self.entries[name].run.model.family == "ar")

    @property
    def pair(self) -> list[str]:
        """A flow and a baseline with weights that read texts the same way, else the first model."""
        ready = [name for name in self.models if (self.entries[name].place / WEIGHTS).is_file()]
        for names in combinations(ready, 2):
            flow, baseline = (self.entries[name].run for name in names)
            is_alike = flow.data.tokenizer == baseline.data.tokenizer
            if is_alike and flow.model.family != baseline.model.family:
                return list(names)
        return (ready or self.models)[:1]

    @property
    def runs(self) -> list[str]:
        """The runs with learning curves."""
        return [name for name, one in self.entries.items() if (one.place / METRICS).is_file()]

    def fills_gaps(self, name: object) -> bool:
        """Whether a model fills in gaps of unknown length."""
        config = self.entry(name).run.model
        return config.has_token_weights and config.patch == 1

    def for_gaps(self, name: object) -> object:
        """The model of this name if it fills in gaps, else the first that does."""
        others = [other for other in self.models if self.fills_gaps(other)]
        return name if self.fills_gaps(name) or not others else others[0]

    @property
    def for_passes(self) -> str | None:
        """The first model whose passes show how a text is written."""
        return next((name for name in self.models if self.entry(name).run.model.fills_in), None)

    @property
    def choices(self) -> list[tuple[str, str]]:
        """The models for a list: each with a few words about it, and its name."""
        found = []
        for name in self.models:
            run = self.entries[name].run
            about = ["letters" if run.data.tokenizer.kind == "char" else "words"]
            if run.model.fills_in:
                about.append("in passes")
            if run.model.family == "ar":
                about.append("discrete, to compare")
            found.append((f"{name} ({', '.join(about)})", name))
        return found

    def about(self, name: object) -> str:
        entry = self.entry(name)
        trained = f"Preset {entry.run.name}, trained on {Path(entry.run.data.source).name}."
        return purpose(read_card(entry.place)) or trained

    def temperature(self, name: object) -> float:
        """The temperature that suits a model."""
        return self.entry(name).run.temperature

    def top_p(self, name: object) -> float:
        """The top-p that suits a model, in a text without blanks."""
        return self.entry(name).run.top_p

    def entry(self, name: object) -> Entry:
        """The entry of a name. UserError for any other value."""
        if not name:
            raise UserError("choose a model from the list")
        if not isinstance(name, str) or name not in self.entries:
            raise UserError("this page has no model of that name: choose one from the list")
        return self.entries[name]

    def load(self, name: object) -> Checkpoint:
        """The model of a name. UserError if it has no weights yet, or is damaged."""
        place = self.entry(name).place
        weights = place / WEIGHTS
        if not weights.is_file():
            raise UserError(f"{name} has no weights yet: wait until its training has saved some")
        try:
            return _loaded(place, weights.stat().st_mtime_ns, self.device)
        except UserError as error:
            # visitors see no paths of the server
            raise UserError(str(error).replace(str(place), str(name))) from None


@lru_cache(maxsize=4)
def _loaded(place: Path, saved: int, device: str) -> Checkpoint:
    """The model in a directory, whose weights were `saved` at this time."""
    return load_checkpoint(place, device)


def _collect(folders: dict[str, Path], seen: dict[str, Entry] | None = None) -> dict[str, Entry]:
    """The entries by the names that the page shows, each run once.

    A run that was `seen` keeps its name, and its entry while it cannot be read. UserError at the
    first look for a name without a run, and for a run that is named and cannot be read; in a folder
    such a run is left out.
    """
    entries: dict[str, Entry] = {}
    is_first, seen = seen is None, seen or {}
    names = {entry.place: name for name, entry in seen.items()}
    known = set()
    for given, folder in folders.items():
        found = [path for path in find_runs(folder) if (path / CONFIG).is_file()]
        if not found and is_first:
            models = ", ".join(released())
            raise UserError(f"{given!r} holds no run, and is not one of {models}: check the path")
        for path in found:
            place = path.resolve()
            if place in known:
                continue
            known.add(place)
            command_name = given if path == folder else str(path)
            taken = entries.keys() | seen.keys()
            # a second run of the same name is shown by its path
            choices = (shown_name(given, path), command_name, str(place))
            name = names.get(path) or next(name for name in choices if name not in taken)
            try:
                entries[name] = Entry(path, command_name, read_run(path))
            except UserError as error:
                if path in names:
                    entries[name] = seen[name]
                elif is_first and path == folder:
                    raise
                elif is_first:
                    logging.getLogger("tarflowlm").warning("left out: %s", error)
    return entries
