"""What ends a command early, other than a bug, and how an error is quoted in one line."""


class UserError(ValueError):
    """A wrong value from the user: one line that names the value and the remedy.

    The command line prints the message without a traceback and exits with status 2. Library callers may catch
    it as a `ValueError`. Violations of our own invariants are `AssertionError`, never this.
    """


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type if it has none: to be quoted in a one-line message."""
    return (str(error).splitlines() or [type(error).__name__])[0]


class Stopped(Exception):
    """A run was asked to stop and has saved itself; the message says how to continue."""
