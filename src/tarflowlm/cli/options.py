"""Options: their parser, types that several commands share, and the model and texts that they name.
No torch here.
"""

import contextlib
import io
import itertools
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from tarflowlm.config import DeviceName
from tarflowlm.errors import UserError

if TYPE_CHECKING:
    from tarflowlm.runs.checkpoint import Checkpoint
else:
    Checkpoint = object


Rules = Mapping[str, Sequence[str]]
"""Options that belong to an option, by its name."""
NO_RULES: Rules = {}


def arg(metavar: str | None = None, help: str | None = None) -> Any:
    """An option of tyro whose help page leaves out defaults that say nothing."""
    return tyro.conf.arg(
        metavar=metavar,
        help=help,
        help_behavior_hint=lambda default: (
            "" if default in ("None", "False", "") else f"(default: {default})"
        ),
    )


Text = Annotated[str | None, arg("TEXT")]
File = Annotated[str | None, arg("FILE")]
Out = Annotated[Path | None, arg("PATH")]
Count = Annotated[int | None, arg("INT")]
Number = Annotated[float | None, arg("FLOAT")]
Flag = Annotated[bool, arg()]

Model = Annotated[
    tyro.conf.Positional[Path | None],
    arg(
        "[MODEL]",
        "Run directory, shipped model or hf:OWNER/NAME; "
        "`tarflowlm info` lists models and the default.",
    ),
]
Device = Annotated[DeviceName, arg(help="auto picks cuda, then mps, then cpu.")]
PrintJson = Annotated[bool, arg(help="Print one JSON object as the last line.")]
Normalize = Annotated[
    Literal["text8"] | None,
    arg("text8", "Normalise the text first, whatever the model's training text was."),
]

TEMPERATURE = (
    "raise the probabilities of tokens to the power 1 / temperature; "
    "1 samples from the model itself."
)
TOP_K = "keep the k most probable tokens."
TOP_P = "keep the smallest set of tokens that holds this probability."


def parse(args: type, argv: list[str], prog: str, **settings: Any) -> Any:
    """An instance of the dataclass `args`; `settings` are further arguments of `tyro.cli`. Where an
    option is misspelt tyro prints its box and exits with status 2. A UserError of the dataclass
    itself, or of one inside it, passes through.
    """
    markers = (tyro.conf.AvoidSubcommands, tyro.conf.FlagCreatePairsOff, tyro.conf.DisallowNone)
    settings = {"config": markers} | settings
    box = io.StringIO()
    try:
        with contextlib.redirect_stderr(box):
            return tyro.cli(args, args=argv, prog=prog, **settings)
    except SystemExit as stop:
        error = stop.__context__
        while error is not None and not isinstance(error, UserError):
            error = error.__context__
        if error is not None:
            raise error from None
        if (problem := _unparsable(box.getvalue(), argv)) is not None:
            raise UserError(f"{problem}; `{prog} --help` describes it") from None
        sys.stderr.write(box.getvalue())
        raise


KINDS = {"INT": "a whole number", "FLOAT": "a number"}


def _unparsable(box: str, argv: list[str]) -> str | None:
    """A line about an option whose value is of another type; None for other boxes of tyro."""
    found = re.search(r"Error parsing (--[\w.-]+)", box)
    if found is None or found[1] not in argv:
        return None
    option, *behind = argv[argv.index(found[1]) :]
    values = list(itertools.takewhile(lambda word: not word.startswith("--"), behind))
    metavar = re.search(rf"^\W*{option} ([A-Z. ]+?)\s*\W*$", box, re.MULTILINE)
    wanted = metavar[1] if metavar else "another value"
    return f"{' '.join([option, *values])}: give {KINDS.get(wanted, wanted)}"


def check(
    args: Any, counts: Sequence[str] = (), exclusive: Rules = NO_RULES, needed: Rules = NO_RULES
) -> None:
    """UserError for `counts` below 1, an option with one that it excludes, and one without any that
    it needs.
    """
    for name in counts:
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UserError(f"{name.replace('_', ' ')} {value}: must be at least 1")
    given = {field.name for field in fields(args) if getattr(args, field.name) != field.default}
    for one in sorted(given & {*exclusive}):
        if both := given.intersection(exclusive[one]):
            flag = one.replace("_", "-")
            raise UserError(f"--{flag} with --{min(both)}: leave one of them out")
    for one in sorted(given & {*needed}):
        if not given.intersection(needed[one]):
            flag, others = one.replace("_", "-"), " or --".join(needed[one])
            raise UserError(f"--{flag} has no effect without --{others}: leave it out, or add that")


def load_checkpoint(directory: Path | None, device: DeviceName) -> Checkpoint:
    """The model in a directory, among the shipped ones or on the hub; without one the default."""
    from tarflowlm.device import pick_device
    from tarflowlm.runs.checkpoint import load_checkpoint
    from tarflowlm.runs.hub import DEFAULT, FOLDER

    return load_checkpoint(directory or FOLDER / DEFAULT, pick_device(device))


def read_source(source: str) -> str:
    """The text of a file, or of standard input for "-"."""
    if source != "-":
        from tarflowlm.data import read_text

        return read_text(source)
    check_stdin()
    try:
        return sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise not_utf8(error) from None


def check_stdin() -> None:
    """UserError where standard input is closed."""
    if sys.stdin is None:
        raise UserError("standard input is closed: give the text as an option, or in a file")


def not_utf8(error: UnicodeDecodeError) -> UserError:
    """The error for standard input that is no text."""
    return UserError(f"standard input is not UTF-8 text ({error.reason}): convert it to UTF-8")
