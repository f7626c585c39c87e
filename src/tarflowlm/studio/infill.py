"""The view that fills blanks in: candidates drawn by particles, their weights, and how far these can be trusted."""

from collections.abc import Generator, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tarflowlm.data import Tokenizer
from tarflowlm.data.prompts import BLANK, read_template
from tarflowlm.device import threads_for
from tarflowlm.generation import Watch, generate
from tarflowlm.generation.window import num_positions
from tarflowlm.report.grid import Token, spans, text_tokens
from tarflowlm.runs.checkpoint import Checkpoint
from tarflowlm.studio import request
from tarflowlm.studio.catalogue import Catalogue
from tarflowlm.studio.job import Job
from tarflowlm.studio.pieces import bar, card, counted, facts, muted, page, stage, took

TRIES = 8
"""The most tries of one request."""


@dataclass(frozen=True)
class Candidates:
    """Texts that fill the blanks of a template, the likeliest first; equal ones are one."""

    texts: list[tuple[Tensor, float]]
    """Tokens [T], and their share of all weights."""
    tries: int
    particles: int
    effective: float
    """Effective number of tries, from 1 to `tries`."""
    seconds: float = 0.0


def infill(
    catalogue: Catalogue, model: Any, text: Any, tries: Any, particles: Any, temperature: Any, seed: Any
) -> Iterator[str]:
    """HTML of candidates for the blanks of `text`."""
    checkpoint = catalogue.load(model)
    template = read_template(checkpoint.tokenizer, request.text(text, "text"), request.MARK)
    found = yield from fill(checkpoint, template.tokens, tries, particles, temperature, seed)
    filled = choices(checkpoint.tokenizer, found, template.tokens)
    yield page(card(filled, muted(template.notice)), card(trust(found)))


def fill(
    checkpoint: Checkpoint, template: Tensor, tries: Any, particles: Any, temperature: Any, seed: Any
) -> Generator[str, None, Candidates]:
    """Pages of the progress; returns the candidates for a template [T].

    Every try runs its own particles. Its evidence, the mean weight of its particles, is unbiased for p(given), so a
    draw from the tries by evidence is a draw by all of their particles; that is the weight of its text.
    """
    num = request.whole(tries, "tries", 1, TRIES)
    each = request.whole(particles, "particles", 1, request.PARTICLES)
    tau = request.number(temperature, "temperature", 0.1, 2.0)
    seed = request.whole(seed, "seed", 0, 2**31)

    def work(job: Job[Candidates]) -> Candidates:
        with threads_for(num * each):
            result = generate(
                checkpoint.model,
                num_tokens=len(template),
                num=num,
                prompt=template,
                generator=torch.Generator().manual_seed(seed),
                particles=each,
                temperature=tau,
                decoder="auto",
                watch=Watch(job),
            )
        # there is none where nothing is given
        evidence = torch.zeros(num) if result.log_evidence is None else result.log_evidence
        return weigh(result.tokens.cpu(), evidence, each)

    job = Job(work)
    total = num_positions(checkpoint.model, len(template))
    given = stage(template_tokens(checkpoint.tokenizer, template), is_open=True)
    for _ in job.follow():
        words = "trying" if job.advanced else "waiting for its turn"
        yield page(card(given, bar(job.advanced / total), muted(words)))
    assert job.result is not None
    return replace(job.result, seconds=job.seconds)


def weigh(tokens: Tensor, log_evidence: Tensor, particles: int) -> Candidates:
    """Weights of texts [num, T] from their log-evidence [num]; equal ones where all evidence is zero."""
    weights = log_evidence.softmax(0)
    if not torch.isfinite(weights).all():
        weights = torch.full_like(weights, 1 / len(weights))
    merged: dict[tuple[int, ...], float] = {}
    for row, weight in zip(tokens.tolist(), weights.tolist(), strict=True):
        merged[tuple(row)] = merged.get(tuple(row), 0.0) + weight
    texts = [(torch.tensor(row), weight) for row, weight in sorted(merged.items(), key=lambda pair: -pair[1])]
    return Candidates(texts, len(tokens), particles, 1 / (weights**2).sum().item())


def choices(tokenizer: Tokenizer, found: Candidates, template: Tensor) -> str:
    """The candidates with their weights; drawn tokens stand out, given ones are underlined."""
    given = template != BLANK
    return "".join(
        f'<div class="st-choice"><div class="st-share"><b>{100 * weight:.0f} %</b>{bar(weight)}</div>'
        f'<div class="st-stage">{spans(text_tokens(tokens, tokenizer, before=template, given=given))}</div></div>'
        for tokens, weight in found.texts
    )


def trust(found: Candidates) -> str:
    """How far the weights can be trusted, in words and as a bar."""
    share = found.effective / found.tries
    head = f"<b>About {found.effective:.1f} of {counted(found.tries, 'try', 'tries')} count.</b> "
    if found.tries == 1:
        words = "One try has nothing to be compared with: ask for more."
    elif share >= 0.5:
        words = "The tries fit the given text about equally well."
    else:
        words = "A few tries fit the given text far better than the others. More particles find more such texts."
    numbers = facts((f"{found.particles:,}", "particles per try"), took(found.seconds))
    return f"<div>{head}{words}{bar(share)}{numbers}</div>"


def template_tokens(tokenizer: Tokenizer, template: Tensor) -> list[Token]:
    """A template [T] as tokens, its blanks as marks."""
    shown = text_tokens(template.clamp_min(0), tokenizer, given=template != BLANK)
    return [token if token.kind == "given" else Token(request.MARK, "noise") for token in shown]
