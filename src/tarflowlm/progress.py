"""How long work reports its progress."""

Record = dict[str, str | int | float]
"""A line of metrics.jsonl."""


class Progress:
    """The calls that long work makes. Subclasses show them; this class shows nothing."""

    def stage(self, name: str, total: int | None = None, done: int = 0) -> None:
        """Begin a part called `name`, of `total` units if known, `done` of them done before."""

    def advance(self, count: int = 1) -> None:
        """`count` more units of the current part are done."""

    def record(self, record: Record) -> None:
        """A training run wrote a line to metrics.jsonl."""


SILENT = Progress()
