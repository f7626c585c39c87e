"""The options that requests and commands share, and functions that take them. No torch here."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import (
    Annotated,
    Any,
    Concatenate,
    Literal,
    ParamSpec,
    TypeVar,
    get_type_hints,
    overload,
)

import tyro

from tarflowlm.errors import unknown
from tarflowlm.schema import Checked, Count, Seed

P = ParamSpec("P")
Q = TypeVar("Q")
R = TypeVar("R")
S = TypeVar("S")


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
Integer = Annotated[Count | None, arg("INT")]
Number = Annotated[float | None, arg("FLOAT")]
Normalize = Annotated[Literal["text8"] | None, arg("text8", constructor=Literal["text8"])]
Flag = Annotated[bool, arg()]
Unwrap = Annotated[bool, arg(help="Join the lines of every paragraph of your own text.")]


@dataclass(frozen=True, kw_only=True)
class Seeded(Checked):
    """The option `seed`."""

    seed: Seed = 0
    """The same seed gives the same result."""


@dataclass(frozen=True, kw_only=True)
class Normalized(Checked):
    """The option `normalize`."""

    normalize: Normalize = None
    """Normalise the text first, whatever the model's training text was."""


NAMES = {"stop_at_end": "no-stop"}
"""Fields of requests whose options have other names. Messages use these names, too."""


def flag(field: str) -> str:
    """The option of a field."""
    return f"--{NAMES.get(field, field)}".replace("_", "-")


@overload
def takes(
    make: Callable[P, Q],
) -> Callable[[Callable[[S, Q], R]], Callable[Concatenate[S, P], R]]: ...


@overload
def takes(make: Callable[..., object], *, made: Literal[False]) -> Callable[[R], R]: ...


def takes(make: Callable[..., Any], *, made: bool = True) -> Callable[..., Any]:
    """Let the last parameter of a function be the fields of a request, which `make` makes of them.

    With `made` False the function gets them as they are, as `**options`. A parameter of both stays
    the function's own, and takes the place of the positional one of `make`. `help` shows the fields
    and UserError names an unknown one; mypy checks them where the request is made.
    """
    known = inspect.signature(make).parameters
    hints = get_type_hints(make)

    def decorate(function: Callable[..., object]) -> Callable[..., object]:
        own = inspect.signature(function)
        *first, _last = own.parameters.values()
        shared = known.keys() & own.parameters.keys()
        others = [
            one.replace(annotation=hints[name])
            for name, one in known.items()
            if name not in shared and (one.kind is one.KEYWORD_ONLY or not shared)
        ]
        shown = own.replace(parameters=sorted([*first, *others], key=lambda one: one.kind))

        @wraps(function)
        def called(*args: Any, **options: Any) -> object:
            for name in options:
                if name not in shown.parameters:
                    raise unknown("option", name, [one for one in known if one in shown.parameters])
            if not made:
                return function(*args, **options)
            return function(*args[: len(first)], make(*args[len(first) :], **options))

        called.__signature__ = shown  # type: ignore[attr-defined]
        return called

    return decorate
