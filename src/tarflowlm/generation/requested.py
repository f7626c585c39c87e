"""A request as plans: one for every prompt, for every template, or for free samples."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import cast

import torch
from torch import Tensor

from tarflowlm.data.counting import Count, words_pattern
from tarflowlm.data.prompts import (
    Gap,
    Reading,
    read,
    read_template,
    tokens_after_word,
    tokens_without,
)
from tarflowlm.errors import UserError
from tarflowlm.generation.plan import Allowed, Plan, no_room, plan
from tarflowlm.generation.rules import Enough, Forbidden, Matching, Rule
from tarflowlm.model import as_flow
from tarflowlm.requests import Sampling, Writing, as_texts
from tarflowlm.runs.checkpoint import Checkpoint

LENGTHS = {"words": 64, "sentences": 512}
"""Tokens that a word or a sentence has at most, in the mean of a text."""
MOST_PARTICLES = 64
"""The default number of particles is doubled up to this, while a choice among them is rough."""


@dataclass(frozen=True)
class _Shared:
    """What all texts of a request have in common."""

    request: Writing
    lm: Checkpoint
    past_end: bool
    draws: bool
    """Whether tokens are drawn by their weights where nothing is constrained."""
    allowed: Allowed | None
    rules: tuple[Rule, ...]
    words: tuple[Reading, ...]
    """They are added to a text unless it has them."""
    count: Count | None
    free: Sampling
    """How tokens are drawn where all may come; elsewhere as in `bound`."""
    bound: Sampling

    @property
    def is_constrained(self) -> bool:
        """Whether texts are weighted by tokens that may come, words aside."""
        return self.allowed is not None or bool(self.rules or self.request.matches)


def plans(
    request: Writing,
    lm: Checkpoint,
    past_end: bool = False,
    given: Sequence[Reading] | None = None,
) -> list[Plan]:
    """A plan for every prompt, for every template, or for free samples.

    `past_end` and the `given` prompts as in `Samples`. UserError for texts that the model cannot
    read, and for options without effect.
    """
    how = request.normalize
    shared = _shared(request, lm, past_end)
    is_constrained = bool(shared.words) or shared.is_constrained
    # only where tokens are drawn by their weights can the next one be made to begin with a space
    goes_on = lm.model.config.patch == 1 and (shared.draws or is_constrained)
    readings = given or [
        read(lm.tokenizer, prompt, name="prompt", normalize=how, goes_on=goes_on)
        for prompt in as_texts(request.prompt or (), "prompt")
    ]
    if request.template is not None:
        readings = [
            read_template(lm.tokenizer, template, request.blank, normalize=how)
            for template in as_texts(request.template, "template")
        ]
    if request.particles is not None and not readings and not is_constrained:
        what = f"particles {request.particles}: nothing is given by which to weight them"
        raise UserError(f"{what}; leave them out, or add a prompt, a template or a constraint")
    return [_of_reading(shared, one) for one in (*readings,) or (None,)]


def _shared(request: Writing, lm: Checkpoint, past_end: bool) -> _Shared:
    """UserError for words and letters that cannot be kept to."""
    tokenizer, how = lm.tokenizer, request.normalize
    after = tokens_after_word(tokenizer) if request.contains else None
    words = tuple(
        replace(read(tokenizer, f" {one.strip()}", name="contains", normalize=how), begins=after)
        for one in as_texts(request.contains, "contains")
    )
    unwanted = [one for one in as_texts(request.without, "without") if one]
    allowed = cast(Allowed | None, request.allowed)
    if letters := "".join(one for one in unwanted if len(one) == 1):
        allowed = tokens_without(tokenizer, letters)
    rules: list[Rule] = []
    if forbidden := [
        read(tokenizer, one, name="without", normalize=how).text.strip()
        for one in unwanted
        if len(one) > 1
    ]:
        pattern = words_pattern(forbidden)
        for one in words:
            if pattern.search(one.text):
                what = f"contains {one.given.strip()!r}: has a word that is not to come"
                raise UserError(f"{what}; leave one out")
        rules.append(Forbidden(tokenizer, forbidden))
    count = count_of(request, lm)
    if count is not None and (words or rules or request.matches or allowed is not None):
        rules.append(Enough(tokenizer, count))
    draws = lm.model.is_exact or as_flow(lm.model).is_single_mixd
    draws &= request.decoder != "sweeps"
    free, bound = _samplings(request, lm)
    return _Shared(
        request, lm, past_end, draws, allowed, tuple(rules), words, count, free=free, bound=bound
    )


def _samplings(request: Writing, lm: Checkpoint) -> tuple[Sampling, Sampling]:
    """How tokens are drawn where all may come, and elsewhere; the model's own way by default."""
    # without the texts, which every copy would check again
    given = Sampling(**{one.name: getattr(request, one.name) for one in fields(Sampling)})
    if given.temperature is not None or not lm.model.config.takes_temperature:
        return given, given
    bound = replace(given, temperature=lm.run.temperature)
    return bound if given.top_p is not None else replace(bound, top_p=lm.run.top_p), bound


def _of_reading(shared: _Shared, reading: Reading | None) -> Plan:
    """The plan of a prompt, a template or a free text."""
    request, tokenizer, model = shared.request, shared.lm.tokenizer, shared.lm.model
    is_template = request.template is not None
    # an end of document before a free sample, so that it begins a new document; it is hidden
    is_new = reading is None and tokenizer.end is not None
    lead = torch.tensor([tokenizer.end] if is_new else []).long()
    given = 0 if reading is None else len(reading.tokens)
    is_one_window = shared.past_end or shared.is_constrained or bool(shared.words)
    shown = _length(request, given, model.config.context, len(lead), is_one_window)
    template: list[Tensor | Gap] = [lead]
    if reading is not None:
        template += reading.parts or [reading.tokens]
        if not is_template and given >= shown:
            notice = "" if reading.notice is None else f"; {reading.notice}"
            raise UserError(f"{no_room(given, shown)}{notice}")
    text = "" if reading is None else reading.text
    begins = None if reading is None else reading.begins
    rules = shared.rules
    if request.matches is not None:
        rules = (*rules, Matching(tokenizer, request.matches, after_space=begins is not None))
    count = shared.count
    if count is not None and count.end(text, is_whole=True) is not None:
        raise UserError(f"{count.unit} {count.number}: the prompt has as many; ask for more")
    # a word of the prompt does not go on, and neither does one that is added
    ends = next((one for one in shared.words if re.search(rf"{_start(one)}\Z", text)), None)
    if begins is None and ends is not None:
        begins = ends.begins
    added = _added(shared.words, text)
    if added:
        room = shown - given - sum(len(one.tokens) for one in added)
        if room < 0:
            wanted = ", ".join(repr(one.text.strip()) for one in added)
            what = f"contains {wanted}: with the prompt it has {-room} tokens more"
            raise UserError(f"{what} than the length of {shown}: raise the length")
        for one in added:
            template += [Gap(room, least=0, begins=begins, once=True), one.tokens]
            begins = one.begins
    # the probability of such tokens weighs particles, and is all that stacks can be told
    if begins is not None and not added and (not shared.draws or (request.particles or 1) > 1):
        template.append(Gap(shown - given, least=shown - given, begins=begins))
    free, bound = shared.free, shared.bound
    is_free = not is_template and not rules and shared.allowed is None
    is_free &= all(map(torch.is_tensor, template))
    # a constraint may need improbable tokens: the model's own top-p then counts those that may come
    is_own = free.top_p is not None and bound.top_p is None
    top_p = free.top_p if is_own and not is_free and not is_template else None
    found = plan(
        model,
        template,
        free if is_free else bound,
        num_tokens=len(lead) + shown,
        allowed=shared.allowed,
        rules=rules,
        top_p=top_p,
        most_particles=MOST_PARTICLES,
        # tokens between given pieces belong to the same document, and so do counted words
        banned=tokenizer.end if is_template or added or count is not None else None,
        end=tokenizer.end if request.may_end and not shared.past_end else None,
        lead=len(lead),
        continues=not is_template or request.length is not None,
    )
    return replace(found, reading=reading, begins=begins)


def _start(words: Reading) -> str:
    """A pattern of words that may go on."""
    return rf"(?<!\w){re.escape(words.text.strip())}"


def _added(words: Sequence[Reading], text: str) -> list[Reading]:
    """The words that a text does not have yet, each once, without those that are part of others."""
    added: list[Reading] = []
    for one in sorted(words, key=lambda one: -len(one.text)):
        given = [text, *(other.text for other in added)]
        if not any(re.search(rf"{_start(one)}(?!\w)", other) for other in given):
            added.append(one)
    return added


def _length(request: Writing, given: int, context: int, lead: int, is_one_window: bool) -> int:
    """Tokens of a text without its lead; those `given` are in its prompt or template."""
    asked = request.length
    if request.max_new_tokens is not None:
        asked = given + request.max_new_tokens
    if asked is not None:
        return asked - (lead if is_one_window and asked == context > 1 else 0)
    if request.template is not None:
        return given
    length = max(1, context - lead)
    if request.count is None or is_one_window:
        return length
    unit, number = request.count
    return max(length, given + LENGTHS[unit] * number)


def count_of(request: Writing, lm: Checkpoint) -> Count | None:
    """When a text of so many words or sentences is over; None where neither is asked for.

    UserError for an alphabet without full stops.
    """
    if request.count is None:
        return None
    unit, number = request.count
    signs = b"".join(lm.tokenizer.token_bytes)
    if unit == "sentences" and b"." not in signs:
        what = f"sentences {number}: the alphabet of this model has no full stop"
        raise UserError(f"{what}; count words, or take another model, such as stories")
    return Count(unit, number, has_capitals=signs != signs.lower())
