"""The options that commands share, and what reads options and the files that they name.

No torch here.
"""

import ast
import contextlib
import inspect
import io
import itertools
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from tarflowlm import schema
from tarflowlm.config import DeviceName
from tarflowlm.errors import UserError, is_first_process
from tarflowlm.options import Integer, Out, Unwrap, arg, flag
from tarflowlm.runs.hub import check_model

if TYPE_CHECKING:
    import torch

    from tarflowlm.runs.checkpoint import Checkpoint


def parse(args: type, argv: list[str], prog: str, **settings: Any) -> Any:
    """An instance of the dataclass `args`; `settings` are further arguments of `tyro.cli`.

    For words that do not parse tyro prints a box and exits with status 2; its message about a wrong
    value becomes a UserError. A UserError of the dataclass, or of one inside it, passes through.
    """
    markers = (tyro.conf.AvoidSubcommands, tyro.conf.FlagCreatePairsOff, tyro.conf.DisallowNone)
    settings = {"config": markers} | settings
    if {"-h", "--help"}.intersection(argv):
        _join_lines()
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
        title, _, body = box.getvalue().partition("\n")
        if "Value error" in title or "Invalid choice" in title:
            lines = [line.strip("│─| ") for line in body.splitlines()]
            # between its first rules, which may be ASCII
            lines = ["" if set(line) <= {"-"} else line for line in lines]
            said = "\n".join(lines).strip().partition("\n\n")[0].replace("\n", " ").rstrip(".")
            raise UserError(f"{_plainly(said)}; see {prog} --help") from None
        sys.stderr.write(box.getvalue())
        raise


def _join_lines() -> None:
    """Give tyro the docstrings of fields in one line each, as it would keep their line ends."""
    classes = [schema.Checked]
    for cls in classes:
        classes += cls.__subclasses__()
    for module in {sys.modules[cls.__module__] for cls in classes}:
        parts: list[ast.stmt] = []
        with contextlib.suppress(OSError, TypeError):  # a notebook has no file
            parts = ast.parse(inspect.getsource(module)).body
        for part in parts:
            kind = getattr(module, getattr(part, "name", ""), None)
            fields = getattr(kind, "__dataclass_fields__", {})
            for one, text in itertools.pairwise(getattr(part, "body", ())):
                match one, text:
                    case (
                        ast.AnnAssign(target=ast.Name(id=name)),
                        ast.Expr(value=ast.Constant(value=str(said))),
                    ) if name in fields:
                        fields[name].metadata = MappingProxyType({"help": " ".join(said.split())})


_WANTED = {
    "INT": "a whole number",
    "int()": "a whole number",
    "FLOAT": "a number",
    "to float": "a number",
    "STR STR": "two texts",
}
"""A type in the words of tyro or Python, for a value that does not parse -> the value to give."""


def _plainly(said: str) -> str:
    """A message of tyro about a wrong value, in plain words if it is a known one."""
    found = re.search(r"Error parsing (\S+): (.*)", said)
    if found is not None:
        option, reason = found.groups()
        given = " ".join(re.findall(r"'([^']*)'", reason))
        for name, wanted in _WANTED.items():
            if name in reason:
                return f"{option} {given}: give {wanted}"
    return said


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
