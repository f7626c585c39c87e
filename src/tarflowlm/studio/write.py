"""The views that draw: a text as it is written, and candidates for blanks with their weights."""

from typing import cast

import torch
from torch import Tensor

from tarflowlm.data.prompts import BLANK
from tarflowlm.model import TarFlowLM
from tarflowlm.studio import values
from tarflowlm.studio.catalogue import Catalogue
from tarflowlm.studio.job import Job
from tarflowlm.studio.pieces import (
    Pages,
    asked,
    bar,
    card,
    facts,
    muted,
    open_stage,
    page,
    slider,
    stage,
    took,
)
from tarflowlm.terminal.bars import counted
from tarflowlm.texts import Draft, Writing, Written
from tarflowlm.views.grid import Token, pass_rows, spans, text_tokens

LEAST_CHANGE = 0.1  # a pass is shown if it changes at least this share of the tokens


def write(
    catalogue: Catalogue,
    model: object,
    text: object,
    length: object,
    temperature: object,
    top_p: object,
    num: object,
    seed: object,
) -> Pages:
    """HTML of the text while it is written, then of the samples and their passes."""
    checkpoint = catalogue.load(model)
    start = values.text(text)
    cut = values.number(top_p, "top-p", 0.05, 1.0)
    is_template = values.MARK in start
    request = Writing(
        prompts=(start,) if start and not is_template else (),
        template=start if is_template else None,
        num_tokens=None if is_template else values.whole(length, "length", 1, values.TOKENS),
        temperature=values.number(temperature, "temperature", 0.1, 2.0),
        top_p=None if cut == 1.0 else cut,
        num=values.whole(num, "samples", 1, values.SAMPLES),
        seed=values.seed(seed),
    )
    draft = request.read(checkpoint)
    given = _given(draft)

    def work(job: Job[Written]) -> Written:
        steps = draft.steps(range(draft.total), job)
        while True:
            try:
                job.tokens.append(next(steps))
            except StopIteration as end:
                return cast(Written, end.value)

    def show() -> str:
        written = torch.cat(job.tokens, 1)[0] if job.tokens else torch.zeros(0, dtype=torch.long)
        shown = text_tokens(written, checkpoint.tokenizer, given=given[: len(written)])
        share = min(job.advanced / draft.num_positions, 1.0)
        return page(card(open_stage(shown), bar(share), muted(job.doing(f"{100 * share:.0f} %"))))

    job = Job(work)
    written = yield from job.follow(show)
    drawn = written.generation.tokens.numel()
    numbers = facts(
        (f"{draft.num_tokens:,}", "tokens"),
        took(job.seconds),
        (f"{drawn / job.seconds:,.0f}", "tokens per second"),
    )
    cards = []
    for row, tokens in enumerate(written.generation.tokens):
        body = stage(text_tokens(tokens, checkpoint.tokenizer, given=given))
        body += "".join(map(muted, draft.notices)) + numbers
        if checkpoint.model.num_blocks > 1 and written.generation.passes:
            body += _passes(draft, written, row)
        cards.append(card(body))
    link = values.to_address((model, text, length, temperature, top_p, num, seed))
    command = request.command(catalogue.entry(model).command_name)
    yield page(asked(command, link=link), *cards)


def _given(draft: Draft) -> Tensor:
    """Where a text has given tokens, [T]."""
    given = torch.zeros(draft.num_tokens, dtype=torch.bool)
    for reading in draft.given:
        given[: len(reading.tokens)] = reading.tokens[: len(given)] != BLANK
    return given


def _passes(draft: Draft, written: Written, row: int) -> str:
    """The passes of sample `row`, as opaque as p(x|h), and a note on blocks that are left out."""
    generation = written.generation
    flow = cast(TarFlowLM, draft.lm.model)
    passes = [tokens[row] for tokens in generation.passes]
    probabilities = []
    for tokens, state in zip(passes, generation.states, strict=True):
        p = flow.codebook.log_posterior(state[row]).exp()
        probabilities.append(p.gather(-1, tokens[:, None].to(p.device))[:, 0])
    rows = pass_rows(
        passes,
        draft.lm.tokenizer,
        given=_given(draft),
        probabilities=probabilities,
        least_change=LEAST_CHANGE,
    )
    note = None
    if hidden := len(passes) - len(rows):
        note = f"Not shown: {counted(hidden, 'block')} above, which changed next to nothing."
    return slider(rows, is_open=row == 0) + muted(note)


def infill(
    catalogue: Catalogue,
    model: object,
    text: object,
    tries: object,
    particles: object,
    temperature: object,
    seed: object,
) -> Pages:
    """HTML of candidates for the blanks of `text`, the likeliest first.

    Every try runs its own particles. Its evidence, the mean weight of its particles, is unbiased
    for p(given), so a draw from the tries by evidence is a draw by all of their particles. This is
    the weight of its text.
    """
    checkpoint = catalogue.load(model)
    tokenizer = checkpoint.tokenizer
    request = Writing(
        template=values.text(text),
        blank=values.MARK,
        num=values.whole(tries, "tries", 1, values.TRIES),
        particles=values.whole(particles, "particles", 1, values.PARTICLES),
        temperature=values.number(temperature, "temperature", 0.1, 2.0),
        seed=values.seed(seed),
    )
    draft = request.read(checkpoint)
    template = draft.given[0].tokens
    given = _given(draft)
    tokens = [
        token if token.kind == "given" else Token(values.MARK, "noise")
        for token in text_tokens(template.clamp_min(0), tokenizer, given=given)
    ]

    def work(job: Job[list[Written]]) -> list[Written]:
        return list(draft.batches(job))

    def show() -> str:
        progress = bar(job.advanced / draft.num_positions)
        return page(card(open_stage(tokens), progress, muted(job.doing("trying"))))

    job = Job(work)
    batches = yield from job.follow(show)
    weights = _weights(batches)
    shares: dict[tuple[int, ...], float] = {}  # equal texts are one candidate
    texts = torch.cat([batch.generation.tokens for batch in batches]).tolist()
    for row, weight in zip(texts, weights.tolist(), strict=True):
        shares[tuple(row)] = shares.get(tuple(row), 0.0) + weight
    choices = ""
    for row, share in sorted(shares.items(), key=lambda pair: -pair[1]):
        new = torch.tensor(row)
        shown = spans(text_tokens(new, tokenizer, changed=new != template, given=given))
        head = f'<div class="st-share"><b>{100 * share:.0f} %</b>{bar(share)}</div>'
        choices += f'<div class="st-choice">{head}<div class="st-stage">{shown}</div></div>'
    numbers = facts((f"{draft.particles:,}", "particles per try"), took(job.seconds))
    yield page(
        asked(request.command(catalogue.entry(model).command_name)),
        card(choices, *map(muted, draft.notices)),
        card(_trust(weights), numbers),
    )


def _weights(batches: list[Written]) -> Tensor:
    """The weight of every try: equal where nothing is given, and where all evidence is zero."""
    evidence = []
    for batch in batches:
        found = batch.generation.evidence
        evidence.append(torch.zeros(len(batch.rows)) if found is None else found.log_evidence)
    weights = torch.cat(evidence).softmax(0)
    return weights.nan_to_num(1 / len(weights))


def _trust(weights: Tensor) -> str:
    """How far the weights can be trusted: so many tries count, from 1 to all of them."""
    effective = 1 / (weights**2).sum().item()
    words = f"<b>About {effective:.1f} of {counted(len(weights), 'try', 'tries')} count.</b>"
    return f"{words} More particles find more texts that fit.{bar(effective / len(weights))}"
