r"""Editing by redrawing: a span of a text gets new tokens, and what is around it stays.

Candidates for the span come from a block given what is before it; one is taken by how well the
model expects what follows (docs/math.md, section 10, eq. 24). By default that is block 1, and all
other tokens keep their latents.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tarflowlm.editing.states import Edit, Encoded, check_lengths, compared, inverted_below
from tarflowlm.editing.words import Span
from tarflowlm.errors import UserError
from tarflowlm.flow.numerics import standard_normal_log_prob
from tarflowlm.generation.conditioned import ConditionedLatents
from tarflowlm.generation.particles import pareto_k, resample
from tarflowlm.generation.sampling import adjust_weights
from tarflowlm.model import TarFlowLM
from tarflowlm.progress import SILENT, Progress


@torch.no_grad()
def propose(
    model: TarFlowLM,
    text: Encoded,
    span: Span,
    *,
    candidates: int,
    temperature: float = 1.0,
    generator: torch.Generator,
) -> tuple[Float[Tensor, "R T d"], Int[Tensor, "R T"], Float[Tensor, " R"]]:
    """R candidates for a span of the text [1, T]: latents, tokens, and log-weights in float64 on
    the CPU, in nats.

    The noise of the span is standard normal, so that a candidate has the density prod_t p(z_t |
    z_<t) of block 1. Its weight is p(z) over that: the densities of block 1 behind the span, times
    p_{>1}(h) / N(h; 0, I) for the noise h = h^(1) of the whole text. At another temperature h keeps
    the noise that was drawn in the span.
    """
    (start, stop), patch, prior = span, model.config.patch, model.prior
    known, before = prior.patch(text.states[0]), prior.patch(text.states[1])
    first, end = start // patch, -(-stop // patch)
    R, (T, d) = candidates, text.states[0].shape[1:]
    noise = torch.randn(R, T, d, generator=generator, device=generator.device).to(known)
    is_known = torch.ones(R, T, dtype=torch.bool)
    is_known[:, start:stop] = False
    latents = text.states[0].expand(R, -1, -1)
    passage = ConditionedLatents(model, noise, latents, is_known, adjust_weights(temperature))
    passage.settle(known, first)
    passage.noise[:, :first] = before[:, :first]
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
def propose_state(
    model: TarFlowLM,
    text: Encoded,
    span: Span,
    *,
    level: int,
    candidates: int,
    generator: torch.Generator,
) -> tuple[Float[Tensor, "R T d"], Int[Tensor, "R T"], Float[Tensor, " R"]]:
    """R candidates for state l = `level` at a span of whole positions of the text [1, T]: as
    `propose`.

    They come from block l + 1, given the positions before the span in its order, with standard
    normal noise; so they have the density prod_n p(h_n | h_<n) of that block. The weight of one is
    p_{>l}(h) over that, for h^(l) as it was elsewhere. The blocks below are then inverted, in which
    tokens next to the span may change, too.
    """
    prior, block, patch = model.prior, model.prior.block(level), model.config.patch
    known, before = (block.order(prior.patch(text.states[i])) for i in (level, level + 1))
    R, N = candidates, known.shape[1]
    first, end = span[0] // patch, -(-span[1] // patch)
    if block.order.reverse:
        first, end = N - end, N - first
    h, u = known.repeat(R, 1, 1), before.repeat(R, 1, 1)
    u[:, first:end] = torch.randn(
        R, end - first, h.shape[2], generator=generator, device=generator.device
    ).to(u)
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
        u[:, end:], log_det = block.coupling(
            h[:, end:], block.features_of(cache, h[:, end - 1 : -1], first=False)
        )
        log_w = log_det.sum(-1) + standard_normal_log_prob(u[:, end:])
    if level + 1 < model.num_blocks:
        noise = prior.patch.inverse(block.order.inverse(u))
        log_w = log_w + prior.log_prob(noise, above=level + 1) - standard_normal_log_prob(u)
    z = inverted_below(
        model, text.repeated(R), level, prior.patch.inverse(block.order.inverse(h)), "auto"
    )[-1]
    return z, model.codebook.decode(z), log_w.double().cpu().nan_to_num(nan=-torch.inf)


@torch.no_grad()
def informative_level(model: TarFlowLM, text: Encoded) -> int:
    """The state l whose block l + 1 knows most about the texts; 0 where block 1 has weights of
    tokens.

    What it knows is the gain in log-density over noise, log |det| + log N(h^(l+1)) - log N(h^(l)),
    for block 1 with tokens of equal probability instead of log N(z).
    """
    if model.config.has_token_weights:
        return 0
    states, log_dets = model.prior.states(text.states[0])
    book, log_p = model.codebook, [standard_normal_log_prob(h) for h in states]
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
    """Temperature of their tokens; other than 1 only where block 1 has weights of tokens."""
    level: int = 0
    """The state in which they are drawn (see `informative_level`)."""
    spaces: Spaces | None = None
    """If given, candidates that keep the white space at the ends of the span are preferred."""
    may_repeat: bool = False
    """Else those that repeat the tokens that were there are taken only if all do."""

    def __post_init__(self) -> None:
        if self.number < 1:
            raise UserError(f"candidates {self.number}: must be at least 1")


SPARE_TRIES = 8
"""Other spans that are tried instead of one that the model would not change."""


@torch.no_grad()
def rewrite(
    model: TarFlowLM,
    text: Encoded,
    spans: Sequence[Sequence[Span]],
    candidates: Candidates,
    *,
    spare: Sequence[Span] = (),
    before: Encoded | None = None,
    aligned: Tensor | None = None,
    generator: torch.Generator,
    progress: Progress = SILENT,
) -> Edit:
    """Redraw the spans of every text, one after the other given everything else.

    `spans[b]` are those of row b. Where all candidates of a span repeat it, some of the `spare`
    spans are tried instead, but none at either end of the text. The texts `before`, by default the
    same, are what the edit is compared with; `aligned` as in `compared`. `progress` advances once
    per span. Errors: `redraw`.
    """
    rows = []
    for b, chosen in enumerate(spans):
        row = text.row(b)
        left = [
            (start, stop)
            for start, stop in spare
            if start > 0
            and stop < text.length
            and not any(start < end and first < stop for first, end in chosen)
        ]
        for span in chosen:
            old = row.tokens
            row = redraw(model, row, span, candidates, generator=generator)
            for _ in range(SPARE_TRIES):
                if not left or (row.tokens != old)[:, : text.length].any():
                    break
                span = left.pop(int(torch.randint(len(left), (), generator=generator)))
                row = redraw(model, row, span, candidates, generator=generator)
            progress.advance()
        rows.append(row)
    return _collected(model, before or text, rows, generator, aligned)


@torch.no_grad()
def blend(
    model: TarFlowLM,
    first: Encoded,
    second: Encoded,
    spans: Sequence[tuple[Sequence[Span], Sequence[Span]]],
    candidates: Candidates,
    *,
    generator: torch.Generator,
    progress: Progress = SILENT,
) -> Edit:
    """Take spans of a second text, at their places, and redraw the words that they cut.

    `spans[b]` are the spans that row b takes, and the spans of the first text that stay. `progress`
    advances once per row. UserError for texts of different lengths.
    """
    check_lengths(first, second)
    rows = []
    for b, (taken, kept) in enumerate(spans):
        is_second, stays = (covered(part, first.tokens.shape[1]) for part in (taken, kept))
        row, other = first.row(b), second.row(b)
        mask = is_second.to(row.tokens.device)
        z = torch.where(mask[:, None], other.states[0], row.states[0])
        tokens = torch.where(mask, other.tokens, row.tokens)
        row = replace(row, tokens=tokens, states=tuple(model.prior.states(z)[0]))
        for span in _runs(~(is_second | stays)[: first.length]):
            row = redraw(model, row, span, candidates, generator=generator)
        progress.advance()
        rows.append(row)
    return _collected(model, first, rows, generator)


@torch.no_grad()
def redraw(
    model: TarFlowLM,
    text: Encoded,
    span: Span,
    candidates: Candidates,
    *,
    generator: torch.Generator,
) -> Encoded:
    """The text [1, T] with the tokens of `span` redrawn given all others, which keep their latents.

    One candidate is taken by its weight (docs/math.md, eq. 24). At a level above 0, tokens next to
    the span change only if they do for all candidates.

    UserError for a temperature other than 1 where there are no weights of tokens.
    """
    start, stop = span
    level, temperature = candidates.level, candidates.temperature
    assert 0 <= start < stop <= text.length, span
    assert 0 <= level < model.num_blocks, level
    if temperature != 1.0 and (level or not model.config.has_token_weights):
        raise UserError(
            f"temperature {temperature}: state {level} of this model has no weights of tokens, "
            "take 1"
        )
    if level:
        z, tokens, log_w = propose_state(
            model, text, span, level=level, candidates=candidates.number, generator=generator
        )
    else:
        z, tokens, log_w = propose(
            model,
            text,
            span,
            candidates=candidates.number,
            temperature=temperature,
            generator=generator,
        )
    k = pareto_k(log_w)
    for is_preferred in _preferences(text, tokens.cpu(), span, candidates):
        if (is_preferred & (log_w > -torch.inf)).any():
            log_w = torch.where(is_preferred, log_w, -torch.inf)
    chosen = resample(log_w, 1, generator).to(z.device)
    # of two NaN the second, so that one number remains if there is any
    k = max(text.pareto_k, k, key=lambda k: -math.inf if math.isnan(k) else k)
    return replace(
        text, tokens=tokens[chosen], states=tuple(model.prior.states(z[chosen])[0]), pareto_k=k
    )


def _preferences(
    text: Encoded, tokens: Tensor, span: Span, candidates: Candidates
) -> Iterator[Tensor]:
    """Which candidates, with tokens [R, T], are preferred: [R], the most important first."""
    old, inside = text.tokens[0].cpu(), slice(*span)
    if candidates.spaces is not None:
        yield candidates.spaces.kept(tokens[:, inside], old[inside])
    changed = (tokens != old)[:, : text.length]
    num_inside = changed[:, inside].sum(1)
    if not candidates.may_repeat:
        yield num_inside > 0
    yield num_inside == changed.sum(1)


@torch.no_grad()
def token_costs(model: TarFlowLM, text: Encoded) -> Float[Tensor, "B T"]:
    """-log p(x_t | z_<t) of every token, in nats, as block 1 alone sees it: one sample of a bound
    (eq. 21).

    Tokens of a position share the cost of the position equally.
    """
    patch, z = model.config.patch, text.states[0]
    log_p = model.prior.block(0).log_prob(model.prior.patch(z)) / patch
    normaliser = model.codebook.log_normaliser(z).unflatten(1, (-1, patch)).mean(2)
    return (normaliser - log_p).repeat_interleave(patch, 1)[:, : text.length]


def _collected(
    model: TarFlowLM,
    before: Encoded,
    rows: Sequence[Encoded],
    generator: torch.Generator,
    aligned: Tensor | None = None,
) -> Edit:
    tokens = torch.cat([row.tokens for row in rows])
    states = [torch.cat(level) for level in zip(*(row.states for row in rows), strict=True)]
    edit = compared(model, before, tokens, states[::-1], generator, aligned=aligned)
    return replace(edit, pareto_k=tuple(row.pareto_k for row in rows))


def covered(spans: Sequence[Span], length: int) -> Tensor:
    """Which of `length` tokens lie in the spans, [T]."""
    found = torch.zeros(length, dtype=torch.bool)
    for start, stop in spans:
        found[start:stop] = True
    return found


def _runs(mask: Tensor) -> list[Span]:
    """Maximal runs of True."""
    edges = torch.diff(
        mask.int(), prepend=torch.zeros(1, dtype=torch.int), append=torch.zeros(1, dtype=torch.int)
    )
    return list(
        zip(
            (edges == 1).nonzero()[:, 0].tolist(),
            (edges == -1).nonzero()[:, 0].tolist(),
            strict=True,
        )
    )
