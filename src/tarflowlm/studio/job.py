"""Work for a visitor, on a thread of its own: followed while it goes on, limited in time, one at a time."""

import threading
import time
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

import torch

from tarflowlm.errors import UserError
from tarflowlm.progress import Silent

R = TypeVar("R")

SECONDS = 60.0
"""Most seconds of one piece of work."""
EVERY = 0.12
"""Seconds between two looks at work that goes on."""

_TURN = threading.Lock()
"""Held while a model works: two at once would only slow each other down."""


class Halted(Exception):
    """Raised in the work once the visitor has left."""


class Job(Silent, Generic[R]):
    """A function run on a thread with the job as its `Progress`; it can be stopped wherever it advances."""

    def __init__(self, function: Callable[["Job[R]"], R], *, seconds: float = SECONDS) -> None:
        self.function, self.limit = function, seconds
        self.result: R | None = None
        self.advanced = 0
        self.tokens: list[torch.Tensor] = []
        """Final tokens, [num, n] each."""
        self.seconds = 0.0
        """Seconds of the finished work."""
        self._error: BaseException | None = None
        self._is_wanted, self._begun = True, 0.0

    def advance(self, count: int = 1) -> None:
        """Count progress. Raises Halted once the visitor has left, UserError when the time is over."""
        self.advanced += count
        if not self._is_wanted:
            raise Halted
        if time.perf_counter() - self._begun > self.limit:
            raise UserError(
                f"stopped after {self.limit:g} seconds, the limit of this page: ask for fewer tokens, samples or "
                f"particles"
            )

    def follow(self) -> Iterator[None]:
        """Start the work; one item now and then until it is done, and `result` is set. Raises what it raised.

        Closing the iterator, as when a visitor leaves, ends the work where it advances next.
        """
        thread = threading.Thread(target=self._run, daemon=True)
        thread.start()
        try:
            while thread.is_alive():
                yield
                thread.join(EVERY)
        finally:
            self._is_wanted = False
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        try:
            with _TURN:
                # a property of the thread, as in the command line
                torch.set_flush_denormal(True)
                self._begun = time.perf_counter()
                self.advance(0)
                self.result = self.function(self)
                self.seconds = time.perf_counter() - self._begun
        except BaseException as error:
            self._error = error
