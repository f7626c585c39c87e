"""Edits: some words of a text drawn anew, or its states changed."""

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from tarflowlm import editing
from tarflowlm.data import Tokenizer
from tarflowlm.data.prompts import Reading, read
from tarflowlm.errors import SILENT, Progress, UserError
from tarflowlm.evaluation.likelihood import bits
from tarflowlm.model import as_flow
from tarflowlm.runs.checkpoint import Checkpoint
from tarflowlm.texts.requests import Edit, as_texts

OPTIONS = {field.name for field in fields(Edit)} & frozenset[str]().union(
    *map(editing.options_of, editing.EDITS)
)
"""Fields of `Edit` that are options of some kinds of edit only."""


def edit(request: Edit, lm: Checkpoint, progress: Progress = SILENT) -> "Edited":
    """The edits of a text.

    UserError for options that have no effect, a baseline, and what the model cannot read.
    """
    takes = editing.options_of(request.kind) & OPTIONS
    for name in OPTIONS - takes:
        if request.is_given(name):
            rule = f"leave it out; it takes {', '.join(sorted(takes))}"
            raise UserError(f"{name} has no effect on this edit ({request.kind}): {rule}")
    flow = as_flow(lm.model, "a discrete baseline has no latents to edit: give a flow")
    tokenizer = lm.tokenizer

    def reading(text: str, name: str) -> Reading:
        return read(tokenizer, text, name=name, normalize=request.normalize)

    def piece(text: str, name: str) -> str:
        return reading(text, name).text.strip()

    text = reading(request.text, "text")
    length = len(text.tokens)
    context = flow.config.context
    if length > context:
        what = f"the text has {length:,} tokens, more than the context of {context}"
        raise UserError(f"{what}: shorten it")
    generator = torch.Generator().manual_seed(request.seed)
    encoded = editing.encode(flow, text.tokens[None], generator)
    options = {name: getattr(request, name) for name in OPTIONS if request.is_given(name)}
    if request.kind == "rewrite":
        pieces = as_texts(request.rewrite or (), "rewrite")
        options["pieces"] = [piece(one, "piece") for one in pieces]
    if request.replace is not None:
        old, new = request.replace
        options["old"] = piece(old, "text to replace")
        options["new"] = piece(new, "replacement")
    rows = encoded.repeated(request.num)
    source = editing.WordSource(flow, rows, generator, progress, tokenizer=tokenizer)
    return Edited(tokenizer, text, editing.EDITS[request.kind](source, **options))


@dataclass(frozen=True)
class Edited:
    """The edits of a text."""

    tokenizer: Tokenizer
    reading: Reading
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
    def notice(self) -> str | None:
        """A line if the text is not read as it was given."""
        return self.reading.notice

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
