"""Leaving a run by SIGTERM or SIGINT: at the next step boundary, with everything saved."""

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT)


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
