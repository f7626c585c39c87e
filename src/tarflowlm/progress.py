"""The protocol by which long work reports its progress."""

from typing import Protocol, runtime_checkable


@runtime_checkable
class Progress(Protocol):
    """The calls that long work makes: `stage` names a part of it, inner loops `advance`."""

    def stage(self, name: str, total: int | None = None, done: int = 0) -> None:
        """Begin a part called `name`, of `total` units if known, `done` of them done before."""

    def advance(self, count: int = 1) -> None:
        """`count` more units of the current part are done."""


class Silent:
    """Reports nothing."""

    def stage(self, name: str, total: int | None = None, done: int = 0) -> None: ...

    def advance(self, count: int = 1) -> None: ...


SILENT: Progress = Silent()
"""The default of functions that take a `Progress`."""
