"""Messages to the user: errors in one line, and progress."""

import importlib.metadata
import importlib.util
import os
import re
import shlex
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches


class UserError(ValueError):
    """An error that the user can fix: one line that names the wrong value and the remedy.

    The command line prints it without a traceback and exits with status 2.
    """


def counted(number: int, unit: str, units: str = "") -> str:
    """1 sample, or 2 samples."""
    return f"{number:,} {unit if number == 1 else units or f'{unit}s'}"


def guess(value: str, known: Iterable[str]) -> str:
    """A question for the name among the `known` that is most like `value`, or ""."""
    names = {name.replace("_", "-"): name for name in known}
    close = get_close_matches(value.lower().replace("_", "-"), names, 1)
    return f"did you mean {names[close[0]]}? " if close else ""


def no_attribute(owner: str, name: str, known: Iterable[str]) -> AttributeError:
    """The error for an attribute that is not among the `known`, which it lists."""
    names = sorted(one for one in known if not one.startswith("_"))
    what = f"{owner} has no attribute {name!r}"
    return AttributeError(f"{what}: {guess(name, names)}it has {', '.join(names)}")


def unknown(kind: str, value: str, known: Iterable[str]) -> UserError:
    """The error for a name that is not among the `known`."""
    known = list(known)
    remedy = f"{guess(value, known)}choose one of {', '.join(known)}"
    return UserError(f"{kind} {value!r} is unknown: {remedy}")


def check_package(name: str, extra: str, who: str = "this") -> None:
    """UserError if an optional package that `who` needs is missing."""
    spec = importlib.util.find_spec(name)
    # no origin: only a folder of that name, such as W&B creates
    if spec is not None and spec.origin is not None:
        return
    try:
        every = importlib.metadata.requires("tarflowlm") or []
    except importlib.metadata.PackageNotFoundError:
        every = []
    # the packages of the extra, with their versions
    halves = [package.partition(";") for package in every]
    named = re.compile(rf"extra == \W{extra}\b")
    packages = [package.strip() for package, _, when in halves if named.search(when)]
    raise UserError(f"{who} needs the package {name}: pip install {command(packages or [name])}")


def command(words: Iterable[str]) -> str:
    """Words for the shell of this system; that of Windows has double quotes alone."""
    if os.name != "nt":
        return shlex.join(words)
    plain = re.compile(r"[\w.:/\\=@-]+")
    return " ".join(word if plain.fullmatch(word) else f'"{word}"' for word in words)


class UnknownCharacters(UserError):
    """Characters of a text that are not in a tokenizer's alphabet: how many, and which."""

    def __init__(self, text: str, alphabet: str) -> None:
        self.alphabet = alphabet
        unknown = Counter(text)
        for character in alphabet:
            unknown.pop(character, None)
        counts = sorted(unknown.items(), key=lambda item: (-item[1], item[0]))
        shown = ", ".join(f"{character!r} x{count}" for character, count in counts[:8])
        shown += ", ..." if len(counts) > 8 else ""
        found = f"{unknown.total()} of {len(text)} characters ({len(unknown)} kinds: {shown})"
        where = f"are not in the tokenizer's alphabet of {len(alphabet)}"
        super().__init__(f"{found} {where}: replace them or use a byte or BPE tokenizer")


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or the name of its type."""
    return (str(error).splitlines() or [type(error).__name__])[0]


SMALLER = "choose a smaller model, context, batch size, or number of samples or particles"
"""What needs less memory."""


def about_file(error: OSError) -> str:
    """An error of the system about a file, with what to look at."""
    place = f"cannot use {error.filename or 'the output'}: {error.strerror or error}"
    return f"{place}; check the path, its permissions and the disk"


def lacks_memory(error: BaseException) -> bool:
    """Whether Python or PyTorch could not get the memory that they asked for."""
    # PyTorch's words for it, on an accelerator and on the CPU
    words = ("out of memory", "can't allocate memory", "Storage size calculation overflowed")
    is_said = isinstance(error, RuntimeError) and any(text in str(error) for text in words)
    return is_said or isinstance(error, MemoryError)


@contextmanager
def system_errors() -> Iterator[None]:
    """Turn errors of the system, about a file or memory, into UserErrors."""
    try:
        yield
    except OSError as error:
        raise UserError(about_file(error)) from error
    except (MemoryError, RuntimeError) as error:
        if not lacks_memory(error):
            raise
        raise UserError(f"out of memory: {SMALLER}") from error


class Stopped(Exception):
    """A run was asked to stop and has saved its state; the message says how to resume it."""


def is_first_process() -> bool:
    """Whether this process tells the user of its work: under torchrun only the first one does."""
    return os.environ.get("RANK", "0") == "0"


Record = dict[str, str | int | float]
"""A line of metrics.jsonl."""


@dataclass(eq=False)  # for its repr, which `help` shows as a default
class Progress:
    """The calls that long work makes. Subclasses show them; this class shows nothing."""

    def stage(self, name: str, total: int | None = None, done: int = 0) -> None:
        """Begin a part called `name`, of `total` units if known, `done` of them done before."""

    def advance(self, count: int = 1) -> None:
        """`count` more units of the current part are done; below 0: some have to be repeated."""

    def record(self, record: Record) -> None:
        """A training run wrote a line to metrics.jsonl."""


SILENT = Progress()
