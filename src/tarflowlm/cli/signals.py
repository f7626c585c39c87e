"""Effects of SIGINT and SIGTERM while modules are imported, while a run trains, and elsewhere."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType

INTERRUPTED = 130
"""Exit status: 128 plus the number of SIGINT."""


@contextlib.contextmanager
def handled(
    handlers: dict[signal.Signals, Callable[[int, FrameType | None], object]],
) -> Iterator[None]:
    """Handlers of signals within the context, for the main thread of a program."""
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def exit_on_interrupt() -> contextlib.AbstractContextManager[None]:
    """While modules are imported, Ctrl-C ends the process with one line.

    Some half-imported modules would print tracebacks of their own.
    """

    def end(*_: object) -> None:
        sys.stderr.write("tarflowlm: interrupted\n")
        sys.stderr.flush()
        os._exit(INTERRUPTED)

    # SIGINT may be ignored or handled by another program, and only the main thread may handle it
    is_default = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    is_main = threading.current_thread() is threading.main_thread()
    return handled({signal.SIGINT: end} if is_default and is_main else {})


@contextlib.contextmanager
def stop_on_signals() -> Iterator[Callable[[], str | None]]:
    """The first SIGTERM or SIGINT asks a run to stop at the next step, with everything saved.

    The second raises KeyboardInterrupt. Yields a function that returns the name of the signal, or
    None.
    """
    received: list[str] = []

    def handle(number: int, _frame: object) -> None:
        received.append(signal.Signals(number).name)
        if len(received) > 1:
            raise KeyboardInterrupt
        # to the descriptor, as the signal may have interrupted a write to the stream
        with contextlib.suppress(OSError):
            os.write(2, b"\ntarflowlm: saving after this step; a second signal exits immediately\n")

    with handled({signal.SIGTERM: handle, signal.SIGINT: handle}):
        yield lambda: received[0] if received else None
