"""What ends a command early, other than a bug."""


class UserError(ValueError):
    """A wrong value from the user: one line that names the value and the remedy.

    The command line prints the message without a traceback and exits with status 2. Library callers may catch
    it as a `ValueError`. Violations of our own invariants are `AssertionError`, never this.
    """


class Stopped(Exception):
    """A run was asked to stop and has saved itself; the message says how to continue."""
