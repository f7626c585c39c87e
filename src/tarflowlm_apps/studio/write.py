"""The views that draw: a text while it is written, and candidates for blanks with their weights."""

from collections import defaultdict
from collections.abc import Callable, Generator, Iterator
from functools import partial

import torch
from torch import Tensor

from tarflowlm.data.prompts import BLANK, has_blanks, unescaped
from tarflowlm.errors import counted
from tarflowlm.generation.inversion import Returning
from tarflowlm.generation.texts import Samples, Written
from tarflowlm.model import as_flow
from tarflowlm.requests import Writing
from tarflowlm.runs.checkpoint import Checkpoint
from tarflowlm.terminal.texts import Token, text_tokens, visible
from tarflowlm_apps.grid import div, spans
from tarflowlm_apps.studio import pieces, values
from tarflowlm_apps.studio.catalogue import Catalogue
from tarflowlm_apps.studio.job import Job

BOXES = "A box is one call of the model. Its tokens on blue were guessed, and the model agreed."


def write(
    catalogue: Catalogue,
    model: object,
    beside: object,
    text: object,
    length: object,
    temperature: object,
    top_p: object,
    num: object,
    seed: object,
) -> pieces.Pages:
    """The text while it is written, then the samples and their passes. Two models have columns."""
    start = values.text(text)
    is_template = has_blanks(start)
    prompt = "" if is_template else unescaped(start, Writing.blank)
    cut = values.number(top_p, "top-p", 0.05, 1.0)
    request = Writing(
        prompt=prompt or None,
        template=start if is_template else None,
        num_tokens=None if is_template else values.whole(length, "length", 1, values.TOKENS),
        temperature=values.number(temperature, "temperature", 0.1, 2.0),
        top_p=None if cut == 1.0 else cut,
        num=values.whole(num, "samples", 1, values.SAMPLES),
        seed=values.seed(seed),
    )
    other = beside[0] if isinstance(beside, list) and beside else beside or ""
    link = values.to_address((model, other, start, length, temperature, top_p, num, seed))
    columns: list[str] = []

    def shown(above: str, *cards: str) -> str:
        return pieces.page(div("st-pair", *columns, div("st-column", above, *cards)))

    for name in (model, other) if other not in ("", model) else (model,):
        command = request.command(catalogue.entry(name).command_name)
        # one link is enough for both
        above = pieces.asked(command, link="" if columns else link)
        cards = yield from _samples(catalogue, name, request, partial(shown, above))
        columns.append(div("st-column", above, *cards))
    yield pieces.page(div("st-pair", *columns))


def _samples(
    catalogue: Catalogue, model: object, request: Writing, around: Callable[[str], str]
) -> Generator[str, None, list[str]]:
    """A card for every sample of a model."""
    lm = catalogue.load(model)
    is_watched = lm.model.num_blocks > 1
    samples = Samples(request, lm, past_end=is_watched)
    given = _given(samples)
    is_drafted = lm.model.drafter is not None and not is_watched
    is_drafted &= samples.total == samples.plans[0].particles == 1
    parts: list[list[int]] = []

    def work() -> Written:
        steps = Returning(samples.steps(range(samples.total), job))
        for tokens in steps:
            if not parts or samples.plans[0].end not in parts[-1]:
                parts.append(tokens[0].tolist())
        return steps.value

    def so_far() -> str:
        written = parts.copy()
        tokens = torch.tensor([token for part in written for token in part]).long()
        shown = text_tokens(tokens, lm.tokenizer, {"given": given})
        return pieces.unfinished(shown, list(map(len, written)) if is_drafted else ())

    job = Job("writing", samples.num_tokens)
    found = yield from job.follow(work, so_far, around)
    generation = found.generation
    notes = [*samples.notices]
    calls = [len(part) for part in parts]
    rate = f"{generation.tokens.numel() / job.seconds:,.0f}"
    facts = [pieces.took(job.seconds), (rate, "tokens per second")]
    if is_drafted:
        notes.append(BOXES)
        # what is given comes first
        own = calls[bool(given[0]) :]
        facts.append((f"{sum(own) / len(own):.1f}", "tokens per call"))
    cards = []
    for row, stream in enumerate(found.streams):
        # include the end of the document, which is shown as a mark
        tokens = generation.tokens[row, : stream.length + stream.has_ended]
        mask = _given(samples, found, row)
        shown = text_tokens(tokens, lm.tokenizer, {"given": mask})
        cards.append(
            pieces.card(
                pieces.stage(shown, calls if is_drafted else ()),
                *map(pieces.muted, notes),
                pieces.facts((f"{stream.length:,}", "tokens"), *facts),
                _passes(lm, found, row, mask) if is_watched else "",
            )
        )
    return cards


def _passes(lm: Checkpoint, written: Written, row: int, given: Tensor) -> str:
    """The slider over the passes of a sample; empty without latents."""
    flow = as_flow(lm.model)
    length = written.streams[row].length
    states = [state[row, :length] for state in written.generation.states(flow)]
    if not states:
        return ""
    texts = [text[row, :length] for text in written.generation.passes(flow)]
    rows, is_much = pieces.passes(flow, lm.tokenizer, texts, states, given=given)
    return pieces.slider(rows, is_open=row == 0 and is_much)


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
    request = Writing(
        template=values.text(text),
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
    weights = _weights(batches)
    shares: dict[str, float] = defaultdict(float)  # equal texts are one candidate
    for shown, weight in zip(_fillings(samples, batches), weights.tolist(), strict=True):
        shares[shown] += weight
    choices = ""
    for shown in sorted(shares, key=shares.__getitem__, reverse=True):
        choices += _choice(shares[shown], div("st-stage", shown))
    effective = 1 / (weights**2).sum().item()  # from 1 to all of them
    count = f"<b>About {effective:.1f} of {counted(len(weights), 'try', 'tries')} count.</b>"
    trust = (
        f"{count} More particles find more texts that fit.{pieces.bar(effective / len(weights))}"
    )
    numbers = pieces.facts((f"{plan.particles:,}", "particles per try"), pieces.took(job.seconds))
    yield pieces.page(
        pieces.asked(request.command(catalogue.entry(model).command_name)),
        pieces.card(choices, *map(pieces.muted, samples.notices)),
        *_lengths(batches, weights),
        pieces.card(trust, numbers),
    )


def offer(catalogue: Catalogue, model: object, *values: object) -> pieces.Pages:
    """`infill` by the chosen model if it fills in gaps, else by one that does."""
    yield from infill(catalogue, catalogue.for_gaps(model), *values)


def _choice(share: float, words: str) -> str:
    """One of several possibilities, with its share."""
    return div(
        "st-choice", div("st-share", f"<b>{100 * share:.0f} %</b>", pieces.bar(share)), words
    )


def _fillings(samples: Samples, batches: list[Written]) -> Iterator[str]:
    """Every try in HTML, with its new tokens marked."""
    for batch in batches:
        for index, row in enumerate(batch.generation.tokens.cpu()):
            tokens = row[: batch.lengths[index]]
            mask = _given(samples, batch, index)
            shown = text_tokens(tokens, samples.lm.tokenizer, {"given": mask, "changed": ~mask})
            yield spans(shown)


def _lengths(batches: list[Written], weights: Tensor) -> Iterator[str]:
    """A card for every gap of unknown length: how many tokens it may have."""
    found = [batch.generation.filled.lengths for batch in batches if batch.generation.filled]
    for number, tables in enumerate(zip(*found, strict=True), 1):
        rows = ""
        for length, share in enumerate((weights[:, None] * torch.cat(tables)).sum(0).tolist(), 1):
            rows += _choice(share, counted(length, "token"))
        yield pieces.card(pieces.title(f"Length of gap {number}"), rows)


def _weights(batches: list[Written]) -> Tensor:
    """The weight of every try: equal if nothing is given, or if all evidence is zero."""
    evidence = []
    for batch in batches:
        found = batch.generation.evidence
        evidence.append(torch.zeros(len(batch.rows)) if found is None else found.log_evidence)
    weights = torch.cat(evidence).softmax(0)
    return weights.nan_to_num(1 / len(weights))
