"""Requests to edit: some words of a text drawn anew, or its states changed."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypedDict

import torch
from torch import Tensor

from tarflowlm import editing
from tarflowlm.checks import as_integer
from tarflowlm.config import Decoder
from tarflowlm.data import Tokenizer
from tarflowlm.data.prompts import Reading, read
from tarflowlm.errors import UserError
from tarflowlm.evaluation.likelihood import bits
from tarflowlm.model import as_flow
from tarflowlm.progress import SILENT, Progress
from tarflowlm.runs.checkpoint import Checkpoint
from tarflowlm.texts.requests import Request, as_texts


@dataclass(frozen=True, kw_only=True)
class Edit(Request):
    """A text to edit: by default some of its words are drawn anew given all others."""

    COMMAND = "edit"
    text: str
    rewrite: str | Sequence[str] | None = None
    """Draw these pieces of the text anew."""
    everywhere: bool = False
    """With `rewrite`: every occurrence as whole words, not only the first."""
    replace: tuple[str, str] | None = None
    """Put the second text where the first one is, and keep the rest."""
    around: int | None = None
    """With `replace`: so many words on each side of it may be drawn anew."""
    counterfactual: tuple[str, str] | None = None
    """Put the second text where the first one is, and regenerate what follows from its noise."""
    toward: str | None = None
    """Take a stretch of this text; with `level`, interpolate between the states of both."""
    level: int | None = None
    """Change this state in latent space: 0 is the latents, the number of blocks the noise."""
    strength: float | None = None
    words: int | None = None
    pick: editing.Pick | None = None
    weight: float | None = None
    candidates: int | None = None
    temperature: float | None = None
    decoder: Decoder | None = None
    num: int = 1
    """Edits, each with its own noise."""

    def __post_init__(self) -> None:
        """UserError for options that contradict each other or have no effect, and for numbers."""
        super().__post_init__()
        for name in ("replace", "counterfactual"):
            pair = getattr(self, name)
            if pair is not None and (isinstance(pair, str) or len(pair) != 2):
                raise UserError(f"{name} {pair!r}: give two texts, (old, new)")
        for name, least in (("num", 1), ("words", 1), ("candidates", 1), ("around", 0)):
            if getattr(self, name) is not None:
                as_integer(getattr(self, name), name, least=least)
        exclusive = ("words", "strength") if self.kind == "words" else NAMED
        named = [name for name in exclusive if self._is_given(name)]
        if len(named) > 1:
            raise UserError(f"{named[0]} with {named[1]}: leave one of them out")
        takes = editing.options_of(self.kind) & OPTIONS
        for name in OPTIONS - takes:
            if self._is_given(name):
                rule = f"leave it out; it takes {', '.join(sorted(takes))}"
                raise UserError(f"{name} has no effect on this edit ({self.kind}): {rule}")

    def _is_given(self, name: str) -> bool:
        value = getattr(self, name)
        return value is not None and value is not False

    @property
    def kind(self) -> str:
        """The name of the edit in `editing.EDITS`."""
        if self.toward is not None and self.level is not None:
            return "interpolate"
        return next((name for name in (*NAMED, "level") if self._is_given(name)), "words")

    def run(self, lm: Checkpoint, progress: Progress = SILENT) -> "Edited":
        """The edits. UserError for a baseline, and for what the model cannot read."""
        flow = as_flow(lm.model, "a discrete baseline has no latents to edit: give a flow")
        tokenizer = lm.tokenizer
        readings = [self._read(tokenizer, self.text, "text")]
        length = len(readings[0].tokens)
        if self.toward is not None:
            readings.append(self._read(tokenizer, self.toward, "other text"))
            length = editing.common_length(readings[0].tokens, readings[1].tokens)
        generator = self.random_stream()
        # the text first, then the other one; every edit starts from the same latents
        encoded = [
            editing.encode(flow, reading.tokens[None, :length], generator) for reading in readings
        ]
        options = {name: getattr(self, name) for name in OPTIONS if self._is_given(name)}
        if self.toward is not None:
            options["other"] = encoded[1]
        if self.rewrite is not None:
            pieces = as_texts(self.rewrite, "rewrite")
            options["pieces"] = [self._piece(tokenizer, piece, "piece") for piece in pieces]
        pair = self.replace or self.counterfactual
        if pair is not None:
            options["old"] = self._piece(tokenizer, pair[0], "text to replace")
            options["new"] = self._piece(tokenizer, pair[1], "replacement")
        rows = encoded[0].repeated(self.num)
        source = editing.WordSource(flow, rows, generator, progress, tokenizer=tokenizer)
        found = editing.EDITS[self.kind](source, **options)
        return Edited(tokenizer, tuple(readings), found)

    def _read(self, tokenizer: Tokenizer, text: str, name: str) -> Reading:
        return read(tokenizer, text, name=name, normalize=self.normalize)

    def _piece(self, tokenizer: Tokenizer, text: str, name: str) -> str:
        return self._read(tokenizer, text, name).text.strip()


class EditOptions(TypedDict, total=False):
    """The options of `edit`: fields of `Edit`."""

    rewrite: str | Sequence[str] | None
    everywhere: bool
    replace: tuple[str, str] | None
    around: int | None
    counterfactual: tuple[str, str] | None
    toward: str | None
    level: int | None
    strength: float | None
    words: int | None
    pick: editing.Pick | None
    weight: float | None
    candidates: int | None
    temperature: float | None
    decoder: Decoder | None
    seed: int


NAMED = ("rewrite", "replace", "counterfactual", "toward")
"""Fields of `Edit` that name the edit."""
OPTIONS = EditOptions.__annotations__.keys() & frozenset[str]().union(
    *map(editing.options_of, editing.EDITS)
)
"""Fields of `Edit` that are options of some kinds of edit only."""


@dataclass(frozen=True)
class Edited:
    """The edits of a text."""

    tokenizer: Tokenizer
    readings: tuple[Reading, ...]
    """The text, and the other one where there is one."""
    edit: editing.Edit

    @property
    def before(self) -> str:
        """The text before the edits, as the model reads it."""
        return self.tokenizer.decode(self.edit.before[0].tolist())

    @property
    def texts(self) -> list[str]:
        """The new texts."""
        return [self.tokenizer.decode(tokens) for tokens in self.edit.tokens.tolist()]

    @property
    def notices(self) -> list[str]:
        """A line for every text that is not read as it was given, or cut."""
        found = [reading.notice for reading in self.readings if reading.notice is not None]
        length = min(len(reading.tokens) for reading in self.readings)
        for name, reading in zip(("text", "other text"), self.readings, strict=False):
            count = len(reading.tokens)
            if count > length:
                found.append(f"the {name} is cut from {count} to {length} tokens, as the other")
        return found

    @property
    def bits_before(self) -> Tensor:
        """At most so many bits per character before each edit, [num]."""
        return self._per_character(self.edit.bound_before, self.edit.before)

    @property
    def bits(self) -> Tensor:
        """At most so many bits per character after each edit, [num]."""
        return self._per_character(self.edit.bound, self.edit.tokens)

    def _per_character(self, nats: Tensor, tokens: Tensor) -> Tensor:
        counts = torch.from_numpy(self.tokenizer.characters_per_token)
        return bits(nats.cpu()) / counts[tokens.cpu()].sum(-1).clamp_min(1)
