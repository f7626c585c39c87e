"""Exceptions that end a command early without being a bug, and quoting an error in one line."""


class UserError(ValueError):
    """An error that the user can fix. The message is one line that names the wrong value and the remedy.

    The command line prints it without a traceback and exits with status 2. Library callers may catch it as a
    `ValueError`. Violated invariants of this package raise `AssertionError` instead.
    """


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or the name of its type if the message is empty."""
    return (str(error).splitlines() or [type(error).__name__])[0]


class Stopped(Exception):
    """A run was asked to stop and has saved its state; the message says how to resume it."""
