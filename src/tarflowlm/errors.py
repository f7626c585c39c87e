"""The one exception for what a user got wrong."""


class UserError(ValueError):
    """A wrong value from the user: one line that names the value and the remedy.

    The command line prints the message without a traceback and exits with status 2. Library callers may catch
    it as a `ValueError`. Violations of our own invariants are `AssertionError`, never this.
    """
