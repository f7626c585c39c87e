"""Work for a visitor on a thread: followed to its end, and stopped where nobody waits."""

import threading
import time
from collections.abc import Callable, Generator
from concurrent.futures import CancelledError, Future, wait
from typing import TypeVar

from tarflowlm.errors import UserError
from tarflowlm.progress import Progress

R = TypeVar("R")

SECONDS = 60.0  # that a piece of work may take at most
EVERY = 0.12  # seconds between two looks at it
TURN = threading.Lock()
"""Held while a model works: two at once would only slow each other down."""


class Job(Progress):
    """The progress of work on a thread, which can be stopped wherever it advances."""

    def __init__(self) -> None:
        self.advanced = 0
        self.seconds = 0.0
        """How long the finished work has taken."""
        self._is_wanted = True
        self._begun = 0.0

    def advance(self, count: int = 1) -> None:
        """Count progress. CancelledError once nobody waits, UserError when the time is over."""
        self.advanced += count
        if not self._is_wanted:
            raise CancelledError
        if time.perf_counter() - self._begun > SECONDS:
            limit = f"{SECONDS:g} seconds, the limit of this page"
            raise UserError(f"stopped after {limit}: ask for fewer tokens, samples or particles")

    def doing(self, words: str) -> str:
        """`words`, or that another visitor has the turn."""
        return words if self.advanced else "waiting for its turn"

    def follow(self, work: Callable[[], R], show: Callable[[], str]) -> Generator[str, None, R]:
        """Start `work`, which advances this job; yields what `show` gives until it is done.

        Returns its result. Closing the iterator, as when a visitor leaves, ends the work where it
        advances next.
        """
        future = Future[R]()

        def run() -> None:
            try:
                with TURN:
                    self._begun = time.perf_counter()
                    self.advance(0)
                    result = work()
                    self.seconds = time.perf_counter() - self._begun
                future.set_result(result)
            except BaseException as error:
                future.set_exception(error)

        threading.Thread(target=run, daemon=True).start()
        try:
            while not future.done():
                yield show()
                wait([future], EVERY)
        finally:
            self._is_wanted = False
        return future.result()
