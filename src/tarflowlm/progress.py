"""The protocol by which long work reports its progress."""

from typing import Protocol, runtime_checkable

Record = dict[str, str | int | float]
"""A line of metrics.jsonl."""


@runtime_checkable
class Progress(Protocol):
    """The calls that long work makes: `stage` names a part of it, inner loops `advance`."""

    def stage(self, name: str, total: int | None = None, done: int = 0) -> None:
        """Begin a part called `name`, of `total` units if known, `done` of them done before."""

    def advance(self, count: int = 1) -> None:
        """`count` more units of the current part are done."""


class Reporter(Progress, Protocol):
    """The progress of a training run.

    Its parts are the preparation of the corpus, every stage (in steps, or in thousandths of its
    time), and the test split (in windows).
    """

    def record(self, record: Record) -> None:
        """A line was written to metrics.jsonl."""


class Silent:
    """Reports nothing."""

    def stage(self, name: str, total: int | None = None, done: int = 0) -> None: ...

    def advance(self, count: int = 1) -> None: ...

    def record(self, record: Record) -> None: ...


SILENT = Silent()
"""The default of functions that take a `Progress` or a `Reporter`."""
