"""The views that draw: a text as it is written, and candidates for blanks with their weights."""

from collections import defaultdict
from typing import cast

import torch
from torch import Tensor
from torch.nn.functional import pad

from tarflowlm.data.prompts import BLANK
from tarflowlm.model import as_flow
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
    page,
    slider,
    stage,
    took,
    unfinished,
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
    is_template = Writing.blank in start
    cut = values.number(top_p, "top-p", 0.05, 1.0)
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
    written: list[int] = []

    def work() -> Written:
        steps = draft.steps(range(draft.total), job)
        while True:
            try:
                written.extend(next(steps)[0].tolist())
            except StopIteration as end:
                return cast(Written, end.value)

    def show() -> str:
        shown = text_tokens(torch.tensor(written).long(), checkpoint.tokenizer, {"given": given})
        share = min(job.advanced / draft.num_positions, 1.0)
        return unfinished(shown, job.doing(f"{100 * share:.0f} %"), share)

    job = Job()
    found = yield from job.follow(work, show)
    samples = found.generation.tokens
    numbers = facts(
        (f"{draft.num_tokens:,}", "tokens"),
        took(job.seconds),
        (f"{samples.numel() / job.seconds:,.0f}", "tokens per second"),
    )
    cards = []
    for row, tokens in enumerate(samples):
        text_of_row = stage(text_tokens(tokens, checkpoint.tokenizer, {"given": given}))
        passes = ""
        if checkpoint.model.num_blocks > 1 and found.generation.passes:
            passes = _passes(draft, found, row)
        cards.append(card(text_of_row, *map(muted, draft.notices), numbers, passes))
    link = values.to_address((model, start, length, temperature, top_p, num, seed))
    command = request.command(catalogue.entry(model).command_name)
    yield page(asked(command, link=link), *cards)


def _given(draft: Draft) -> Tensor:
    """Where a text has given tokens, [T]."""
    prompt = draft.prompt(0)[: draft.num_tokens]
    return pad(prompt != BLANK, (0, draft.num_tokens - len(prompt)))


def _passes(draft: Draft, written: Written, row: int) -> str:
    """The passes of sample `row`, as opaque as p(x|h), and a note on blocks that are left out."""
    generation = written.generation
    codebook = as_flow(draft.lm.model).codebook
    passes = [tokens[row] for tokens in generation.passes]
    probabilities = []
    for tokens, state in zip(passes, generation.states, strict=True):
        p = codebook.log_posterior(state[row]).exp()
        probabilities.append(p.gather(-1, tokens[:, None].to(p.device))[:, 0])
    rows = pass_rows(
        passes,
        draft.lm.tokenizer,
        given=_given(draft),
        probabilities=probabilities,
        least_change=LEAST_CHANGE,
    )
    note = None
    hidden = len(passes) - len(rows)
    if hidden:
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
        num=values.whole(tries, "tries", 1, values.TRIES),
        particles=values.whole(particles, "particles", 1, values.PARTICLES),
        temperature=values.number(temperature, "temperature", 0.1, 2.0),
        seed=values.seed(seed),
    )
    draft = request.read(checkpoint)
    template = draft.prompt(0)
    given = _given(draft)
    tokens = [
        token if token.kind == "given" else Token(request.blank, "noise")
        for token in text_tokens(template.clamp_min(0), tokenizer, {"given": given})
    ]

    def show() -> str:
        return unfinished(tokens, job.doing("trying"), job.advanced / draft.num_positions)

    job = Job()
    batches = yield from job.follow(lambda: list(draft.batches(job)), show)
    weights = _weights(batches)
    texts = torch.cat([batch.generation.tokens for batch in batches])
    shares: dict[tuple[int, ...], float] = defaultdict(float)  # equal texts are one candidate
    for row, weight in zip(texts.tolist(), weights.tolist(), strict=True):
        shares[tuple(row)] += weight
    choices = ""
    for row in sorted(shares, key=shares.__getitem__, reverse=True):
        new = torch.tensor(row)
        share = shares[row]
        shown = spans(text_tokens(new, tokenizer, {"given": given, "changed": new != template}))
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
