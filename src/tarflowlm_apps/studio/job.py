"""Work for a visitor on a thread: in its turn, followed to its end, stopped once nobody waits."""

import threading
import time
from collections.abc import Callable, Generator
from concurrent.futures import CancelledError, Future, wait
from typing import TypeVar

from tarflowlm.errors import Progress, UserError, counted
from tarflowlm_apps.studio.pieces import bar, card, muted, page

R = TypeVar("R")

SECONDS = 60.0  # longest time for a piece of work
EVERY = 0.12  # seconds between two updates
TURNS = threading.Condition()
LINE: list["Job"] = []
"""The queue of all requests, first come, first served: the first one is worked on. Two at once
would only slow each other down.
"""


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
            raise UserError(f"stopped after {limit}: ask for less at once")

    @property
    def state(self) -> str:
        """The state of this job, or how many requests come before it."""
        with TURNS:
            before = LINE.index(self) if self in LINE else 0
        return f"waiting: {counted(before, 'request')} before yours" if before else self.doing

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
                with TURNS:
                    TURNS.wait_for(lambda: LINE[0] is self or not self._is_wanted)
                self._begun = time.perf_counter()
                self.advance(0)
                result = work()
                self.seconds = time.perf_counter() - self._begun
                future.set_result(result)
            except BaseException as error:
                future.set_exception(error)
            finally:
                with TURNS:
                    LINE.remove(self)
                    TURNS.notify_all()

        # in line before the thread runs, so that the order is the order of requests
        with TURNS:
            LINE.append(self)
        threading.Thread(target=run, daemon=True).start()
        try:
            while not future.done():
                done = bar(self.advanced / self.total) if self.total else ""
                state = self.state
                yield around(card(text(), done, muted(state, "st-muted st-state")))
                # a class that waits should not keep the page busy
                wait([future], EVERY if state == self.doing else 4 * EVERY)
        finally:
            with TURNS:
                self._is_wanted = False
                TURNS.notify_all()
        return future.result()
