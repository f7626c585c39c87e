"""Editing by redrawing: a span of a text gets new tokens, and the text around it stays.

Candidates for the span come from a block given the text before it; one is chosen by the probability
of the text after it (docs/math.md, section 10).
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from tarflowlm.baseline import TokenLM
from tarflowlm.editing.states import Change, Encoded, Source, compared, inverted_below
from tarflowlm.errors import UserError
from tarflowlm.flow.numerics import standard_normal_log_prob
from tarflowlm.generation.decoder import Drawing
from tarflowlm.generation.inversion import Inversion
from tarflowlm.generation.particles import pareto_k, resample, weight
from tarflowlm.generation.sampling import BLANK, Noise, row_generators
from tarflowlm.model import LanguageModel, TarFlowLM, as_flow
from tarflowlm.requests import Sampling

Span = tuple[int, int]
"""Tokens of a text: the first, and the one after the last."""
Proposed = tuple[Float[Tensor, "R T d"], Int[Tensor, "R T"], Float[Tensor, " R"]]
"""Latents and tokens of candidates, and their log-weights in float64 on the CPU, in nats."""


@dataclass(frozen=True)
class Candidates:
    """The settings for redrawing a span: one of some candidates is chosen."""

    number: int
    temperature: float = 1.0
    """The temperature of their tokens; it must be 1 unless block 1 has weights of tokens."""
    level: int = 0
    """The state in which they are drawn (see `informative_level`)."""
    spaces: Tensor | None = None
    """Which tokens begin and which end with white space, [2, V] (`spaces_of`). Candidates that keep
    the white space at the ends of the span are preferred.
    """
    may_repeat: bool = False
    """False: a candidate that repeats the old tokens is taken only if all with their spaces do."""
    banned: int | None = None
    """A token that is not drawn: the end of a document."""
    lead: tuple[int, ...] = ()
    """Tokens put before a text whose first span is drawn, so that the span begins a word."""


@torch.no_grad()
def propose(source: Source, span: Span, candidates: Candidates) -> Proposed:
    """R candidates for state l of a text [1, T] at a span, from block l + 1 (docs/math.md, eq. 24).

    The noise of the span is standard normal, so that a candidate has the density prod_n p(h_n |
    h_<n) of the block, in its order. Its weight is p_{>l}(h) over that: the densities of the block
    after the span, times p_{>l+1}(u) / N(u; 0, I) for the noise u = h^(l+1) of the whole text. At
    another temperature u keeps the noise that was drawn in the span.

    For l = 0 the tokens around the span keep their latents. For l > 0 whole positions are drawn and
    the blocks below inverted, so tokens next to the span may change, too.
    """
    model = as_flow(source.model)
    prior = model.prior
    level = candidates.level
    block = prior.block(level)
    text = source.text
    known = block.order(prior.patch(text.states[level]))
    R = candidates.number
    _, N, C = known.shape
    patch = model.config.patch
    first, end = span[0] // patch, -(-span[1] // patch)
    if block.order.reverse:
        first, end = N - end, N - first
    h = known.repeat(R, 1, 1)
    u = block.order(prior.patch(text.states[level + 1])).repeat(R, 1, 1)
    stays = torch.full((N, patch), level == 0)
    if level:
        u[:, first:end] = source.normal(R, end - first, C)
    else:
        u[:, first:end] = prior.patch(source.normal(R, N * patch, C // patch))[:, first:end]
        stays.view(-1)[slice(*span)] = False
    tempered = Sampling(temperature=candidates.temperature)
    adjust = tempered.adjustment(model.config.vocab_size, candidates.banned)
    rows = Inversion(block, u, adjust, known=h, is_known=stays.expand(R, -1, -1))
    log_w = _redrawn(rows, known[:, :first], end)
    h, u = rows.values, rows.noise
    if level + 1 < model.num_blocks:
        noise = prior.patch.inverse(block.order.inverse(u))
        log_w = log_w + prior.log_prob(noise, above=level + 1) - standard_normal_log_prob(u)
    texts = Source(model, text.repeated(R), source.generator)
    z = inverted_below(texts, level, prior.patch.inverse(block.order.inverse(h)), "auto")[-1]
    tokens = model.codebook.decode(z)
    if level == 0:
        tokens = torch.where(stays.view(-1).to(z.device), text.tokens, tokens)
    return z, tokens, weight(log_w)


def propose_tokens(source: Source, span: Span, candidates: Candidates) -> Proposed:
    """R candidates of the baseline for the span, given the text before it: its `propose`.

    They are weighted by the probability of the text after it, and have no latents.
    """
    model, text = source.model, source.text
    R = candidates.number
    noise = Noise(model, row_generators((0,), source.generator), R)
    tokens = text.tokens.repeat(R, 1)
    no_latents = noise.normal(tokens.shape[1])
    tempered = Sampling(temperature=candidates.temperature)
    adjust = tempered.adjustment(model.config.vocab_size, candidates.banned)
    given = tokens.cpu()
    given[:, slice(*span)] = BLANK
    rows = Drawing(model, 0, no_latents, noise.draws(tokens.shape[1]), given, adjust)
    log_w = _redrawn(rows, rows.values[:1, : span[0]], span[1])
    return no_latents, rows.values.flatten(1), weight(log_w)


def _redrawn(rows: Drawing | Inversion, before: Tensor, end: int) -> Tensor:
    """Write positions up to `end` after the values `before` [1, n, ...] of all rows, and read the
    rest: log p [R] of all given tokens from there on, in nats.
    """
    rows.settle_alike(before)
    log_w = torch.zeros(len(rows.values), device=rows.values.device)
    while rows.at < end:
        if (log_p := rows.step()) is not None:
            log_w = log_w + log_p
    return log_w + rows.read(rows.num_positions) if rows.is_open else log_w


@torch.no_grad()
def informative_level(model: LanguageModel, text: Encoded) -> int:
    """The state l whose block l + 1 knows most; 0 if block 1 has weights of tokens.

    A block knows its gain in log-density over noise, log |det| + log N(h^(l+1)) - log N(h^(l)). For
    block 1 tokens of equal probability replace log N(z).
    """
    if model.config.has_token_weights:
        return 0
    flow = as_flow(model)
    states, log_dets = flow.prior.states(text.states[0])
    book = flow.codebook
    log_p = [standard_normal_log_prob(h) for h in states]
    log_p[0] = (book.log_normaliser(states[0]) - math.log(book.vocab_size)).sum(1)
    gains = [log_dets[i].sum(-1) + log_p[i + 1] - log_p[i] for i in range(model.num_blocks)]
    return int(torch.stack(gains).mean(1).argmax())


def spaces_of(token_bytes: Sequence[bytes]) -> Tensor:
    """`Candidates.spaces` for tokens with these bytes."""
    return torch.tensor([(token[:1].isspace(), token[-1:].isspace()) for token in token_bytes]).T


SPARE_TRIES = 8
"""The number of other spans that are tried if the model would not change one."""


@torch.no_grad()
def rewrite(
    source: Source,
    spans: Sequence[Sequence[Span]],
    candidates: Candidates,
    *,
    spare: Sequence[Span] = (),
    before: Encoded | None = None,
    aligned: Tensor | None = None,
) -> Change:
    """Redraw the spans of every text, one after the other given everything else.

    `spans[b]` are the spans of row b. If a span stays as it was, some of the `spare` spans are
    tried instead, but none at either end of the text. `before` are the texts to compare with, by
    default the same; `aligned` as in `compared`. The progress advances once per span.
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
    return collected(replace(source, text=before or source.text), rows, aligned)


@torch.no_grad()
def redraw(source: Source, span: Span, candidates: Candidates) -> Encoded:
    """The text [1, T] with the tokens of `span` redrawn given all others, which keep their latents.

    One candidate is taken by its weight (docs/math.md, eq. 24). At a level above 0, tokens next to
    the span change only if they change in all candidates.

    UserError for a temperature other than 1 if the block has no weights of tokens.
    """
    model = source.model
    text = source.text
    level = candidates.level
    assert 0 <= span[0] < span[1] <= text.length, span
    assert 0 <= level < model.num_blocks, level
    if candidates.temperature != 1.0 and (level or not model.config.has_token_weights):
        raise UserError(
            f"temperature {candidates.temperature}: state {level} of this model has no weights of "
            "tokens, take 1"
        )
    lead = len(candidates.lead) if span[0] == 0 else 0
    after = source
    if lead:
        # other tokens come before the text, with their means as latents
        before = torch.tensor([candidates.lead], device=text.tokens.device)
        states: tuple[Tensor, ...] = ()
        if isinstance(model, TarFlowLM):
            z = torch.cat((model.codebook.mean[before], text.states[0]), 1)
            states = tuple(model.prior.states(z)[0])
        padded = Encoded(torch.cat((before, text.tokens), 1), lead + text.length, states)
        after = replace(source, text=padded)
    proposed = propose_tokens if model.is_exact else propose
    z, tokens, log_w = proposed(after, (span[0] + lead, span[1] + lead), candidates)
    z, tokens = z[:, lead:], tokens[:, lead:]
    # the number, if one of the two is NaN
    k = float(np.fmax(text.pareto_k, pareto_k(log_w)))
    for is_preferred in _preferences(text, tokens.cpu(), span, candidates):
        if (is_preferred & (log_w > -torch.inf)).any():
            log_w = torch.where(is_preferred, log_w, -torch.inf)
    chosen = resample(log_w, 1, source.generator).to(z.device)
    states = tuple(model.prior.states(z[chosen])[0]) if isinstance(model, TarFlowLM) else ()
    return replace(text, tokens=tokens[chosen], states=states, pareto_k=k)


def _preferences(
    text: Encoded, tokens: Tensor, span: Span, candidates: Candidates
) -> Iterator[Tensor]:
    """Which candidates, with tokens [R, T], are preferred: [R], the most important first."""
    old = text.tokens[0].cpu()
    inside = slice(*span)
    if candidates.spaces is not None:
        begin, end = candidates.spaces
        first, last = span[0], span[1] - 1
        yield (begin[tokens] == begin[old])[:, first] & (end[tokens] == end[old])[:, last]
    changed = (tokens != old)[:, : text.length]
    num_inside = changed[:, inside].sum(1)
    if not candidates.may_repeat:
        yield num_inside > 0
    yield num_inside == changed.sum(1)


@torch.no_grad()
def token_costs(model: LanguageModel, text: Encoded) -> Float[Tensor, "B T"]:
    """-log p(x_t | z_<t) of every token in block 1, in nats: one sample of a bound (eq. 21).

    For the baseline it is -log p(x_t | x_<t). Tokens of a position share its cost equally.
    """
    if isinstance(model, TokenLM):
        return -model.token_log_prob(text.tokens)
    flow = as_flow(model)
    patch = flow.config.patch
    z = text.states[0]
    log_p = flow.prior.block(0).log_prob(flow.prior.patch(z)) / patch
    normaliser = flow.codebook.log_normaliser(z).unflatten(1, (-1, patch)).mean(2)
    return (normaliser - log_p).repeat_interleave(patch, 1)[:, : text.length]


def collected(source: Source, rows: Sequence[Encoded], aligned: Tensor | None = None) -> Change:
    """The edit whose rows are texts [1, T] that were redrawn."""
    tokens = torch.cat([row.tokens for row in rows])
    states = [torch.cat(level) for level in zip(*(row.states for row in rows), strict=True)]
    edit = compared(source, tokens, states[::-1], aligned=aligned)
    return replace(edit, pareto_k=tuple(row.pareto_k for row in rows))
