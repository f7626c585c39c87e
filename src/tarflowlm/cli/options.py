"""The options that commands share, and what reads options and the files that they name.

No torch here.
"""

import contextlib
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cache, partial, wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args, get_origin

import tyro
from tyro.constructors import (
    ConstructorRegistry,
    PrimitiveConstructorSpec,
    PrimitiveTypeInfo,
    StructConstructorSpec,
    StructTypeInfo,
)

from tarflowlm import schema
from tarflowlm.config import DeviceName
from tarflowlm.errors import UserError, is_first_process
from tarflowlm.model_config import COUPLINGS, BlockConfig
from tarflowlm.options import Integer, Out, Unwrap, arg, flag
from tarflowlm.registry import Registry
from tarflowlm.runs.hub import check_model

if TYPE_CHECKING:
    import torch

    from tarflowlm.runs.checkpoint import Checkpoint


def parse(args: type, argv: list[str], prog: str, **settings: Any) -> Any:
    """An instance of the dataclass `args`; `settings` are further arguments of `tyro.cli`.

    Values are checked by the dataclass and those inside it, whose UserErrors pass through. For
    options that it does not know, or that lack a value, tyro prints a box and exits with status 2.
    """
    markers = (tyro.conf.AvoidSubcommands, tyro.conf.FlagCreatePairsOff, tyro.conf.DisallowNone)
    settings = {"config": markers} | settings
    try:
        return tyro.cli(args, args=argv, prog=prog, registry=READING, **settings)
    except _Refused as refused:
        error = refused.error
        if isinstance(error, schema.WrongType):
            name = error.name.removeprefix("--").replace("_", "-")
            typed = [word.partition("=")[0] for word in argv]
            # a part of a configuration does not know its place
            option = next((word for word in typed if word.endswith(f".{name}")), f"--{name}")
            error = UserError(f"{option} {error.value!r:.40}: {error.remedy}; see {prog} --help")
        raise error from None


class _Refused(Exception):
    """Carries a UserError through tyro, which would print a ValueError in a box."""

    def __init__(self, error: UserError) -> None:
        self.error = error


READING = ConstructorRegistry()
"""How tyro reads options."""
OWN = object()
"""Marks a dataclass that `READING` has seen."""


@READING.primitive_rule
def _value(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | None:
    """A number or a choice. What is none stays a word, so that its dataclass refuses it by name."""
    kind = info.type
    choices = get_args(kind) if get_origin(kind) is Literal else ()
    if kind is bool:
        choices = (True, False)
    if not choices and kind not in (int, float):
        return None

    def read(words: list[str]) -> object:
        word = words[0]
        if choices:
            return next((one for one in choices if str(one) == word), word)
        try:
            return kind(word)
        except ValueError:
            return word

    names = ",".join(map(str, choices))
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar=f"{{{names}}}" if choices else kind.__name__.upper(),
        instance_from_str=read,
        is_instance=lambda value: value in choices or isinstance(value, (int, float)),
        str_from_instance=lambda value: [str(value)],
    )


@READING.primitive_rule
def _pair(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | None:
    """Two texts; also one alone, which its dataclass refuses by name."""
    if info.type != tuple[str, str]:
        return None
    return PrimitiveConstructorSpec(
        nargs=(1, 2),
        metavar="STR STR",
        instance_from_str=tuple,
        is_instance=lambda value: isinstance(value, tuple),
        str_from_instance=list,
    )


@READING.struct_rule
def _fields(info: StructTypeInfo) -> StructConstructorSpec | None:
    """A dataclass as tyro reads it, but for its errors, and its help, which is in one line."""
    cls: Any = info.type
    if not isinstance(cls, type) or not issubclass(cls, schema.Checked) or OWN in info.markers:
        return None

    @wraps(cls, updated=())  # for its docstring
    def make(**values: object) -> object:
        values.pop(BlockConfig.KEY, None)  # it has chosen the class
        try:
            return cls(**values)
        except UserError as error:
            raise _Refused(error) from None

    # without this rule
    spec = ConstructorRegistry.get_struct_spec(replace(info, markers=(*info.markers, OWN)))
    assert isinstance(spec, StructConstructorSpec)
    options = [
        replace(one, helptext=partial(_help, cls, one.name), type=_choices(cls, one.name, one.type))
        for one in spec.fields
    ]
    if issubclass(cls, BlockConfig):
        # `train` reads it before, for it brings options; here it is shown
        names: Any = Literal[tuple(COUPLINGS)]
        text = "Another coupling, with its own options; or your own, by its name (--import MODULE)."
        first = replace(options[0], name=cls.KEY, type=names, default=cls.coupling, helptext=text)
        options.insert(0, first)
    return StructConstructorSpec(make, tuple(options))


def _choices(cls: type, name: str, kind: Any) -> Any:
    """The type of a field; of a name in a registry, all names that it has by now."""
    notes = get_args(schema.hints_of(cls).get(name))[1:]
    found = next((one for one in notes if isinstance(one, Registry)), None)
    return kind if found is None else Literal[tuple(found)]


def _help(cls: type, name: str) -> str | None:
    """The docstring of a field of a dataclass, in one line."""
    owner = next(one for one in cls.__mro__ if name in vars(one).get("__annotations__", {}))
    return _docstrings(owner).get(name)


@cache
def _docstrings(cls: type) -> dict[str, str]:
    """The docstrings of the fields that a class adds to its bases."""
    from docstring_parser import parse_from_object

    with contextlib.suppress(OSError, TypeError):  # a notebook has no file
        params = parse_from_object(cls).params
        return {one.arg_name: " ".join((one.description or "").split()) for one in params}
    return {}


@dataclass(frozen=True, kw_only=True)
class Checked(schema.Checked):
    """The base of arguments of commands, whose messages name options as a user types them.

    The models and files that they name are checked here, before torch is imported.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        given = {name: value for name, value in vars(self).items() if value is not None}
        for name in {"directory", "baseline", "parent"} & given.keys():
            check_model(given[name])
        for name in {"file", "prompts", "texts"} & given.keys():
            if given[name] != "-" and not Path(given[name]).exists():
                raise UserError(f"cannot read {given[name]}: there is no such file")
        new = given.get("out") if "directory" in vars(self) else None
        # other processes may start after the first one has made it
        if new is not None and new.exists() and is_first_process():
            raise UserError(f"{new} exists already: choose another --out")

    def label(self, name: str, section: str) -> str:
        """The option of a field, also of one in a configuration or request."""
        return flag(name.rpartition(".")[2])


@dataclass(frozen=True, kw_only=True)
class Json(Checked):
    """A command with a result."""

    json: Annotated[bool, arg()] = False
    """Print one JSON object as the last line."""


@dataclass(frozen=True, kw_only=True)
class OnDevice(Checked):
    """A command that computes."""

    device: Annotated[DeviceName, arg()] = "auto"
    """auto picks cuda, then cpu."""


@dataclass(frozen=True, kw_only=True)
class OfModel(Json, OnDevice):
    """A command that uses a model."""

    directory: Annotated[tyro.conf.Positional[Path | None], arg("[MODEL]")] = None
    """Run directory, shipped model or hf:OWNER/NAME; `tarflowlm info` lists models and the
    default.
    """


@dataclass(frozen=True, kw_only=True)
class OfNamedModel(Json):
    """A command on a model without a default."""

    directory: Annotated[tyro.conf.Positional[Path], arg("MODEL")]
    """Run directory, shipped model or hf:OWNER/NAME."""


@dataclass(frozen=True, kw_only=True)
class Copying(OfNamedModel):
    """A command that copies a model."""

    half: Annotated[bool, arg()] = False
    """Store weight matrices in bfloat16, which halves the size."""


@dataclass(frozen=True, kw_only=True)
class Training(Json, OnDevice):
    """A command that begins a run."""

    out: Out = None
    """Run directory: a new one, or the same run's, which continues. Required."""
    data: Annotated[str | None, arg("SOURCE")] = None
    """Corpus name, text file, or directory made by `tarflowlm data`."""
    unwrap: Unwrap = False
    minutes: Annotated[schema.Positive | None, arg("FLOAT")] = None
    """Time of the whole run, including evaluation and saving; stages keep their shares of it."""
    steps: Integer = None
    """Optimiser steps in total, instead; stages keep their proportions."""

    def rules(self) -> Iterator[tuple[str, str]]:
        if self.minutes is not None and self.steps is not None:
            yield "steps", "leave it or --minutes out"


def load_checkpoint(directory: Path | None, device: "DeviceName | torch.device") -> "Checkpoint":
    """The model in a directory, among the shipped ones or on the hub; without one the default."""
    from tarflowlm.device import pick_device
    from tarflowlm.runs.checkpoint import load_checkpoint
    from tarflowlm.runs.hub import DEFAULT, FOLDER

    return load_checkpoint(directory or FOLDER / DEFAULT, pick_device(device))


def read_lines(source: str) -> list[tuple[int, str]]:
    """The lines of `read_source` that are not empty, with their numbers."""
    lines = enumerate(read_source(source).split("\n"), 1)
    return [(number, line.removesuffix("\r")) for number, line in lines if line.strip()]


def check_lines(
    lines: Iterable[tuple[int, str]], source: str, check: Callable[[str], object]
) -> tuple[str, ...]:
    """The texts of `read_lines`. UserError, which names the line, for one that `check` refuses."""
    texts = []
    for number, text in lines:
        try:
            check(text)
        except UserError as error:
            error.args = (f"line {number} of {source}: {error}",)
            raise
        texts.append(text)
    return tuple(texts)


def read_source(source: str) -> str:
    """The text of a file, or of standard input for "-"."""
    if source != "-":
        from tarflowlm.data import read_text

        return read_text(source)
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise UserError("standard input serves one process: under torchrun give a file")
    if sys.stdin is None:
        raise UserError("standard input is closed: give the text as an option, or in a file")
    try:
        return sys.stdin.buffer.read().decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        what = f"standard input is not UTF-8 text ({error.reason})"
        raise UserError(f"{what}: convert it to UTF-8") from None
