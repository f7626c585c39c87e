"""The options that requests and commands share, and functions that take them. No torch here."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, Concatenate, Literal, ParamSpec, TypeVar, cast, get_type_hints

import tyro

from tarflowlm import schema
from tarflowlm.errors import unknown

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
Count = Annotated[schema.Count | None, arg("INT")]
Number = Annotated[float | None, arg("FLOAT")]
Normalize = Annotated[Literal["text8"] | None, arg("text8", constructor=Literal["text8"])]
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

    normalize: Normalize = None
    """Normalise the text first, whatever the model's training text was."""


NAMES = {"num_tokens": "length", "stop_at_end": "no-stop"}
"""Fields of requests whose options have other names. Messages use these names, too."""


def flag(field: str) -> str:
    """The option of a field."""
    return f"--{NAMES.get(field, field)}".replace("_", "-")


def takes(
    make: Callable[P, Q],
) -> Callable[[Callable[[S, Q], R]], Callable[Concatenate[S, P], R]]:
    """Turn a method that takes a request into one that takes the fields of the request.

    `help` shows them, mypy checks them, and UserError names an unknown one.
    """

    def decorate(method: Callable[[S, Q], R]) -> Callable[Concatenate[S, P], R]:
        @options_of(make)
        @wraps(method)
        def called(self: S, *args: P.args, **options: P.kwargs) -> R:
            return method(self, make(*args, **options))

        return cast(Callable[Concatenate[S, P], R], called)

    return decorate


def options_of(make: Callable[..., object]) -> Callable[[R], R]:
    """Let the last parameter of a function, its options, be the parameters of `make`.

    Those that the function has itself stay its own; if there are any, they replace the positional
    one of `make`. `help` shows the options. UserError for other ones.
    """

    def decorate(function: R) -> R:
        act = cast(Callable[..., object], function)
        own = inspect.signature(act)
        first = dict(list(own.parameters.items())[:-1])
        known = inspect.signature(make).parameters
        hints = get_type_hints(make)
        others = [
            one.replace(annotation=hints.get(name, one.annotation))
            for name, one in known.items()
            if name not in first and (one.kind is one.KEYWORD_ONLY or not known.keys() & first)
        ]
        shown = inspect.Signature(
            sorted([*first.values(), *others], key=lambda one: one.kind),
            return_annotation=own.return_annotation,
        )

        @wraps(act)
        def called(*args: object, **options: object) -> object:
            for name in options:
                if name not in shown.parameters:
                    raise unknown("option", name, [one for one in known if one in shown.parameters])
            return act(*args, **options)

        called.__signature__ = shown  # type: ignore[attr-defined]
        return cast(R, called)

    return decorate
