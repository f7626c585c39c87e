"""The views that edit: named words, a word for another, or a share of the words or of a state."""

from collections import defaultdict
from dataclasses import replace

from tarflowlm.cli.edit import advice
from tarflowlm.data.prompts import read
from tarflowlm.editing.edits import edit
from tarflowlm.errors import UserError, counted
from tarflowlm.requests import Edit
from tarflowlm.terminal.tokens import text_tokens
from tarflowlm_apps.studio import values
from tarflowlm_apps.studio.catalogue import Catalogue
from tarflowlm_apps.studio.job import Job
from tarflowlm_apps.studio.pieces import (
    Pages,
    asked,
    card,
    facts,
    muted,
    page,
    stage,
    took,
    unfinished,
)

WORDS, LATENTS, NOISE = KINDS = ("words", "latents", "noise")
"""The kinds of change: words, or the states h^(0) = z and h^(L) = u."""


def rewrite(
    catalogue: Catalogue, model: object, text: object, words: object, num: object, seed: object
) -> Pages:
    """Texts in which all occurrences of `words`, separated by commas, are resampled."""
    named = [word.strip() for word in values.text(words).split(",")]
    pieces = tuple(word for word in named if word)
    if not pieces:
        raise UserError("name the words to rewrite, separated by commas")
    request = replace(_request(text, num, seed), rewrite=pieces, everywhere=True)
    yield from _edited(catalogue, model, request)


def exchange(
    catalogue: Catalogue,
    model: object,
    text: object,
    old: object,
    new: object,
    around: object,
    num: object,
    seed: object,
) -> Pages:
    """Texts with `new` in the place of the first `old`, and so many words around it new, too."""
    words = values.text(old).strip(), values.text(new).strip()
    if not all(words):
        raise UserError("give a word of the text, and one to put in its place")
    near = values.whole(around, "words around it", 0, values.AROUND)
    yield from _edited(
        catalogue, model, replace(_request(text, num, seed), replace=words, around=near)
    )


def change(
    catalogue: Catalogue,
    model: object,
    text: object,
    kind: object,
    strength: object,
    num: object,
    seed: object,
) -> Pages:
    """Texts in which a share `strength` of the words, of the latents or of the noise is new."""
    levels = {WORDS: None, LATENTS: 0, NOISE: catalogue.load(model).model.num_blocks}
    request = replace(
        _request(text, num, seed),
        level=levels.get(str(kind)),
        strength=values.number(strength, "strength", 0.0, 1.0),
    )
    yield from _edited(catalogue, model, request)


def _request(text: object, num: object, seed: object) -> Edit:
    return Edit(
        text=values.text(text),
        num=values.whole(num, "edits", 1, values.SAMPLES),
        seed=values.seed(seed),
    )


def _edited(catalogue: Catalogue, model: object, request: Edit) -> Pages:
    """The progress, then the edits below the original."""
    checkpoint = catalogue.load(model)
    tokenizer = checkpoint.tokenizer
    before = text_tokens(read(tokenizer, request.text).tokens, tokenizer)
    job = Job("editing")
    found = yield from job.follow(
        lambda: edit(request, checkpoint, job), lambda: unfinished(before)
    )
    notice = found.reading.notice
    note = "the original" if notice is None else f"the original, {notice}"
    sign = "" if checkpoint.model.is_exact else "≤ "
    numbers = facts((f"{sign}{found.bits_before:.2f}", "bits per character"), took(job.seconds))
    cards = [card(stage(before), muted(note), numbers)]
    equal: dict[str, list[int]] = defaultdict(list)
    for row, edited in enumerate(found.texts):
        equal[edited].append(row)
    for rows in equal.values():
        row = rows[0]
        tokens, changed = found.change.tokens[row].cpu(), found.change.changed[row].cpu()
        numbers = facts(
            (f"{int(changed.sum())}", f"of {counted(len(changed), 'token')} changed"),
            (f"{sign}{found.bits[row]:.2f}", "bits per character"),
        )
        shown = stage(text_tokens(tokens, tokenizer, {"changed": changed}))
        which = " and ".join(str(row + 1) for row in rows)
        which = f"edit {which}" if len(rows) == 1 else f"edits {which}"
        cards.append(card(muted(which), shown, numbers))
    notes = [muted("Green: new. Fewer bits: the model finds the text likelier.")]
    if request.level is not None and not found.change.changed.any():
        notes.append(muted("No point has moved far enough to be read as another token."))
    lack = advice(request, found.change)
    if lack is not None:
        notes.append(muted(f"{lack[0][0].upper()}{lack[0][1:]}."))
    command = request.command(catalogue.entry(model).command_name)
    yield page(asked(command), *cards, *notes)
