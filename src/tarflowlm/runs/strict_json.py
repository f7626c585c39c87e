"""Strict conversion between frozen dataclasses and JSON: unknown and missing keys are errors, types are checked."""

import dataclasses
import types
import typing
from typing import Any, TypeVar

from tarflowlm.errors import UserError

T = TypeVar("T")


def to_dict(config: Any) -> Any:
    """A dataclass as plain JSON values; tuples become lists, and a class attribute `family` becomes a key."""
    if dataclasses.is_dataclass(config):
        family = {"family": config.family} if hasattr(config, "family") else {}
        return family | {f.name: to_dict(getattr(config, f.name)) for f in dataclasses.fields(config)}
    if isinstance(config, (tuple, list)):
        return [to_dict(item) for item in config]
    return config


def flatten(value: Any, name: str = "") -> dict[str, Any]:
    """The fields of a configuration, or of JSON values, by their dotted names as options call them."""
    value = to_dict(value)
    if isinstance(value, list) and value and isinstance(value[0], dict):
        value = dict(enumerate(value))
    if not isinstance(value, dict):
        return {name: value}
    found: dict[str, Any] = {}
    for key, inner in value.items():
        found |= flatten(inner, f"{name}.{key}" if name else str(key))
    return found


def from_dict(cls: type[T], data: Any, where: str = "config") -> T:
    """The dataclass `cls` from plain JSON values; `family` selects the member of a union of dataclasses.

    UserError, naming the dotted key, for unknown keys, missing keys and values of the wrong type.
    """
    _require(isinstance(data, dict), where, f"expected an object, found {data!r}")
    hints, family = typing.get_type_hints(cls), getattr(cls, "family", None)
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for key, value in data.items():
        is_known = key in fields or (key == "family" and family is not None and value == family)
        _require(is_known, f"{where}.{key}", f"unknown key; known keys are {', '.join(sorted(fields))}")
    for name, field in fields.items():
        is_needed = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        _require(name in data or not is_needed, f"{where}.{name}", "missing key")
    return cls(**{name: _value(hints[name], data[name], f"{where}.{name}") for name in fields if name in data})


def _require(is_valid: bool, where: str, message: str) -> None:
    if not is_valid:
        raise UserError(f"{where}: {message}")


def _value(hint: Any, value: Any, where: str) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return _union(arguments, value, where)
    if origin is typing.Literal:
        _require(value in arguments, where, f"{value!r} is not one of {', '.join(map(repr, arguments))}")
        return value
    if origin is tuple:
        _require(isinstance(value, (list, tuple)), where, f"expected a list, found {value!r}")
        return tuple(_value(arguments[0], v, f"{where}[{i}]") for i, v in enumerate(value))
    if dataclasses.is_dataclass(hint):
        return from_dict(typing.cast(type, hint), value, where)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    is_right = isinstance(value, hint) and (hint is bool or not isinstance(value, bool))
    _require(is_right, where, f"expected {hint.__name__}, found {value!r}")
    return value


def _union(members: tuple[Any, ...], value: Any, where: str) -> Any:
    if value is None and type(None) in members:
        return None
    members = tuple(m for m in members if m is not type(None))
    if len(members) == 1:
        return _value(members[0], value, where)
    by_family = {m.family: m for m in members}
    family = value.get("family") if isinstance(value, dict) else None
    is_known = isinstance(family, str) and family in by_family
    _require(is_known, f"{where}.family", f"{family!r} is not one of {', '.join(map(repr, by_family))}")
    return _value(by_family[family], value, where)
