"""Effects of SIGINT, SIGTERM and SIGHUP while modules are imported and while a run trains."""

import contextlib
import errno
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType

INTERRUPTED = 130
"""Exit status: 128 plus the number of SIGINT."""

Handler = Callable[[int, FrameType | None], object] | signal.Handlers


@contextlib.contextmanager
def handled(handlers: dict[signal.Signals, Handler]) -> Iterator[None]:
    """Handlers of signals within the context, for the main thread of a program."""
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def of_hang_up(handler: Handler) -> dict[signal.Signals, Handler]:
    """A handler of SIGHUP, by which a closed terminal ends its programs.

    None where the system has no such signal, or where it is ignored, as under `nohup`.
    """
    number: signal.Signals | None = getattr(signal, "SIGHUP", None)
    if number is None or signal.getsignal(number) is signal.SIG_IGN:
        return {}
    return {number: handler}


def _leave_closed_terminal() -> None:
    """Write to nowhere in the place of a terminal that has gone, where every line is an error."""
    for number in (1, 2):
        try:
            os.write(number, b"")
        except OSError as error:
            if error.errno != errno.EIO:
                continue
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, number)
            os.close(nowhere)


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
    """The first SIGTERM, SIGINT or SIGHUP asks a run to stop at the next step, all saved.

    The second raises KeyboardInterrupt. Yields a function that returns the name of the signal, or
    None.
    """
    received: list[str] = []

    def handle(number: int, _frame: object) -> None:
        name = signal.Signals(number).name
        if name == "SIGHUP":
            _leave_closed_terminal()
            if received:
                return  # the shell repeats that of its terminal
        received.append(name)
        if len(received) > 1:
            raise KeyboardInterrupt
        # to the descriptor, as the signal may have interrupted a write to the stream
        with contextlib.suppress(OSError):
            os.write(2, b"\ntarflowlm: saving after this step; a second signal exits immediately\n")

    with handled({signal.SIGTERM: handle, signal.SIGINT: handle} | of_hang_up(handle)):
        yield lambda: received[0] if received else None
