"""Arguments from the command line, through tyro; whatever does not parse becomes one line."""

import contextlib
import io
import re
from typing import Any, TypeVar

import tyro

from tarflowlm.errors import UserError

T = TypeVar("T")


def parse(cls: type[T], argv: list[str], prog: str, *, default: T | None = None, description: str | None = None) -> T:
    """`cls` from the command line; UserError with one line if it does not parse.

    `description` heads the help page in place of the docstring of `cls`.
    """
    args, rest = parse_known(cls, argv, prog, default=default, description=description, others=False)
    assert not rest
    return args


def parse_known(
    cls: type[T],
    argv: list[str],
    prog: str,
    *,
    default: T | None = None,
    description: str | None = None,
    others: bool = True,
) -> tuple[T, list[str]]:
    """As `parse`, with the words that `cls` has no place for; without `others` they are errors."""
    # tyro reports errors only as a box on stderr: `console_outputs=False` leaves nothing but the exit status, and the
    # hook for structured events (`tyro._errors`) is private and missing from most versions that we accept.
    # `tyro.extras.SubcommandApp` reports no better and would import every command to build its parser.
    box = io.StringIO()
    try:
        with contextlib.redirect_stderr(box):
            found: Any = tyro.cli(  # type: ignore[call-overload]
                cls,
                args=argv,
                prog=prog,
                description=description,
                default=tyro.MISSING_NONPROP if default is None else default,
                return_unknown_args=others,
                config=(tyro.conf.FlagCreatePairsOff, tyro.conf.AvoidSubcommands),
            )
    except SystemExit as stop:
        if not stop.code:
            raise
        raise UserError(_one_line(box.getvalue(), cls.__name__, prog)) from None
    return found if others else (found, [])


def _one_line(box: str, cls: str, prog: str) -> str:
    """tyro's message without frame, title, help text, and the name of the class that refused its fields."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", box)
    text = re.sub(r"^\s*╭.*", "", text)
    # where stdout is not UTF-8, the frame is a title and lines of dashes
    text = re.sub(r"\A[^\n]*\n\s*-{9,}", "", text)
    text = re.sub(r"-{9,}", " ", text)
    text = re.sub(r"Argument helptext:.*", "", text, flags=re.DOTALL)
    text = re.sub(r"[╭╮╰╯│─]+", " ", text)
    text = re.sub(r"For full helptext.*", "", text, flags=re.DOTALL)
    text = " ".join(text.split()).removeprefix(f"Error parsing {cls}: ")
    return f"{text or 'the arguments do not parse'}; see `{prog} --help`"
