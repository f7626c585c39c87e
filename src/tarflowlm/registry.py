"""Choices by name, to which a user adds his own: couplings, layers, models, tokenizers, optimisers
and schedules.

A configuration holds the name, config.json also the module of one's own (`runs.checkpoint`), and
that module is imported by its user alone. No torch here.
"""

from collections import UserDict
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from tarflowlm.errors import UserError, guess

Plugged = TypeVar("Plugged")
"""A class or function of a user's own."""


def own_module(kind: object) -> str | None:
    """The module of a class or function of a user's own; None for one of ours, and for None."""
    module: str = getattr(kind, "__module__", __name__)
    return None if module.partition(".")[0] == __name__.partition(".")[0] else module


class Registry(UserDict[str, Any]):
    """All choices of one kind by name. Ours may be None, where code of ours knows what they are."""

    def __init__(self, word: str, *ours: str, needs: str = "") -> None:
        """The `word` is what messages call the kind; one's own must have the attribute `needs`."""
        super().__init__(dict.fromkeys(ours))
        self.word = word
        self.needs = needs

    # one of a kind: an annotation of a field, which has to be hashable
    __hash__ = object.__hash__
    __eq__ = object.__eq__

    def add(self, name: str, kind: object) -> None:
        """Let `kind` have the name. UserError for a name that is taken.

        A notebook may run the cell that defines it more than once. A module of a user's own, which
        the configurations of its runs name, may have used the name before one of ours did.
        """
        known = self.get(name)
        is_same = getattr(known, "__qualname__", "") == getattr(kind, "__qualname__", None)
        is_replaced = own_module(known) is None and own_module(kind) not in (None, "__main__")
        if name in self and not is_same and not is_replaced:
            raise UserError(f"{self.word} {name!r} exists already: choose another name")
        self[name] = kind

    def check_name(self, name: object) -> None:
        """UserError unless this can be a name."""
        if not name or not isinstance(name, str):
            raise UserError(f"{self.word} {name!r:.40}: give it a name, a str")

    def check(self, name: str, kind: object) -> None:
        """UserError unless `kind` can be what the name stands for."""
        if not (hasattr(kind, self.needs) if self.needs else callable(kind)):
            lacks = f"has no `{self.needs}`" if self.needs else "cannot be called"
            raise UserError(f"{self.word} {name!r}: {kind!r:.40} {lacks} (docs/flow.md)")

    def own(self, name: str) -> Callable[[Plugged], Plugged]:
        """A decorator that gives a class or function of a user's own this name."""
        self.check_name(name)

        def register(kind: Plugged) -> Plugged:
            self.check(name, kind)
            self.add(name, kind)
            return kind

        return register

    def name_of(self, chosen: object) -> str:
        """The name of a choice, given by its name, or itself; UserError for an unknown one."""
        if isinstance(chosen, str):
            return chosen
        for name, kind in self.items():
            if kind is chosen:
                return name
        what = f"{self.word} {getattr(chosen, '__qualname__', chosen)!r:.40}"
        decorator = f"@tarflowlm.{self.word}('my_{self.word}')"
        raise UserError(f"{what} has no name: write {decorator} above it")

    def remedy(self, name: object, known: Iterable[str] | None = None) -> str:
        """What to give in place of an unknown name, of all or of those that are `known`."""
        names = list(self if known is None else known)
        nearest = guess(name, names) if isinstance(name, str) else ""
        return f"{nearest}choose one of {', '.join(names)}, or import your own (--import MODULE)"
