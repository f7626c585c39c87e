"""The view that fills blanks in: candidates drawn by particles, their weights, and how far these can be trusted."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tarflowlm.data import Tokenizer
from tarflowlm.device import threads_for
from tarflowlm.errors import UserError
from tarflowlm.generation import Watch, generate
from tarflowlm.generation.sampling import BLANK
from tarflowlm.generation.window import num_positions
from tarflowlm.report.grid import Kind, spans
from tarflowlm.runs.checkpoint import Checkpoint
from tarflowlm.studio import request
from tarflowlm.studio.catalogue import Catalogue
from tarflowlm.studio.job import Job
from tarflowlm.studio.pieces import bar, card, counted, facts, milliseconds, muted, page, stage
from tarflowlm.studio.rows import marked

TRIES = 8
"""The most tries of one request."""


@dataclass(frozen=True)
class Candidate:
    """A text that fills the blanks."""

    tokens: Tensor
    """[T]."""
    weight: float
    """Its share of all weights."""


@dataclass(frozen=True)
class Candidates:
    """Texts that fill the blanks of a template, the likeliest first; equal ones are one."""

    found: Sequence[Candidate]
    tries: int
    effective: float
    """Effective number of tries, from 1 to `tries`."""


def infill(
    catalogue: Catalogue, model: Any, text: Any, tries: Any, particles: Any, temperature: Any, seed: Any
) -> Iterator[str]:
    """HTML of candidates for the blanks of `text`. UserError for a text without blanks, or without anything else."""
    checkpoint = catalogue.load(model)
    template = request.template(checkpoint.tokenizer, request.text(text, "text"))
    if not (template == BLANK).any():
        raise UserError(f"nothing to fill in: write a {request.MARK} for every token that the model is to choose")
    if (template == BLANK).all():
        raise UserError("nothing is given: write some text around the blanks")
    for shown in drawn(checkpoint, template, tries, particles, temperature, seed):
        if isinstance(shown, str):
            yield page(card(stage(template_tokens(checkpoint.tokenizer, template), is_open=True) + shown))
        else:
            found, seconds = shown
            yield page(card(choices(checkpoint.tokenizer, found, template)), card(trust(found, particles, seconds)))


def drawn(
    checkpoint: Checkpoint, template: Tensor, tries: Any, particles: Any, temperature: Any, seed: Any
) -> Iterator[str | tuple[Candidates, float]]:
    """Progress as HTML, then the candidates for a template [T] and the seconds that they took.

    Every try runs its own particles. Its evidence, the mean weight of its particles, is unbiased for p(given), so a
    draw from the tries by evidence is a draw by all of their particles; that is the weight of its text.
    """
    request.one_window(len(template), checkpoint.model.config.context)
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
        assert result.log_evidence is not None
        return weighed(result.tokens.cpu(), result.log_evidence)

    job = Job(work)
    total = num_positions(checkpoint.model, len(template))
    for _ in job.follow():
        yield bar(len(job.ticks) / total) + muted("waiting for its turn" if not job.ticks else "trying")
    assert job.result is not None
    yield job.result, job.seconds_taken


def weighed(tokens: Tensor, log_evidence: Tensor) -> Candidates:
    """Texts [num, T] by their log-evidence [num]; those without any count alike if none has some."""
    weights = log_evidence.softmax(0)
    if not torch.isfinite(weights).all():
        weights = torch.full_like(weights, 1 / len(weights))
    merged: dict[tuple[int, ...], float] = {}
    for row, weight in zip(tokens.tolist(), weights.tolist(), strict=True):
        merged[tuple(row)] = merged.get(tuple(row), 0.0) + weight
    ordered = sorted(merged.items(), key=lambda pair: -pair[1])
    effective = 1 / (weights**2).sum().item()
    return Candidates([Candidate(torch.tensor(row), w) for row, w in ordered], len(tokens), effective)


def choices(tokenizer: Tokenizer, found: Candidates, template: Tensor) -> str:
    """The candidates with their weights; what was drawn stands out, what was given is locked."""
    kinds: list[Kind] = ["changed" if blank else "given" for blank in (template == BLANK).tolist()]
    return "".join(
        f'<div class="st-choice"><div class="st-share"><b>{100 * c.weight:.0f} %</b>{bar(c.weight)}</div>'
        f'<div class="st-stage">{spans(marked(c.tokens.tolist(), tokenizer, kinds))}</div></div>'
        for c in found.found
    )


def trust(found: Candidates, particles: Any, seconds: float) -> str:
    """How far the weights can be trusted, in words and as a bar."""
    share = found.effective / found.tries
    head = f"<b>About {found.effective:.1f} of {counted(found.tries, 'try', 'tries')} count.</b> "
    if found.tries == 1:
        words = "One try has nothing to be compared with: ask for more."
    elif share >= 0.5:
        words = "The tries fit the given text about equally well."
    else:
        words = "A few tries fit the given text far better than the others. More particles find more such texts."
    numbers = facts((f"{int(particles):,}", "particles in each try"), (milliseconds(seconds), "in all"))
    return f"<div>{head}{words}{bar(share)}{numbers}</div>"


def template_tokens(tokenizer: Tokenizer, template: Tensor) -> list[Any]:
    """A template [T] as tokens, its blanks as marks."""
    shown = marked(template.clamp_min(0).tolist(), tokenizer, ["given"] * len(template))
    return [
        type(token)(request.MARK, "draft") if blank else token
        for token, blank in zip(shown, (template == BLANK).tolist(), strict=True)
    ]
