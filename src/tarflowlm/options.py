"""The options that requests and commands share. No torch here."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from tarflowlm import schema


def arg(
    metavar: str | None = None,
    help: str | None = None,
    *,
    name: str | None = None,
    constructor: Any = None,
) -> Any:
    """An option of tyro whose help page leaves out defaults that say nothing.

    A `constructor`, a type, reads its value if it is given.
    """

    def hint(default: str) -> str:
        shown = default.strip("[()]'")
        return "" if shown in ("None", "False", "True", "") else f"(default: {shown})"

    return tyro.conf.arg(
        metavar=metavar,
        help=help,
        name=name,
        constructor=constructor,
        help_behavior_hint=hint,
    )


Text = Annotated[str | None, arg("TEXT")]
File = Annotated[str | None, arg("FILE")]
Out = Annotated[Path | None, arg("PATH")]
Count = Annotated[schema.Count | None, arg("INT")]
Number = Annotated[float | None, arg("FLOAT")]
Flag = Annotated[bool, arg()]
Unwrap = Annotated[bool, arg(help="Join the lines of every paragraph of your own text.")]


@dataclass(frozen=True, kw_only=True)
class Seeded(schema.Checked):
    """The option `seed`."""

    seed: schema.Seed = 0
    """The same seed gives the same result."""


@dataclass(frozen=True, kw_only=True)
class Normalized(schema.Checked):
    """The option `normalize`."""

    normalize: Annotated[Literal["text8"] | None, arg("text8")] = None
    """Normalise the text first, whatever the model's training text was."""


NAMES = {"num_tokens": "length", "stop_at_end": "no-stop"}
"""Fields of requests whose options have other names. Messages use these names, too."""


def flag(field: str) -> str:
    """The option of a field."""
    return f"--{NAMES.get(field, field)}".replace("_", "-")
