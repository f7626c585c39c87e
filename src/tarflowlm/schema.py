"""Types, ranges and contradictions of dataclasses: configurations, requests, and JSON.

A field says its range in its type, `Annotated[int, Ge(1)]`; a text after it is advice, if the rule
needs any: `Annotated[float, Gt(0), "leave it out"]`. `Annotated[str, REGISTRY]` is a name of that
`Registry`. One walker, `checked`, reads such types, for
fields, JSON values and arguments of functions. No torch here.
"""

import copy
import dataclasses
import functools
import operator
import os
import sys
import types
import typing
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from numbers import Integral, Real
from typing import Annotated, Any, ClassVar, Self, TypeVar

from annotated_types import Ge, Gt, Interval, Le, Lt

from tarflowlm.errors import UserError, guess
from tarflowlm.registry import Registry

T = TypeVar("T")

_WORDS: dict[object, str] = {
    int: "an integer",
    float: "a number",
    bool: "True or False",
    str: "a text",
}


_RULES: dict[str, tuple[str, Callable[[Any, Any], bool]]] = {
    "ge": ("at least", operator.ge),
    "gt": ("above", operator.gt),
    "le": ("at most", operator.le),
    "lt": ("below", operator.lt),
}
"""The limits of `annotated_types`, in words and as comparisons."""

Count = Annotated[int, Ge(1)]
Whole = Annotated[int, Ge(0)]
Seed = Annotated[int, Interval(ge=0, lt=2**62)]
"""Generators keep the seeds of this range distinct."""
Positive = Annotated[float, Gt(0)]
NotNegative = Annotated[float, Ge(0)]
Share = Annotated[float, Interval(ge=0, le=1)]
Below1 = Annotated[float, Interval(ge=0, lt=1)]
Length = Annotated[int, Interval(ge=1, le=10_000_000)]
"""Tokens of a text that is written, or a number of texts."""
Million = Annotated[int, Interval(ge=1, le=1_000_000)]
"""A number of times to do what takes long; more would never end."""
TopP = Annotated[float, Interval(ge=1e-30, le=1), "top_k 1 takes the most probable token"]
"""The least value is far above the numbers that float32 rounds to zero."""


class WrongType(UserError):
    """A value of another type than its field or parameter, or none of its choices."""

    def __init__(self, name: str, value: object, remedy: str, *, is_choice: bool = False) -> None:
        shown = f"{value!r:.40}" if is_choice else _shown(value)
        super().__init__(f"{name} {shown}: {remedy}")
        self.name = name
        self.value = value
        self.remedy = remedy


def checked(value: Any, hint: object, where: str) -> Any:
    """`value` converted to its type `hint`. UserError, which calls it `where`, if it does not fit.

    A scalar of NumPy or PyTorch becomes a number of Python, an int a float if one is wanted, a
    list a tuple, and a mapping of JSON values a dataclass. NaN and infinities are refused, and True
    is no integer.
    """
    origin, kinds = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        value = checked(value, kinds[0], where)
        _check_range(value, kinds[1:], where)
        return value
    if origin in (typing.Union, types.UnionType):
        return _one_of(value, kinds, where)
    if origin is typing.Literal:
        if value not in kinds:
            remedy = f"choose one of {', '.join(map(str, kinds))}"
            raise WrongType(where, value, remedy, is_choice=True)
        return value
    if origin in (tuple, Sequence):
        check_type(value, where, (tuple, list), f"give {_wanted(hint)}")
        if origin is tuple and ... not in kinds:
            if len(value) != len(kinds):
                raise UserError(f"{where} {_shown(value)}: give {_wanted(hint)}")
        else:
            kinds = (kinds[0],) * len(value)
        pairs = enumerate(zip(value, kinds, strict=True))
        return tuple(checked(one, kind, f"{where}.{index}") for index, (one, kind) in pairs)
    if dataclasses.is_dataclass(hint):
        return _one_of(value, (hint,), where)
    if hint in (int, float, bool):
        return _scalar(value, hint, where)
    if isinstance(hint, type):
        check_type(value, where, hint, f"give {_wanted(hint)}")
    return value


def _one_of(value: object, kinds: Sequence[object], where: str) -> object:
    """`value` as the first of the types of a union that it fits."""
    if isinstance(value, Mapping):
        known = [kind for kind in kinds if dataclasses.is_dataclass(kind)]
        if known:
            return _structure(dict(value), typing.cast(Sequence[type], known), where)
    if value is None and type(None) in kinds:
        return None
    errors = []
    for kind in (kind for kind in kinds if kind is not type(None)):
        if dataclasses.is_dataclass(kind):
            if isinstance(value, typing.cast(type, kind)):
                return value
        elif isinstance(value, (list, tuple)) == (typing.get_origin(kind) in (tuple, Sequence)):
            try:
                return checked(value, kind, where)
            except UserError as error:
                errors.append(error)
    wanted = " or ".join(map(_wanted, kinds))
    raise errors[0] if errors else UserError(f"{where} {_shown(value)}: give {wanted}")


def _structure(value: dict[str, object], kinds: Sequence[type], where: str) -> object:
    """The dataclass of JSON values: the one of `kinds` and their subclasses that the values name.

    Unknown and missing keys are errors.
    """
    cls = kinds[0]
    prefix = where and f"{where}."
    if issubclass(cls, Checked) and cls.KINDS:
        known = {
            name: one for kind in kinds for name, one in cls.KINDS.items() if issubclass(one, kind)
        }
        name = value.pop(cls.KEY, next(iter(known)) if len(known) == 1 else None)
        if not isinstance(name, str) or name not in known:
            raise UserError(f"{prefix}{cls.KEY} {name!r:.40}: {cls.KINDS.remedy(name, known)}")
        cls = known[name]
    hints = hints_of(cls)
    fields = {field.name: field for field in dataclasses.fields(cls)}
    check_keys(value, fields, prefix)
    for name, field in fields.items():
        if name not in value and field.default is field.default_factory is dataclasses.MISSING:
            raise UserError(f"{prefix}{name}: missing key")
    values = {name: checked(one, hints[name], f"{prefix}{name}") for name, one in value.items()}
    try:
        return cls(**values)
    except UserError as error:
        # its rules do not know its place
        own = str(error).removeprefix(getattr(cls, "section", ""))
        raise UserError(f"{prefix}{own}") from None


def check_keys(given: Iterable[str], known: Collection[str], prefix: str) -> None:
    """UserError, which calls it by the `prefix`, for a key that is not among the `known`."""
    for name in given:
        if name not in known:
            remedy = f"{guess(name, known)}known keys are {', '.join(sorted(known))}"
            raise UserError(f"{prefix}{name}: unknown key; {remedy}")


def _scalar(value: Any, hint: type, where: str) -> int | float | bool:
    plain = value.item() if getattr(value, "ndim", None) == 0 else value
    kind: Any = {int: Integral, float: Real, bool: bool}[hint]
    # to Python, True is an integer
    if not isinstance(plain, kind) or isinstance(plain, bool) != (hint is bool):
        raise WrongType(where, plain, f"give {_WORDS[hint]}")
    # the range of a tensor or a float; no comparison with NaN is true
    most = {int: 2**62, float: sys.float_info.max, bool: 1}[hint]
    if not abs(plain) <= most:
        raise UserError(f"{where} {plain}: give a finite number, below 2^62 if it is an integer")
    return hint(plain)


def _check_range(value: Any, notes: Sequence[object], where: str) -> None:
    """UserError for a number out of the limits of `notes`, or a name that is in no registry."""
    for registry in notes:
        if isinstance(registry, Registry) and value not in registry:
            raise WrongType(where, value, registry.remedy(value), is_choice=True)
    limits = [
        (words, fits, at)
        for name, (words, fits) in _RULES.items()
        for note in notes
        if isinstance(note, (Ge, Gt, Le, Lt, Interval))
        and (at := getattr(note, name, None)) is not None
    ]
    if not all(fits(value, at) for _, fits, at in limits):
        rules = " and ".join(f"{words} {at:,}" for words, _, at in limits)
        remedies = [rules, *(note for note in notes if isinstance(note, str))]
        raise UserError(f"{where} {value}: must be {'; '.join(remedies)}")


def check_type(value: object, name: str, kinds: type | tuple[type, ...], wanted: str) -> None:
    """UserError, which asks for the `wanted` value, unless `value` is of one of the `kinds`."""
    if not isinstance(value, kinds):
        raise WrongType(name, value, wanted)


def check_path(path: object, name: str, wanted: str) -> None:
    """UserError, which asks for the `wanted` one, unless `path` can be one."""
    check_type(path, name, (str, os.PathLike), wanted)
    if "\0" in str(path):
        raise UserError(f"{name} {str(path)!r:.40} has a null character: {wanted}")


def check_integers(tokens: object, name: str, *shapes: str) -> None:
    """UserError unless `tokens` is a tensor of integers of one of the `shapes`: "[T]", "[B, T]"."""
    import torch

    wanted = f"give a tensor of integers {' or '.join(shapes)}, as of tokenizer.encode(text)"
    check_type(tokens, name, torch.Tensor, wanted)
    assert isinstance(tokens, torch.Tensor)
    dimensions = [shape.count(",") + 1 for shape in shapes]
    # those by which PyTorch looks up embeddings; a uint8 tensor would index as a mask
    is_wide = tokens.dtype in (torch.int64, torch.int32)
    if not is_wide or tokens.dim() not in dimensions:
        what = f"{name} of shape {list(tokens.shape)} and type {tokens.dtype}"
        narrow = "" if is_wide or tokens.is_floating_point() else "; .long() widens these"
        raise UserError(f"{what}: {wanted}{narrow}")


def check_generator(generator: object) -> None:
    """UserError unless `generator` is a torch.Generator or None."""
    from torch import Generator

    wanted = "give torch.Generator().manual_seed(0)"
    check_type(generator, "generator", (Generator, type(None)), wanted)


def _shown(value: object) -> str:
    return f"{' '.join(repr(value).split()):.40} of type {type(value).__name__}"


def _wanted(hint: object) -> str:
    """A type in words."""
    origin, kinds = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        return _wanted(kinds[0])
    if origin is typing.Literal:
        return f"one of {', '.join(map(str, kinds))}"
    if origin is tuple and ... not in kinds:
        return f"a list of {len(kinds)}, each {_wanted(kinds[0])}"
    if origin in (tuple, Sequence):
        return f"a list, each {_wanted(kinds[0])}"
    return "None" if hint is type(None) else _WORDS.get(hint, getattr(hint, "__name__", str(hint)))


@functools.cache
def hints_of(cls: type) -> dict[str, object]:
    """The types of the fields of a dataclass, with their ranges."""
    return typing.get_type_hints(cls, include_extras=True)


@dataclasses.dataclass(frozen=True)
class Checked:
    """The base of configurations, requests and arguments of commands.

    Every field has the type and range of its annotation. A message calls it by its name in Python,
    after the `section`, unless NAMES has another.
    """

    section: ClassVar[str] = ""
    """The prefix of the names of its fields, with a dot at the end."""
    KEY: ClassVar[str] = ""
    """The class attribute whose value, under this key, is in JSON and tells classes apart."""
    KINDS: ClassVar[Registry] = Registry("")
    """The classes that have a value of KEY, by this value; every KEY has a registry of its own."""
    NAMES: ClassVar[Mapping[str, str]] = {}
    """Fields whose options have other names."""
    EXCLUSIVE: ClassVar[Mapping[str, Sequence[str]]] = {}
    """Fields that are given without these others."""
    NEEDS: ClassVar[Mapping[str, Sequence[str]]] = {}
    """Fields that have no effect without one of these."""

    def __init_subclass__(cls) -> None:
        if "KEY" in vars(cls):
            cls.KINDS = Registry(cls.KEY)
        if cls.KEY in vars(cls):
            cls.KINDS.add(vars(cls)[cls.KEY], cls)

    def __new__(cls, *_: object, **values: object) -> Self:
        check_keys(values, [one.name for one in dataclasses.fields(cls)], cls.section)
        return super().__new__(cls)

    def __post_init__(self) -> None:
        self.check(self.section)

    def unchecked(self, **changes: object) -> Self:
        """A copy with other values, which may be right only after further changes."""
        made = copy.copy(self)
        vars(made).update(changes)
        return made

    def check(self, section: str) -> None:
        """Convert the fields to their types. UserError names a wrong one after `section`."""
        label = functools.partial(self.label, section=section)
        hints = hints_of(typing.cast(typing.Hashable, type(self)))
        names = [one.name for one in dataclasses.fields(self)]
        vars(self).update(
            {name: checked(getattr(self, name), hints[name], label(name)) for name in names}
        )
        given = self.given()
        for name, others in self.EXCLUSIVE.items():
            for other in others:
                if given >= {name, other}:
                    both = f"{label(name)} with {label(other)}"
                    raise UserError(f"{both}: leave one of them out")
        for name, others in self.NEEDS.items():
            if name in given and not given.intersection(others):
                needed = " or ".join(map(label, others))
                remedy = "leave it out, or add that"
                raise UserError(f"{label(name)} has no effect without {needed}: {remedy}")
        for name, rule in self.rules():
            found: Any = self
            for key in name.split("."):
                found = found[int(key)] if key.isdigit() else getattr(found, key)
            raise UserError(f"{label(name)} {found!r:.80}: {rule}")

    def rules(self) -> Iterator[tuple[str, str]]:
        """Rules on several fields: yields the name of a wrong one, and the rule that it breaks."""
        yield from ()

    def given(self) -> set[str]:
        """The fields that do not have their defaults, including fields of requests inside."""
        found = set()
        for one in dataclasses.fields(self):
            value = getattr(self, one.name)
            if isinstance(value, Checked):
                found |= value.given()
            # arrays compare element by element
            elif value is not one.default and (one.default is None or value != one.default):
                found.add(one.name)
        return found

    def label(self, name: str, section: str) -> str:
        """The name of a field in messages."""
        return f"{section}{self.NAMES.get(name, name)}"


def to_dict(config: object) -> Any:
    """A dataclass as JSON values; tuples become lists, and its KEY comes first."""
    if dataclasses.is_dataclass(config):
        key = getattr(config, "KEY", "")
        names = [*([key] if key else []), *(field.name for field in dataclasses.fields(config))]
        return {name: to_dict(getattr(config, name)) for name in names}
    return [to_dict(item) for item in config] if isinstance(config, (tuple, list)) else config


def from_dict(cls: type[T], data: object, where: str = "config") -> T:
    """The dataclass `cls` from plain JSON values; inverse of `to_dict`.

    UserError names the dotted key after `where`, which may be empty.
    """
    return typing.cast(T, checked(data, cls, where))


def flatten(value: object, name: str = "") -> dict[str, object]:
    """The fields of a configuration, or of JSON values, by dotted names such as options have."""
    value = to_dict(value)
    if isinstance(value, list) and value and isinstance(value[0], dict):
        value = dict(enumerate(value))
    if not isinstance(value, dict):
        return {name: value}
    flat: dict[str, object] = {}
    for key, inner in value.items():
        flat |= flatten(inner, f"{name}.{key}" if name else str(key))
    return flat
