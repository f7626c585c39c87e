"""Types, ranges and contradictions of dataclasses. Refusals are generated from the fields."""

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import MISSING, dataclass, fields
from typing import Annotated, Any, ClassVar, Literal, get_args, get_origin

import numpy as np
import pytest
import torch
from annotated_types import Ge, Gt, Interval, Le, Lt

from tarflowlm import config, model_config, requests
from tarflowlm.errors import UserError
from tarflowlm.schema import Checked, Count, Positive, checked, from_dict, hints_of, to_dict

CHECKED = [
    config.DataConfig,
    config.OptimConfig,
    config.RunConfig,
    config.TokenizerConfig,
    config.TrainConfig,
    model_config.BaselineConfig,
    model_config.Affine,
    model_config.Mix1,
    model_config.MixD,
    model_config.TokenAffine,
    model_config.FlowConfig,
    model_config.TransformerConfig,
    requests.Edit,
    requests.Score,
    requests.Writing,
]
NEEDED = {"name": "x", "model": model_config.BaselineConfig(), "text": "the king"}
"""Values of the fields that have no defaults."""


def parts_of(hint: Any) -> Iterator[Any]:
    """A type and the types inside it."""
    yield hint
    for one in get_args(hint):
        yield from parts_of(one)


def limits_of(hint: Any) -> Iterator[Any]:
    """The limits of a type, one by one."""
    for one in getattr(hint, "__metadata__", ()):
        yield from one if isinstance(one, Interval) else [one]


def refusals(cls: type) -> Iterator[tuple[str, object]]:
    """Every field with values that it refuses: NaN, just out of its range, another name."""
    for one in fields(cls):
        hint = hints_of(cls)[one.name]
        wrong: list[object] = []
        for part in parts_of(hint):
            for limit in limits_of(part):
                match limit:
                    case Ge(least):
                        wrong.append(least - (1e-9 if float in parts_of(hint) else 1))
                    case Le(most):
                        wrong.append(most + 1)
                    case Gt(at) | Lt(at):
                        wrong.append(at)
            if part is float:
                wrong += [math.nan, math.inf, "1.5"]
            if part is int:
                wrong += [1.5, True, "2"]
            if part is bool:
                wrong += [1]
            if get_origin(part) is Literal:
                wrong += ["foo"]
        for value in wrong:
            yield one.name, value


def usual(cls: type) -> dict[str, object]:
    """Values of all fields."""
    defaults = {
        one.name: one.default if one.default_factory is MISSING else one.default_factory()
        for one in fields(cls)
    }
    return defaults | {name: value for name, value in NEEDED.items() if name in defaults}


def refused(cls: type, values: dict[str, object]) -> str:
    """What the class says of these values, given by a program whose types nobody checks."""
    made = object.__new__(cls)
    for name, value in values.items():
        object.__setattr__(made, name, value)
    with pytest.raises(UserError) as caught:
        made.check(made.section)
    return str(caught.value)


@pytest.mark.parametrize("cls", CHECKED)
def test_every_field_refuses_what_is_out_of_its_range(cls):
    cls(**{name: value for name, value in NEEDED.items() if name in usual(cls)})
    tried = 0
    for name, value in refusals(cls):
        is_list = isinstance(usual(cls)[name], tuple)
        said = refused(cls, usual(cls) | {name: (value,) if is_list else value})
        label = cls.NAMES.get(name, name)
        assert re.search(rf"{label}(\.0)? .*: (must be|give|choose one of)", said), (name, value)
        tried += 1
    assert tried


def another(cls: type, name: str) -> object:
    """A value of a field that is not its default."""
    default = usual(cls)[name]
    for part in parts_of(hints_of(cls)[name]):
        if get_origin(part) is Literal:
            return next(one for one in get_args(part) if one != default)
        if get_origin(part) is tuple:
            return ("king", "lord")
        if part in (int, float, str, bool):
            return {int: 2, float: 0.5, str: "a", bool: not default}[part]
    return [1]


EXCLUSIVE = [
    (cls, one, other)
    for cls in CHECKED
    for one, others in cls.EXCLUSIVE.items()
    for other in others
]
NEEDS = [(cls, name) for cls in CHECKED for name in cls.NEEDS]


def test_every_two_that_exclude_each_other_are_named():
    for cls, one, other in EXCLUSIVE:
        said = refused(cls, usual(cls) | {name: another(cls, name) for name in (one, other)})
        names = [cls.NAMES.get(name, name) for name in (one, other)]
        assert said == f"{names[0]} with {names[1]}: leave one of them out"


def test_everything_that_needs_another_names_it():
    for cls, name in NEEDS:
        said = refused(cls, usual(cls) | {name: another(cls, name)})
        assert said.startswith(f"{name} has no effect without {cls.NEEDS[name][0]}")


@dataclass(frozen=True, kw_only=True)
class Shape(Checked):
    KEY = "form"
    form: ClassVar[str]
    size: Count = 1


@dataclass(frozen=True, kw_only=True)
class Round(Shape):
    form = "round"


@dataclass(frozen=True, kw_only=True)
class Cornered(Shape):
    form = "cornered"
    corners: Annotated[int, Ge(3)] = 3

    def rules(self):
        if self.corners > self.size:
            yield "corners", f"needs a size of at least {self.corners}"


@dataclass(frozen=True, kw_only=True)
class Drawing(Checked):
    section = "drawing."
    NAMES: ClassVar = {"filled": "full"}
    EXCLUSIVE: ClassVar = {"scale": ("filled",)}
    NEEDS: ClassVar = {"colour": ("filled", "scale")}
    shapes: tuple[Shape, ...] = (Round(),)
    scale: Positive | None = None
    filled: bool = False
    colour: Literal["red", "blue"] = "red"
    words: str | Sequence[str] = ()
    pair: tuple[str, str] | None = None


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"scale": 1.0, "filled": True}, "drawing.scale with drawing.full: leave one of them out"),
        ({"colour": "blue"}, "drawing.colour has no effect without drawing.full or drawing.scale"),
        ({"shapes": 3}, "drawing.shapes 3 of type int: give a list, each Shape"),
        ({"shapes": [3]}, "drawing.shapes.0 3 of type int: give Shape"),
        ({"words": 3}, "drawing.words 3 of type int: give a text"),
        ({"words": ["a", 3]}, "drawing.words.1 3 of type int: give a text"),
        ({"pair": ("a",)}, "drawing.pair .*: give a list of 2, each a text"),
        ({"pair": "ab"}, "drawing.pair 'ab' of type str: give a list of 2, each a text"),
        ({"shapes": [{"form": "flat"}]}, "shapes.0.form 'flat': choose one of round, cornered"),
        ({"shapes": [{"size": 2}]}, "shapes.0.form None: choose one of round, cornered"),
        ({"shapes": [{"form": "round", "sise": 2}]}, "sise: unknown key; did you mean size"),
        ({"shapes": [{"form": "round", "size": 0}]}, "shapes.0.size 0: must be at least 1"),
        ({"shapes": [{"form": "cornered"}]}, "corners 3: needs a size of at least 3"),
        ({"scale": 10**400}, "scale 1000.*: give a finite number"),
    ],
)
def test_wrong_fields_are_named(given, message):
    with pytest.raises(UserError, match=message):
        Drawing(**given)


def test_json_tells_subclasses_apart():
    drawing = Drawing(shapes=(Round(size=2), Cornered(size=5, corners=4)), pair=["a", "b"])
    assert drawing.pair == ("a", "b")
    values = to_dict(drawing)
    assert values["shapes"][1] == {"form": "cornered", "size": 5, "corners": 4}
    assert from_dict(Drawing, values) == drawing


@pytest.mark.parametrize(
    "number", [2, np.int64(2), np.array(2), torch.tensor(2), torch.int8.itemsize + 1]
)
def test_scalars_become_numbers_of_python(number):
    assert type(checked(number, int, "n")) is int
    assert type(checked(number, float, "n")) is float
    assert checked(number, Count | None, "n") == 2
    assert checked(None, Count | None, "n") is None


def test_a_range_says_its_rule_and_the_remedy():
    share = Annotated[float, Interval(gt=0, le=1), "take 0.5"]
    with pytest.raises(UserError, match=r"^share 0.0: must be above 0 and at most 1; take 0.5$"):
        checked(0, share, "share")
