"""Work for a visitor, on a thread of its own: followed while it goes on, limited in time, one at a time."""

import threading
import time
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

import torch

from tarflowlm.errors import UserError

R = TypeVar("R")

SECONDS = 60.0
"""How long one piece of work may take."""
EVERY = 0.12
"""Seconds between two looks at work that goes on."""

_TURN = threading.Lock()
"""Held while a model works: two at once would only slow each other down."""


class Halted(Exception):
    """Raised in the work once nobody waits for it."""


class Job(Generic[R]):
    """A function that is run on a thread; it calls `advance` often, where it can be stopped."""

    def __init__(self, function: Callable[["Job[R]"], R], *, seconds: float = SECONDS) -> None:
        self.function, self.seconds = function, seconds
        self.result: R | None = None
        self.ticks: list[float] = []
        """Seconds from the start to every tick."""
        self.told: list[torch.Tensor] = []
        """What `tell` was given."""
        self.seconds_taken = 0.0
        """Seconds of the finished work."""
        self._error: BaseException | None = None
        self._begun = 0.0
        self._over, self._unwanted = threading.Event(), threading.Event()

    def stage(self, name: str, total: int | None = None, done: int = 0) -> None:
        """Do nothing."""

    def advance(self, count: int = 1) -> None:
        """Note the time. Raises Halted where nobody waits any more, UserError when the time is over."""
        passed = time.perf_counter() - self._begun
        self.ticks += [passed] * count
        if self._unwanted.is_set():
            raise Halted
        if passed > self.seconds:
            raise UserError(
                f"stopped after {self.seconds:g} seconds, the limit of this page: ask for fewer tokens, samples or "
                f"particles"
            )

    def tell(self, tokens: torch.Tensor) -> None:
        """Add tokens [num, n] to those that are final."""
        self.told.append(tokens)

    def follow(self) -> Iterator[None]:
        """Start the work; one item now and then until it is done, and `result` is set. Raises what it raised.

        Closing the iterator, as when a visitor leaves, ends the work at its next tick.
        """
        thread = threading.Thread(target=self._run, daemon=True)
        thread.start()
        try:
            while not self._over.wait(EVERY):
                yield
        finally:
            self._unwanted.set()
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        try:
            with _TURN:
                if self._unwanted.is_set():
                    return
                # a property of the thread, as in the command line
                torch.set_flush_denormal(True)
                self._begun = time.perf_counter()
                self.result = self.function(self)
                self.seconds_taken = time.perf_counter() - self._begun
        except BaseException as error:
            self._error = error
        finally:
            self._over.set()
