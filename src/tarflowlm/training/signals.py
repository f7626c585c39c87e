"""Leaving a run by SIGTERM or SIGINT: at the next step boundary, with everything saved."""

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT)

StopRequests = Callable[[], AbstractContextManager[Callable[[], str | None]]]
"""A context in which a run can be asked to stop; it yields what says by what it was asked to, None if by nothing."""


class Stopped(Exception):
    """A run was asked to stop and has saved itself; the message says how to go on."""


@contextmanager
def no_stop_requests() -> Iterator[Callable[[], str | None]]:
    """Signals do what they did before."""
    yield lambda: None


@contextmanager
def stop_on_signals() -> Iterator[Callable[[], str | None]]:
    """The first SIGTERM or SIGINT is a request to stop, the second is a KeyboardInterrupt.

    For the main thread of a program; the handlers that were there before are put back.
    """
    received: list[str] = []

    def handle(number: int, _frame: FrameType | None) -> None:
        received.append(signal.Signals(number).name)
        if len(received) > 1:
            raise KeyboardInterrupt
        # to the descriptor: a handler may have interrupted a write to the stream
        with suppress(OSError):
            os.write(2, b"\ntarflowlm: saving after this step; a second signal leaves at once\n")

    before = {number: signal.signal(number, handle) for number in SIGNALS}
    try:
        yield lambda: received[0] if received else None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
