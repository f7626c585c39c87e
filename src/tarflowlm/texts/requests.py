"""The parts that all requests have: their random stream, their texts, their command."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import ClassVar

import torch

from tarflowlm.checks import check_type, checked_seed
from tarflowlm.config import Normalization

RENAMED = {
    "prompts": "prompt",
    "num_tokens": "length",
    "texts": "text",
    "stop_at_end": "no-stop",
}
"""Fields whose options have other names."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """Plain data that holds everything on which the result depends."""

    COMMAND: ClassVar[str]
    seed: int = 0
    normalize: Normalization | None = None
    """Normalisation of all texts; None: that of the model's training text."""

    def __post_init__(self) -> None:
        """UserError for numbers out of range, before a model is loaded."""
        checked_seed(self.seed)

    def random_stream(self) -> torch.Generator:
        """A generator that starts from the seed."""
        return torch.Generator().manual_seed(checked_seed(self.seed))

    def command(self, name: str) -> list[str]:
        """The shell command that gives the same with the model called `name`."""
        words = ["tarflowlm", self.COMMAND, name]
        shared = fields(Request)
        for one in (*fields(self)[len(shared) :], *shared):
            value = getattr(self, one.name)
            if value == one.default:
                continue
            option = "--" + RENAMED.get(one.name, one.name).replace("_", "-")
            if isinstance(value, bool):
                words.append(option)
            elif one.name in ("stop", "rewrite"):
                for text in as_texts(value, one.name):
                    words += [option, text]
            elif isinstance(value, (tuple, list)):
                words += [option, *value]
            else:
                words += [option, str(value)]
        return words


def as_texts(value: str | Sequence[str], name: str) -> tuple[str, ...]:
    """One text or several. UserError for anything else."""
    if isinstance(value, str):
        return (value,)
    is_list = isinstance(value, Sequence) and not isinstance(value, bytes)
    if not is_list or not all(isinstance(one, str) for one in value):
        check_type(value, name, str, "give a text, a str, or a list of them")
    return tuple(value)
