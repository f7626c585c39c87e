"""Arguments from the command line, through tyro."""

import contextlib
import io
import sys
from itertools import pairwise
from typing import Any

import tyro

from tarflowlm.config import OLD_DECODERS
from tarflowlm.errors import UserError


def parse(args: type, argv: list[str], prog: str, *, description: str | None = None, **options: Any) -> Any:
    """An instance of the dataclass `args`; `options` and the help pages as in `tyro.cli`.

    Where an option is misspelt tyro prints its box and exits with status 2. A UserError of the dataclass itself, or
    of one inside it, passes through. The names that decoders had in earlier versions are still read.
    """
    markers = (tyro.conf.AvoidSubcommands, tyro.conf.FlagCreatePairsOff, tyro.conf.DisallowNone)
    options = {"config": markers} | options
    argv = [OLD_DECODERS.get(word, word) if before == "--decoder" else word for before, word in pairwise(["", *argv])]
    box = io.StringIO()
    try:
        with contextlib.redirect_stderr(box):
            return tyro.cli(args, args=argv, prog=prog, description=description, **options)
    except SystemExit as stop:
        error = stop.__context__
        while error is not None and not isinstance(error, UserError):
            error = error.__context__
        if error is not None:
            raise error from None
        sys.stderr.write(box.getvalue())
        raise
