"""Ctrl-C while the command line is still being imported, which takes seconds. Imports nothing that takes long."""

import os
import signal
import sys
from collections.abc import Callable
from types import FrameType

INTERRUPTED = 130
"""Exit status: 128 and the number of SIGINT."""


def one_line_on_interrupt() -> Callable[[], None]:
    """From now on Ctrl-C ends the process with one line; returns what puts the handler of before back.

    An exception would travel through half-imported modules, and what they print of it is no help.
    """
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        return lambda: None  # ignored, or someone else's
    try:
        signal.signal(signal.SIGINT, _leave)
    except ValueError:
        return lambda: None  # not the main thread, which alone may ask for it
    return _restore


def _restore() -> None:
    if signal.getsignal(signal.SIGINT) is _leave:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _leave(signum: int, frame: FrameType | None) -> None:
    sys.stderr.write("tarflowlm: interrupted\n")
    sys.stderr.flush()
    os._exit(INTERRUPTED)
