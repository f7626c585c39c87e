"""What SIGINT and SIGTERM do while torch is imported, and while a run is trained."""

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

INTERRUPTED = 130
"""Exit status: 128 plus the number of SIGINT."""


@contextmanager
def exit_on_interrupt() -> Iterator[None]:
    """While torch is imported, which takes seconds, Ctrl-C ends the process with one line.

    An exception would pass through half-imported modules, some of which print tracebacks of their own.
    """
    # it may be ignored or somebody else's, and only the main thread may set it
    ours = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    ours = ours and threading.current_thread() is threading.main_thread()
    if ours:
        signal.signal(signal.SIGINT, _exit)
    try:
        yield
    finally:
        if ours:
            signal.signal(signal.SIGINT, signal.default_int_handler)


def _exit(signum: int, frame: FrameType | None) -> None:
    sys.stderr.write("tarflowlm: interrupted\n")
    sys.stderr.flush()
    os._exit(INTERRUPTED)


@contextmanager
def interrupt_on_termination() -> Iterator[None]:
    """SIGTERM raises KeyboardInterrupt, as SIGINT does; for the main thread of a program."""

    def handle(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def stop_on_signals() -> Iterator[Callable[[], str | None]]:
    """The first SIGTERM or SIGINT asks the run to stop at the next step boundary, with everything saved; the second
    raises KeyboardInterrupt.

    For the main thread of a program; the previous handlers are restored afterwards.
    """
    received: list[str] = []

    def handle(number: int, _frame: FrameType | None) -> None:
        received.append(signal.Signals(number).name)
        if len(received) > 1:
            raise KeyboardInterrupt
        # to the descriptor, as the signal may have interrupted a write to the stream
        with suppress(OSError):
            os.write(2, b"\ntarflowlm: saving after this step; a second signal exits immediately\n")

    before = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield lambda: received[0] if received else None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
