"""Arguments from the command line, through tyro; whatever does not parse becomes one line."""

import contextlib
import io
import re
from dataclasses import replace
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, TypeVar, Union, get_args, get_origin

import tyro
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from tarflowlm.errors import UserError

T = TypeVar("T")


def parse(
    cls: type[T],
    argv: list[str],
    prog: str,
    *,
    default: T | None = None,
    description: str | None = None,
    has_pairs: bool = False,
) -> T:
    """`cls` from the command line; UserError with one line if it does not parse.

    `description` heads the help page in place of the docstring of `cls`. `has_pairs`: every flag --x has its --no-x,
    for arguments of which some are true by default.
    """
    args, rest = parse_known(
        cls, argv, prog, default=default, description=description, has_pairs=has_pairs, others=False
    )
    assert not rest
    return args


def parse_known(
    cls: type[T],
    argv: list[str],
    prog: str,
    *,
    default: T | None = None,
    description: str | None = None,
    has_pairs: bool = False,
    others: bool = True,
) -> tuple[T, list[str]]:
    """As `parse`, with the words that `cls` has no place for; without `others` they are errors."""
    # tyro reports errors only as a box on stderr: `console_outputs=False` leaves nothing but the exit status, and the
    # hook for structured events (`tyro._errors`) is private and missing from most versions that we accept.
    # `tyro.extras.SubcommandApp` reports no better and would import every command to build its parser.
    box = io.StringIO()
    marks = (tyro.conf.AvoidSubcommands,) if has_pairs else (tyro.conf.AvoidSubcommands, tyro.conf.FlagCreatePairsOff)
    registry = ConstructorRegistry()
    registry.primitive_rule(_path)
    registry.primitive_rule(_optional)
    try:
        with contextlib.redirect_stderr(box), registry:
            found: Any = tyro.cli(  # type: ignore[call-overload]
                cls,
                args=argv,
                prog=prog,
                description=description,
                default=tyro.MISSING_NONPROP if default is None else default,
                return_unknown_args=others,
                config=marks,
            )
    except SystemExit as stop:
        if not stop.code:
            raise
        raise UserError(_one_line(box.getvalue(), prog)) from None
    return found if others else (found, [])


def _path(info: PrimitiveTypeInfo) -> Any:
    """How tyro reads a path: by itself it takes no name at all for the current folder."""

    def named(words: list[str]) -> Path:
        if not words[0]:
            raise ValueError("the name is empty: give one")
        return Path(words[0])

    if info.type is not Path:
        return None
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar="PATH",
        instance_from_str=named,
        is_instance=lambda value: isinstance(value, Path),
        str_from_instance=lambda value: [str(value)],
    )


def _optional(info: PrimitiveTypeInfo) -> Any:
    """How tyro reads `X | None`: as X, or the word None where that is no text.

    By itself it says {None}|X on help pages, and its errors list what is wrong with either type.
    """
    inner = [part for part in get_args(info.type) if part is not NoneType]
    if get_origin(info.type) not in (Union, UnionType) or len(inner) != 1 or NoneType not in get_args(info.type):
        return None
    spec = ConstructorRegistry.get_primitive_spec(PrimitiveTypeInfo.make(inner[0], info.markers))
    if not isinstance(spec, PrimitiveConstructorSpec) or not isinstance(spec.nargs, int):
        return None
    none = [] if inner[0] in (str, Path) else ["None"]
    return replace(
        spec,
        instance_from_str=lambda words: None if words == none else spec.instance_from_str(words),
        is_instance=lambda value: value is None or spec.is_instance(value),
        str_from_instance=lambda value: ["None"] if value is None else spec.str_from_instance(value),
        choices=None if spec.choices is None else ("None", *spec.choices),
    )


def _one_line(box: str, prog: str) -> str:
    """tyro's message without frame, title, help text, and the name of what refused its fields."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", box)
    text = re.sub(r"^\s*╭.*", "", text)
    # where stdout is not UTF-8, the frame is a title and lines of dashes
    text = re.sub(r"\A[^\n]*\n\s*-{9,}", "", text)
    text = re.sub(r"-{9,}", " ", text)
    text = re.sub(r"Argument helptext:.*", "", text, flags=re.DOTALL)
    text = re.sub(r"[╭╮╰╯│─]+", " ", text)
    text = re.sub(r"For full helptext.*", "", text, flags=re.DOTALL)
    text = re.sub(r"\[/?bold\]", "", text).replace("Expected 1 values", "Expected 1 value")
    text = re.sub(r"^Error parsing [\w.]+: ", "", " ".join(text.split()))
    text = re.sub(r"invalid literal for int\(\) with base 10: ('.*'|\".*\")", r"\1 is not a whole number", text)
    text = re.sub(r"could not convert string to float: ('.*'|\".*\")", r"\1 is not a number", text)
    return f"{text or 'the arguments do not parse'}; see `{prog} --help`"
