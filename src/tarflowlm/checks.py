"""Checks of the values that callers of the Python interface give. Most need no torch."""

import importlib.metadata
import importlib.util
import math
import re
import shlex
from collections.abc import Sequence
from numbers import Integral, Real
from typing import get_args

from tarflowlm.errors import UserError

MOST = 10_000_000
"""The most tokens of a text, and the most texts, that are written."""
SMALLEST = 1e-30
"""The lowest temperature and top-p: far above what float32 takes for zero."""


def check_type(value: object, name: str, kinds: type | tuple[type, ...], wanted: str) -> None:
    """UserError, which asks for what is `wanted`, unless `value` is of one of the `kinds`."""
    if not isinstance(value, kinds):
        raise UserError(f"{name} {_shown(value)}: {wanted}")


def _shown(value: object) -> str:
    return f"{' '.join(repr(value).split()):.40} of type {type(value).__name__}"


def check_generator(generator: object) -> None:
    """UserError unless `generator` is a torch.Generator or None."""
    from torch import Generator

    wanted = "give torch.Generator().manual_seed(0)"
    check_type(generator, "generator", (Generator, type(None)), wanted)


def check_option(value: object, name: str, literal: object) -> None:
    """UserError unless `value` is one of the names of a `Literal` type."""
    names = get_args(literal)
    if value not in names:
        raise UserError(f"{name} {value!r:.40}: choose one of {', '.join(names)}")


def check_options(values: object, name: str, literal: object) -> None:
    """UserError unless `values` is one of the names of a `Literal` type, or lists some."""
    if isinstance(values, str) or not isinstance(values, Sequence):
        values = (values,)
    for one in values:
        check_option(one, name, literal)


def checked_sampling(
    temperature: object, top_k: object, top_p: object
) -> tuple[float, int | None, float | None]:
    """The settings of `generation.sampling.adjust_weights`. UserError out of range."""
    temperature = as_number(temperature, "temperature")
    top_k = None if top_k is None else as_integer(top_k, "top-k", least=1)
    top_p = None if top_p is None else as_number(top_p, "top-p")
    remedy = "top-k 1 takes the most probable token"
    if not SMALLEST <= temperature < math.inf:
        raise UserError(f"temperature {temperature}: must be above 0 and finite; {remedy}")
    if top_p is not None and not SMALLEST <= top_p <= 1:
        raise UserError(f"top-p {top_p}: must be above 0 and at most 1; {remedy}")
    return temperature, top_k, top_p


def checked_seed(value: object) -> int:
    """`value` as a seed. UserError outside 0 .. 2^62 - 1, where generators keep seeds distinct."""
    seed = as_integer(value, "seed", least=0)
    if seed >= 2**62:
        raise UserError(f"seed {seed}: must be below 2^62")
    return seed


def checked_length(value: object, name: str = "length") -> int:
    """`value` as the tokens of a text to write. UserError outside of 1 .. MOST."""
    return as_integer(value, name, least=1, most=MOST)


def checked_num(value: object) -> int:
    """`value` as a number of texts. UserError outside of 1 .. MOST."""
    return as_integer(value, "num", least=1, most=MOST)


def check_time(minutes: object, steps: object) -> None:
    """UserError unless one or none says how long to train: finite `minutes`, or `steps`."""
    if minutes is not None and steps is not None:
        raise UserError(f"minutes {minutes} with steps {steps}: leave one of them out")
    if minutes is not None and not 0 < as_number(minutes, "minutes") < math.inf:
        raise UserError(f"minutes {minutes}: must be above 0 and finite")
    if steps is not None:
        as_integer(steps, "steps", least=1)


def check_share(value: object, name: str) -> None:
    """UserError, calling it `name`, for a share outside of [0, 1]."""
    if not 0 <= as_number(value, name) <= 1:
        raise UserError(f"{name} {value}: must be between 0 (the text itself) and 1 (another text)")


def as_integer(value: object, name: str, least: int | None = None, most: int | None = None) -> int:
    """`value`, an integer of Python, NumPy or PyTorch, as an int. UserError out of range."""
    number = _plain(value)
    if not isinstance(number, Integral) or isinstance(number, bool):
        raise UserError(f"{name} {_shown(number)}: must be an integer")
    if least is not None and int(number) < least:
        raise UserError(f"{name} {number}: must be at least {least}")
    if most is not None and int(number) > most:
        raise UserError(f"{name} {number}: must be at most {most:,}")
    return int(number)


def as_number(value: object, name: str) -> float:
    """`value`, a number of Python, NumPy or PyTorch, as a float."""
    number = _plain(value)
    if not isinstance(number, Real) or isinstance(number, bool):
        raise UserError(f"{name} {_shown(number)}: must be a number")
    return float(number)


def _plain(value: object) -> object:
    """A scalar of NumPy or PyTorch as a number of Python; any other value as it is."""
    item = getattr(value, "item", None)
    return item() if item is not None and getattr(value, "ndim", None) == 0 else value


def check_integers(tokens: object, name: str, *shapes: str) -> None:
    """UserError unless `tokens` is a tensor of integers of one of the `shapes`: "[T]", "[B, T]"."""
    from torch import Tensor, int8, int16, int32, int64, uint8

    wanted = f"give a tensor of integers {' or '.join(shapes)}, as of tokenizer.encode(text)"
    check_type(tokens, name, Tensor, wanted)
    assert isinstance(tokens, Tensor)
    dimensions = [shape.count(",") + 1 for shape in shapes]
    if tokens.dtype not in (int64, int32, int16, int8, uint8) or tokens.dim() not in dimensions:
        raise UserError(f"{name} of shape {list(tokens.shape)} and type {tokens.dtype}: {wanted}")


def check_package(name: str, extra: str, who: str = "this") -> None:
    """UserError if an optional package is missing that `who` needs."""
    spec = importlib.util.find_spec(name)
    # no origin: only a folder of that name, such as W&B creates
    if spec is None or spec.origin is None:
        packages = shlex.join(_packages(extra) or [name])
        raise UserError(f"{who} needs the package {name}: pip install {packages}")


def _packages(extra: str) -> list[str]:
    """The packages of an optional group, with their versions; none if we are not installed."""
    try:
        every = importlib.metadata.requires("tarflowlm") or []
    except importlib.metadata.PackageNotFoundError:
        return []
    halves = [package.partition(";") for package in every]
    named = re.compile(rf"extra == \W{extra}\b")
    return [package.strip() for package, _, when in halves if named.search(when)]
