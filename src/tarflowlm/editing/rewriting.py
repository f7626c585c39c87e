"""Editing by redrawing: a span of a text gets new tokens, and what is around it stays.

Candidates for the span come from a block given what is before it; one is taken by how well the
model expects what follows (docs/math.md, section 10).
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from tarflowlm.editing.states import (
    Edit,
    Encoded,
    Source,
    check_lengths,
    compared,
    inverted_below,
)
from tarflowlm.editing.words import Span
from tarflowlm.errors import UserError
from tarflowlm.flow.numerics import standard_normal_log_prob
from tarflowlm.generation.conditioned import ConditionedLatents
from tarflowlm.generation.particles import pareto_k, resample
from tarflowlm.generation.sampling import adjust_weights
from tarflowlm.model import TarFlowLM

Proposed = tuple[Float[Tensor, "R T d"], Int[Tensor, "R T"], Float[Tensor, " R"]]
"""Latents and tokens of candidates, and their log-weights in float64 on the CPU, in nats."""


@torch.no_grad()
def propose(source: Source, span: Span, *, candidates: int, temperature: float = 1.0) -> Proposed:
    """R candidates for a span of the text [1, T] from block 1 (docs/math.md, eq. 24).

    The noise of the span is standard normal, so that a candidate has the density prod_t p(z_t |
    z_<t) of block 1. Its weight is p(z) over that: the densities of block 1 behind the span, times
    p_{>1}(h) / N(h; 0, I) for the noise h = h^(1) of the whole text. At another temperature h keeps
    the noise that was drawn in the span.
    """
    model = source.model
    text = source.text
    prior = model.prior
    start, stop = span
    known = prior.patch(text.states[0])
    first, end = _positions(model, span)
    R = candidates
    T, d = text.states[0].shape[1:]
    noise = _normal(source, R, T, d)
    is_known = torch.ones(R, T, dtype=torch.bool)
    is_known[:, start:stop] = False
    latents = text.states[0].expand(R, -1, -1)
    passage = ConditionedLatents(model, noise, latents, is_known, adjust_weights(temperature))
    passage.settle(known, first)
    passage.noise[:, :first] = prior.patch(text.states[1])[:, :first]
    log_w = noise.new_zeros(R)
    while passage.at < end:
        log_p = passage.step()
        log_w = log_w if log_p is None else log_w + log_p
    if end < passage.num_positions:
        behind = known[:, end:].expand(R, -1, -1)
        inputs = torch.cat((passage.values[:, end - 1 : end], behind[:, :-1]), 1)
        features = passage.block.features_of(passage.cache, inputs, first=False)
        passage.noise[:, end:], log_det = passage.block.coupling(behind, features)
        passage.values[:, end:] = behind
        log_w = log_w + log_det.sum(-1) + standard_normal_log_prob(passage.noise[:, end:])
    z, h = prior.patch.inverse(passage.values), prior.patch.inverse(passage.noise)
    if model.num_blocks > 1:
        log_w = log_w + prior.log_prob(h, above=1) - standard_normal_log_prob(passage.noise)
    tokens = torch.where(is_known.to(z.device), text.tokens, model.codebook.decode(z))
    return z, tokens, log_w.double().cpu().nan_to_num(nan=-torch.inf)


@torch.no_grad()
def propose_state(source: Source, span: Span, *, level: int, candidates: int) -> Proposed:
    """R candidates for state l = `level` at a span of whole positions of the text [1, T].

    They come from block l + 1, given the positions before the span in its order, with the density
    prod_n p(h_n | h_<n). Their weight is p_{>l}(h) over that. The blocks below are then inverted;
    tokens next to the span may change, too.
    """
    model = source.model
    prior = model.prior
    block = prior.block(level)
    known = block.order(prior.patch(source.text.states[level]))
    before = block.order(prior.patch(source.text.states[level + 1]))
    R = candidates
    N = known.shape[1]
    first, end = _positions(model, span)
    if block.order.reverse:
        first, end = N - end, N - first
    h = known.repeat(R, 1, 1)
    u = before.repeat(R, 1, 1)
    u[:, first:end] = _normal(source, R, end - first, h.shape[2])
    cache = block.allocate_cache(R, N)
    if first:
        # what is before the span is the same for all
        one = block.allocate_cache(1, first)
        block.features_of(one, known[:, : first - 1], first=True)
        cache.take(one, [0] * R)
    invert = block.coupling.inverter()
    for n in range(first, end):
        h[:, n] = invert(u[:, n], block.features_at(cache, h[:, n - 1] if n else None, R), None)
    log_w = h.new_zeros(R)
    if end < N:
        features = block.features_of(cache, h[:, end - 1 : -1], first=False)
        u[:, end:], log_det = block.coupling(h[:, end:], features)
        log_w = log_det.sum(-1) + standard_normal_log_prob(u[:, end:])
    if level + 1 < model.num_blocks:
        noise = prior.patch.inverse(block.order.inverse(u))
        log_w = log_w + prior.log_prob(noise, above=level + 1) - standard_normal_log_prob(u)
    rows = Source(model, source.text.repeated(R), source.generator)
    z = inverted_below(rows, level, prior.patch.inverse(block.order.inverse(h)), "auto")[-1]
    return z, model.codebook.decode(z), log_w.double().cpu().nan_to_num(nan=-torch.inf)


def _positions(model: TarFlowLM, span: Span) -> Span:
    """The positions that hold a span of tokens."""
    patch = model.config.patch
    return span[0] // patch, -(-span[1] // patch)


def _normal(source: Source, *shape: int) -> Tensor:
    generator = source.generator
    noise = torch.randn(*shape, generator=generator, device=generator.device)
    return noise.to(source.text.states[0])


@torch.no_grad()
def informative_level(model: TarFlowLM, text: Encoded) -> int:
    """The state l whose block l + 1 knows most; 0 where block 1 has weights of tokens.

    It knows the gain in log-density over noise, log |det| + log N(h^(l+1)) - log N(h^(l)), for
    block 1 with tokens of equal probability instead of log N(z).
    """
    if model.config.has_token_weights:
        return 0
    states, log_dets = model.prior.states(text.states[0])
    book = model.codebook
    log_p = [standard_normal_log_prob(h) for h in states]
    log_p[0] = (book.log_normaliser(states[0]) - math.log(book.vocab_size)).sum(1)
    gains = [log_dets[i].sum(-1) + log_p[i + 1] - log_p[i] for i in range(model.num_blocks)]
    return int(torch.stack(gains).mean(1).argmax())


class Spaces(NamedTuple):
    """Which tokens begin, and which end with white space, [V]."""

    begin: Tensor
    end: Tensor

    @classmethod
    def of(cls, token_bytes: Sequence[bytes]) -> "Spaces":
        """The masks of tokens with these bytes."""
        return cls(
            torch.tensor([symbol[:1].isspace() for symbol in token_bytes]),
            torch.tensor([symbol[-1:].isspace() for symbol in token_bytes]),
        )

    def kept(self, tokens: Tensor, old: Tensor) -> Tensor:
        """Which rows of `tokens` [R, n] begin and end as `old` [n] does, [R]."""
        begins = self.begin[tokens[:, 0]] == self.begin[old[0]]
        return begins & (self.end[tokens[:, -1]] == self.end[old[-1]])


@dataclass(frozen=True)
class Candidates:
    """The candidates for a span, of which one is taken. UserError for fewer than one."""

    number: int
    temperature: float = 1.0
    """Of their tokens; other than 1 only where block 1 has weights of tokens."""
    level: int = 0
    """The state in which they are drawn (see `informative_level`)."""
    spaces: Spaces | None = None
    """Candidates that keep the white space at the ends of the span are preferred."""
    may_repeat: bool = False
    """Else those that repeat the tokens that were there are taken only if all do."""

    def __post_init__(self) -> None:
        if self.number < 1:
            raise UserError(f"candidates {self.number}: must be at least 1")


SPARE_TRIES = 8
"""Other spans that are tried instead of one that the model would not change."""


@torch.no_grad()
def rewrite(
    source: Source,
    spans: Sequence[Sequence[Span]],
    candidates: Candidates,
    *,
    spare: Sequence[Span] = (),
    before: Encoded | None = None,
    aligned: Tensor | None = None,
) -> Edit:
    """Redraw the spans of every text, one after the other given everything else.

    `spans[b]` are the spans of row b. Where all candidates of a span repeat it, some of the `spare`
    spans are tried instead, but none at either end of the text. `before` are the texts to compare
    with, if not the same; `aligned` as in `compared`. The progress advances once per span.
    """
    source.progress.stage("redrawing, pieces", sum(map(len, spans)))
    length = source.text.length
    rows = []
    for b, chosen in enumerate(spans):
        row = replace(source, text=source.text.row(b))
        left = [
            (start, stop)
            for start, stop in spare
            if start > 0
            and stop < length
            and not any(start < end and first < stop for first, end in chosen)
        ]
        for span in chosen:
            old = row.text.tokens
            row = replace(row, text=redraw(row, span, candidates))
            for _ in range(SPARE_TRIES):
                if not left or (row.text.tokens != old)[:, :length].any():
                    break
                at = int(torch.randint(len(left), (), generator=source.generator))
                row = replace(row, text=redraw(row, left.pop(at), candidates))
            source.progress.advance()
        rows.append(row.text)
    return _collected(replace(source, text=before or source.text), rows, aligned)


@torch.no_grad()
def blend(
    source: Source,
    second: Encoded,
    spans: Sequence[tuple[Sequence[Span], Sequence[Span]]],
    candidates: Candidates,
) -> Edit:
    """Take spans of second texts, at their places, and redraw the words that they cut.

    `spans[b]` are the spans that row b takes, and the spans of the first text that stay. The
    progress advances once per row. UserError for texts of different lengths.
    """
    first = source.text
    check_lengths(first, second)
    rows = []
    for b, (taken, kept) in enumerate(spans):
        is_second = covered(taken, first.tokens.shape[1])
        stays = covered(kept, first.tokens.shape[1])
        mask = is_second.to(first.tokens.device)
        z = torch.where(mask[:, None], second.states[0][b], first.states[0][b])[None]
        tokens = torch.where(mask, second.tokens[b], first.tokens[b])[None]
        row = replace(first, tokens=tokens, states=tuple(source.model.prior.states(z)[0]))
        for span in _runs(~(is_second | stays)[: first.length]):
            row = redraw(replace(source, text=row), span, candidates)
        source.progress.advance()
        rows.append(row)
    return _collected(source, rows)


@torch.no_grad()
def redraw(source: Source, span: Span, candidates: Candidates) -> Encoded:
    """The text [1, T] with the tokens of `span` redrawn given all others, which keep their latents.

    One candidate is taken by its weight (docs/math.md, eq. 24). At a level above 0, tokens next to
    the span change only if they do for all candidates.

    UserError for a temperature other than 1 where there are no weights of tokens.
    """
    model = source.model
    text = source.text
    level = candidates.level
    temperature = candidates.temperature
    assert 0 <= span[0] < span[1] <= text.length, span
    assert 0 <= level < model.num_blocks, level
    if temperature != 1.0 and (level or not model.config.has_token_weights):
        raise UserError(
            f"temperature {temperature}: state {level} of this model has no weights of tokens, "
            "take 1"
        )
    if level:
        found = propose_state(source, span, level=level, candidates=candidates.number)
    else:
        found = propose(source, span, candidates=candidates.number, temperature=temperature)
    z, tokens, log_w = found
    # the number, if one of the two is NaN
    k = float(np.fmax(text.pareto_k, pareto_k(log_w)))
    for is_preferred in _preferences(text, tokens.cpu(), span, candidates):
        if (is_preferred & (log_w > -torch.inf)).any():
            log_w = torch.where(is_preferred, log_w, -torch.inf)
    chosen = resample(log_w, 1, source.generator).to(z.device)
    states = tuple(model.prior.states(z[chosen])[0])
    return replace(text, tokens=tokens[chosen], states=states, pareto_k=k)


def _preferences(
    text: Encoded, tokens: Tensor, span: Span, candidates: Candidates
) -> Iterator[Tensor]:
    """Which candidates, with tokens [R, T], are preferred: [R], the most important first."""
    old = text.tokens[0].cpu()
    inside = slice(*span)
    if candidates.spaces is not None:
        yield candidates.spaces.kept(tokens[:, inside], old[inside])
    changed = (tokens != old)[:, : text.length]
    num_inside = changed[:, inside].sum(1)
    if not candidates.may_repeat:
        yield num_inside > 0
    yield num_inside == changed.sum(1)


@torch.no_grad()
def token_costs(model: TarFlowLM, text: Encoded) -> Float[Tensor, "B T"]:
    """-log p(x_t | z_<t) of every token in block 1, in nats: one sample of a bound (eq. 21).

    Tokens of a position share the cost of the position equally.
    """
    patch = model.config.patch
    z = text.states[0]
    log_p = model.prior.block(0).log_prob(model.prior.patch(z)) / patch
    normaliser = model.codebook.log_normaliser(z).unflatten(1, (-1, patch)).mean(2)
    return (normaliser - log_p).repeat_interleave(patch, 1)[:, : text.length]


def _collected(source: Source, rows: Sequence[Encoded], aligned: Tensor | None = None) -> Edit:
    tokens = torch.cat([row.tokens for row in rows])
    states = [torch.cat(level) for level in zip(*(row.states for row in rows), strict=True)]
    edit = compared(source, tokens, states[::-1], aligned=aligned)
    return replace(edit, pareto_k=tuple(row.pareto_k for row in rows))


def covered(spans: Sequence[Span], length: int) -> Tensor:
    """Which of `length` tokens lie in the spans, [T]."""
    found = torch.zeros(length, dtype=torch.bool)
    for start, stop in spans:
        found[start:stop] = True
    return found


def _runs(mask: Tensor) -> list[Span]:
    """Maximal runs of True."""
    spans: list[Span] = []
    for at in mask.nonzero()[:, 0].tolist():
        start = spans.pop()[0] if spans and spans[-1][1] == at else at
        spans.append((start, at + 1))
    return spans
