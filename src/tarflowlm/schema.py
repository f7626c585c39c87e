"""Configurations as JSON, and back: frozen dataclasses, read strictly.

Unknown and missing keys are errors, and the types of all values are checked.
"""

import dataclasses
import types
import typing
from typing import Any, TypeVar

from tarflowlm.errors import UserError, guess

T = TypeVar("T")


def to_dict(config: object) -> Any:
    """A dataclass as JSON values; tuples become lists, a class attribute `family` a key."""
    if dataclasses.is_dataclass(config):
        family = {"family": config.family} if hasattr(config, "family") else {}
        fields = dataclasses.fields(config)
        return family | {field.name: to_dict(getattr(config, field.name)) for field in fields}
    return [to_dict(item) for item in config] if isinstance(config, (tuple, list)) else config


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


def from_dict(cls: type[T], data: object, where: str = "config") -> T:
    """The dataclass `cls` from plain JSON values; inverse of `to_dict`.

    The key `family` selects the member of a union of dataclasses. UserError names the dotted key
    behind `where`.
    """
    if not isinstance(data, dict):
        raise UserError(f"{where}: expected an object, found {data!r}")
    hints = typing.get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for key, value in data.items():
        is_family = key == "family" and value == getattr(cls, "family", None)
        if key not in fields and not is_family:
            remedy = f"{guess(key, fields)}known keys are {', '.join(sorted(fields))}"
            raise UserError(f"{where}.{key}: unknown key; {remedy}")
    given = {}
    for name, field in fields.items():
        if name in data:
            given[name] = _value(hints[name], data[name], f"{where}.{name}")
        elif field.default is field.default_factory is dataclasses.MISSING:
            raise UserError(f"{where}.{name}: missing key")
    return cls(**given)


def _value(hint: Any, value: object, where: str) -> object:
    """`value`, checked against a type hint of a configuration; lists become tuples."""
    origin = typing.get_origin(hint)
    arguments = typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        member, *others = [member for member in arguments if member is not type(None)]
        if others:
            # of several dataclasses the one of this family
            by_family = {getattr(one, "family", None): one for one in (member, *others)}
            family = value.get("family") if isinstance(value, dict) else None
            if not isinstance(family, str) or family not in by_family:
                known = ", ".join(map(repr, by_family))
                raise UserError(f"{where}.family: {family!r} is not one of {known}")
            member = by_family[family]
        return _value(member, value, where)
    if origin is typing.Literal:
        if value not in arguments:
            raise UserError(f"{where}: {value!r} is not one of {', '.join(map(repr, arguments))}")
        return value
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise UserError(f"{where}: expected a list, found {value!r}")
        return tuple(_value(arguments[0], v, f"{where}[{i}]") for i, v in enumerate(value))
    if dataclasses.is_dataclass(hint):
        return from_dict(typing.cast(type, hint), value, where)
    is_bool = isinstance(value, bool)
    if hint is float and isinstance(value, int) and not is_bool:
        return float(value)
    # to Python, True is an int
    if not isinstance(value, hint) or is_bool != (hint is bool):
        raise UserError(f"{where}: expected {hint.__name__}, found {value!r}")
    return value
