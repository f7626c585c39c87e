"""The views that draw: a text while it is written, and candidates for blanks with their weights."""

import re
from collections import defaultdict
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import replace
from functools import partial
from html import escape
from typing import TypeVar

import torch
from torch import Tensor

from tarflowlm.data.prompts import BLANK, GAP, has_blanks, read_template, unescaped
from tarflowlm.errors import UserError
from tarflowlm.generation.texts import Samples, Written
from tarflowlm.model import as_flow
from tarflowlm.requests import Writing
from tarflowlm.runs.checkpoint import Checkpoint
from tarflowlm.terminal.texts import trust
from tarflowlm.terminal.tokens import Token, text_tokens, visible
from tarflowlm_apps.grid import div
from tarflowlm_apps.studio import pieces, values
from tarflowlm_apps.studio.catalogue import Catalogue
from tarflowlm_apps.studio.job import Job

T = TypeVar("T")

MEASURES = "ess", "pareto_k", "particles"
LOOSELY = "With one candidate this model mostly ignores the given text: see Infill for blanks."
MORE = "Infill can take more particles"


def write(catalogue: Catalogue, *given: object) -> pieces.Pages:
    """The text while it is written, then the samples and their passes. Two models have columns.

    `values.LINKED` names the `given` values.
    """
    asked = dict(zip(values.LINKED, given, strict=True))
    start = asked["text"] = values.text(asked["text"])
    model, beside = asked["model"], asked["beside"]
    other = asked["beside"] = beside[0] if isinstance(beside, list) and beside else beside or ""
    names = (model, other) if other not in ("", model) else (model,)
    for name in names if has_gap(start) else ():
        able = catalogue.for_gaps(name)
        if able != name:
            place = "model" if name == model else "beside"
            link = values.to_address(asked | {place: able})
            yield pieces.page(pieces.notice(no_gaps(name), f"use {able}", link))
            return
    is_template = has_blanks(start)
    prompt = "" if is_template else unescaped(start, Writing.blank)
    cut = values.number(asked["top_p"], "top-p", 0.05, 1.0)
    contains = asked["contains"] = values.text(asked["contains"]).strip()
    without = asked["without"] = values.text(asked["without"]).strip()
    if is_template and contains:
        raise UserError("a text with blanks takes no wanted words: write them into the text")
    request = Writing(
        prompt=prompt or None,
        template=start if is_template else None,
        length=None if is_template else values.whole(asked["length"], "length", 1, values.TOKENS),
        temperature=values.number(asked["temperature"], "temperature", 0.1, 2.0),
        top_p=None if cut == 1.0 or is_template else cut,
        num=values.whole(asked["num"], "samples", 1, values.SAMPLES),
        seed=values.seed(asked["seed"]),
        contains=values.several(contains),
        without=values.several(without),
    )
    link = values.to_address(asked)
    columns: list[str] = []

    def shown(above: str, *cards: str) -> str:
        return pieces.page(div("st-pair", *columns, div("st-column", above, *cards)))

    for name in names:
        command = request.command(catalogue.entry(name).command_name)
        # one link is enough for both
        above = pieces.asked(command, link="" if columns else link)
        cards = yield from _samples(catalogue, name, request, partial(shown, above))
        columns.append(div("st-column", above, *cards))
    yield pieces.page(div("st-pair", *columns))


def has_gap(text: str) -> bool:
    """Whether a text has a gap of unknown length."""
    return re.search(GAP, text) is not None


def no_gaps(model: object) -> str:
    """Why a model does not fill in a gap."""
    return f"{model} cannot fill in [...], a gap of unknown length: write _ for every token"


def _samples(
    catalogue: Catalogue, model: object, request: Writing, around: Callable[[str], str]
) -> Generator[str, None, list[str]]:
    """A card for every sample of a model."""
    lm = catalogue.load(model)
    is_watched = lm.model.num_blocks > 1
    samples = Samples(request, lm, past_end=is_watched)
    given = _given(samples)
    parts: list[list[int]] = []

    def work() -> Written:
        steps = samples.batch(range(samples.total), job)
        for tokens in steps:
            if not parts or samples.plans[0].end not in parts[-1]:
                parts.append(tokens[0].tolist())
        return steps.written

    def so_far() -> str:
        written = parts.copy()
        tokens = torch.tensor([token for part in written for token in part]).long()
        shown = text_tokens(tokens, lm.tokenizer, {"given": given})
        return pieces.unfinished(shown)

    job = Job("writing", samples.num_tokens)
    found = yield from job.follow(work, so_far, around)
    generation = found.generation
    notes = [*samples.notices]
    if samples.follows_loosely:
        notes.append(LOOSELY)
    masks = [_given(samples, found, row) for row in range(len(found.streams))]
    drawn = generation.tokens.numel() - sum(int(mask.sum()) for mask in masks)
    facts = [pieces.took(job.seconds), (f"{drawn / job.seconds:,.0f}", "tokens per second")]
    cards = []
    for row, (stream, mask) in enumerate(zip(found.streams, masks, strict=True)):
        # include the end of the document, which is shown as a mark
        tokens = generation.tokens[row, : stream.length + stream.has_ended]
        shown = text_tokens(tokens, lm.tokenizer, {"given": mask})
        cut = "" if stream.has_ended or request.template else ", cut at this length"
        rests = []
        if generation.evidence is not None and found.particles > 1:
            ground = trust(generation.evidence, slice(row, row + 1), MORE)
            rests = [f"This text {ground}."]
        cards.append(
            pieces.card(
                pieces.stage(shown, model=str(model)),
                *map(pieces.muted, [*notes, *rests]),
                pieces.facts((f"{stream.length:,}", f"tokens{cut}"), *facts),
                _passes(catalogue, lm, found, row, mask) if is_watched else "",
            )
        )
    return cards


def _passes(catalogue: Catalogue, lm: Checkpoint, written: Written, row: int, given: Tensor) -> str:
    """The slider over the passes of a sample; in words if they show nothing."""
    flow = as_flow(lm.model)
    length = written.streams[row].length
    states = [state[row, :length] for state in written.generation.states(flow)]
    if not length:
        return ""
    if not states:
        most = f"at most {flow.config.context} tokens"
        return pieces.muted(f"Passes are shown for texts of {most}: choose a shorter length.")
    texts = [text[row, :length] for text in written.generation.passes(flow)]
    rows, is_much = pieces.passes(flow, lm.tokenizer, texts, states, given=given[:length])
    if is_much:
        return pieces.slider(rows, "pass", pieces.BY_BLOCK, is_open=row == 0) + pieces.key(flow)
    name = catalogue.for_passes
    other = f" Choose {name} to see two steps." if name else ""
    return pieces.muted(f"In this model block 1 does all the writing, in one step.{other}")


def _given(samples: Samples, written: Written | None = None, row: int = 0) -> Tensor:
    """Where a text has given tokens, [T]; in sample `row` where gaps were filled."""
    if written is not None and written.generation.filled is not None:
        return written.generation.filled.given[row]
    plan = samples.plans[0]
    given = torch.zeros(plan.num_tokens - plan.lead, dtype=torch.bool)
    if plan.reading is not None:
        known = plan.reading.tokens[: len(given)] != BLANK
        given[: len(known)] = known
    return given


def infill(
    catalogue: Catalogue,
    model: object,
    text: object,
    tries: object,
    particles: object,
    temperature: object,
    seed: object,
) -> pieces.Pages:
    """Candidates for the blanks of `text`, the likeliest first.

    The weight of a try is its evidence, the mean weight of its particles. This is unbiased for
    p(given), so a draw from the tries by weight is a draw from all of their particles, and the
    weighted mean of their probabilities of a length is the mean over all particles.
    """
    checkpoint = catalogue.load(model)
    template = values.text(text)
    if not has_blanks(template):
        raise UserError("the text has no blank: write _ for a token, or [...] for a gap")
    if re.search(rf"{GAP}\s*$", template):
        raise UserError("the text ends in a gap: put words after it, or continue it in Write")
    able = catalogue.for_gaps(model)
    if has_gap(template) and able != model:
        raise UserError(f"{no_gaps(model)}, or choose {able}")
    request = Writing(
        template=template,
        num=values.whole(tries, "tries", 1, values.TRIES),
        particles=values.whole(particles, "particles", 1, values.PARTICLES),
        temperature=values.number(temperature, "temperature", 0.1, 2.0),
        seed=values.seed(seed),
    )
    samples = Samples(request, checkpoint)
    plan = samples.plans[0]
    text_with_blanks = visible("" if plan.reading is None else plan.reading.text)
    with_blanks = pieces.unfinished([Token(text_with_blanks)])
    job = Job("trying", samples.num_tokens)
    batches = yield from job.follow(lambda: list(samples.batches(job)), lambda: with_blanks)
    weights = weights_of(batches)
    choices = ""
    for tokens, share in shares_of(_fillings(samples, batches), weights):
        number = div("st-share", f"<b>{share:.0%}</b>", pieces.bar(share))
        choices += div("st-choice", number, div("", pieces.stage(tokens)))
    numbers = pieces.facts((f"{plan.particles:,}", "particles per try"), pieces.took(job.seconds))
    yield pieces.page(
        pieces.asked(request.command(catalogue.entry(model).command_name)),
        pieces.card(
            pieces.muted("Underlined: your text. Green: what the model put in."),
            choices,
            *map(pieces.muted, samples.notices),
            pieces.muted(_tries(weights) + _candidates(batches)),
            *_lengths(batches, weights),
            numbers,
        ),
    )


def offer(catalogue: Catalogue, writer: object, text: object) -> pieces.Pages:
    """Words that fit where `text` has [...], the likeliest first, as buttons that studio.js reads.

    They are by the model that wrote the text if it fills in gaps, else by one that does.
    """
    model = catalogue.for_gaps(writer)
    lm = catalogue.load(model)
    is_of_letters = lm.tokenizer.kind == "char"
    before, _, after = values.text(text).partition("[...]")
    if is_of_letters and not after:
        raise UserError("this word ends the text: choose one before it")
    gap = f"[...{12 if is_of_letters else 4}]" if after else "_"
    # the words next to the gap count most: those far from it leave, until the rest fits
    while before or after:
        if len(read_template(lm.tokenizer, before + gap + after).tokens) <= lm.model.config.context:
            break
        if len(before) > 2 * len(after):
            before = re.sub(r"^(\S*\s|_)", "", before[len(before) // 4 + 1 :])
        else:
            after = re.sub(r"(?<=\S)\s\S*$|\\$", "", after[: 3 * len(after) // 4])
    request = Writing(
        template=before + gap + after,
        num=6,
        particles=8,
        temperature=catalogue.temperature(model),
    )
    samples = Samples(request, lm)
    job = Job(f"{model} looks for words that fit", samples.num_tokens)
    around = partial(pieces.offers, f"{writer}\n{values.text(text)}")
    batches = yield from job.follow(lambda: list(samples.batches(job)), str, around)
    weights = weights_of(batches)
    words = [
        "".join(token.symbol for token in tokens if token.kind != "given").strip()
        for tokens in _fillings(samples, batches)
    ]
    found = "".join(
        f'<button type="button" class="st-word" data-word="{escape(word)}">'
        f"{escape(word)} <b>{share:.0%}</b></button>"
        for word, share in shares_of(words, weights)
        if word
    )
    yield around(
        pieces.muted(f"{model} would also write:"),
        div("st-words", found),
        pieces.muted(_tries(weights)),
    )


def shares_of(found: Iterable[T], weights: Tensor) -> list[tuple[T, float]]:
    """Equal candidates are one, whose weights add up; the heaviest first."""
    shares: dict[T, float] = defaultdict(float)
    for one, weight in zip(found, weights.tolist(), strict=True):
        shares[one] += weight
    return sorted(shares.items(), key=lambda pair: -pair[1])


def _tries(weights: Tensor) -> str:
    """The ground of shares: the effective number of tries, from 1 to all of them."""
    effective = 1 / (weights**2).sum().item()
    return f"The shares rest on about {effective:.1f} independent tries of {len(weights)}."


def _candidates(batches: list[Written]) -> str:
    """The ground of each try; empty for tries of one candidate."""
    particles = batches[0].particles
    found = [batch.generation.evidence for batch in batches]
    evidence = [one for one in found if one is not None]
    if not evidence or particles == 1:
        return ""
    every = {name: torch.cat([getattr(one, name) for one in evidence]) for name in MEASURES}
    return f" Each try {trust(replace(evidence[0], **every), slice(None))}."


def _fillings(samples: Samples, batches: list[Written]) -> Iterator[tuple[Token, ...]]:
    """Every try, with its new tokens marked."""
    for batch in batches:
        for index, row in enumerate(batch.generation.tokens.cpu()):
            tokens = row[: batch.lengths[index]]
            mask = _given(samples, batch, index)
            shown = text_tokens(tokens, samples.lm.tokenizer, {"given": mask, "changed": ~mask})
            yield tuple(shown)


def _lengths(batches: list[Written], weights: Tensor) -> Iterator[str]:
    """How many tokens each gap of unknown length may have, folded."""
    found = [batch.generation.filled.lengths for batch in batches if batch.generation.filled]
    charts = ""
    for number, tables in enumerate(zip(*found, strict=True), 1):
        shares = (weights[:, None] * torch.cat(tables)).sum(0).tolist()
        charts += div("st-chart", pieces.title(f"Gap {number}"), pieces.columns(shares, "token"))
    if charts:
        words = "These are averages over all candidates of all tries, of which a few are shown."
        yield pieces.folded("How long the gaps may be", pieces.muted(words), charts)


def weights_of(batches: list[Written]) -> Tensor:
    """The weight of every try: equal if nothing is given, or if all evidence is zero."""
    evidence = []
    for batch in batches:
        found = batch.generation.evidence
        evidence.append(torch.zeros(len(batch.rows)) if found is None else found.log_evidence)
    weights = torch.cat(evidence).softmax(0)
    return weights.nan_to_num(1 / len(weights))
