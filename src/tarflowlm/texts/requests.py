"""Parts of all requests: their random stream, their texts, and their options in a shell."""

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING

import torch

from tarflowlm.checks import check_type, checked_seed

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


def seeded_generator(seed: int) -> torch.Generator:
    """The random stream of a request. UserError for a seed out of range."""
    return torch.Generator().manual_seed(checked_seed(seed))


def as_texts(value: str | Sequence[str], name: str) -> tuple[str, ...]:
    """One text or several. UserError for anything else."""
    if isinstance(value, str):
        return (value,)
    is_list = isinstance(value, Sequence) and not isinstance(value, bytes)
    if not is_list or not all(isinstance(one, str) for one in value):
        check_type(value, name, str, "give a text, a str, or a list of them")
    return tuple(value)


def options_of(request: "DataclassInstance", renamed: Mapping[str, str] = {}) -> list[str]:
    """The fields of a request as options of its command, without those at their defaults."""
    words: list[str] = []
    for one in fields(request):
        value = getattr(request, one.name)
        option = "--" + renamed.get(one.name, one.name).replace("_", "-")
        if value == one.default:
            continue
        if value is True:
            words.append(option)
        elif one.name in ("stop", "rewrite"):
            words += [word for text in as_texts(value, one.name) for word in (option, text)]
        elif isinstance(value, (tuple, list)):
            words += [option, *value]
        elif isinstance(value, float) and float(f"{value:g}") == value:
            words += [option, f"{value:g}"]
        else:
            words += [option, str(value)]
    return words
