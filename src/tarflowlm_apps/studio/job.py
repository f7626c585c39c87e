"""Work for a visitor on a thread: followed to its end, or stopped once nobody waits for it."""

import threading
import time
from collections.abc import Callable, Generator
from concurrent.futures import CancelledError, Future, wait
from typing import TypeVar

from tarflowlm.errors import Progress, UserError
from tarflowlm_apps.studio.pieces import bar, card, muted, page

R = TypeVar("R")

SECONDS = 60.0  # longest time for a piece of work
EVERY = 0.12  # seconds between two updates
TURN = threading.Lock()
"""Held while a model works: two at once would only slow each other down."""


class Job(Progress):
    """The progress of work on a thread, of `total` units if known.

    It can be stopped wherever it advances.
    """

    def __init__(self, doing: str, total: int = 0) -> None:
        self.doing = doing
        self.total = total
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

    def follow(
        self,
        work: Callable[[], R],
        text: Callable[[], str],
        around: Callable[[str], str] = page,
    ) -> Generator[str, None, R]:
        """Start `work`, which advances this job; yields its progress below a text until it is done.

        `text` is HTML, and `around` makes a page of a card.

        Returns the result of `work`. Closing the iterator, as when a visitor leaves, stops the work
        at its next advance.
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
                words = self.doing if self.advanced else "waiting for its turn"
                done = bar(self.advanced / self.total) if self.total else ""
                yield around(card(text(), done, muted(words)))
                wait([future], EVERY)
        finally:
            self._is_wanted = False
        return future.result()
