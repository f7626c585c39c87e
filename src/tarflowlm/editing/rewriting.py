r"""Editing by redrawing: a span of a text gets new tokens, and what is around it stays.

Candidates for the span come from a block given what is before it; one is taken by how well the
model expects what follows (docs/math.md, section 10, eq. 24). By default that is block 1, and all
other tokens keep their latents.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

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
    known, before = prior.patch(text.states[0])[0], prior.patch(text.states[1])[0]
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
    tokens beside the span may change, too.
    """
    prior, block, patch = model.prior, model.prior.block(level), model.config.patch
    known, before = (block.order(prior.patch(text.states[i])[0])[0] for i in (level, level + 1))
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
    for block 1 over tokens of equal probability in place of log N(z).
    """
    if model.config.has_token_weights:
        return 0
    states, log_dets = model.prior.states(text.states[0])
    book, log_p = model.codebook, [standard_normal_log_prob(h) for h in states]
    log_p[0] = (book.log_normaliser(states[0]) - math.log(book.vocab_size)).sum(1)
    gains = [log_dets[i].sum(-1) + log_p[i + 1] - log_p[i] for i in range(model.num_blocks)]
    return int(torch.stack(gains).mean(1).argmax())


SPARE_TRIES = 8
"""Other spans that are tried in place of one that the model would not change."""


@torch.no_grad()
def rewrite(
    model: TarFlowLM,
    text: Encoded,
    spans: Sequence[Sequence[Span]],
    *,
    spare: Sequence[Span] = (),
    generator: torch.Generator,
    progress: Progress = SILENT,
    **options: Any,
) -> Edit:
    """Redraw the spans of every text, `spans[b]` those of row b, one after the other given
    everything else.

    Where all candidates of a span repeat it, some of the `spare` spans are tried in its place, but
    none at either end of the text. `progress` advances once per span. The `options` and errors are
    those of `redraw`.
    """
    rows = []
    for b, chosen in enumerate(spans):
        row = text.row(b)
        inner = [(start, stop) for start, stop in spare if start > 0 and stop < text.length]
        left = [(i, j) for i, j in inner if not any(i < end and first < j for first, end in chosen)]
        for span in chosen:
            before, tries = row.tokens, SPARE_TRIES
            while True:
                row = redraw(model, row, span, generator=generator, **options)
                if not (left and tries) or (row.tokens != before)[:, : text.length].any():
                    break
                span, tries = (
                    left.pop(int(torch.randint(len(left), (), generator=generator))),
                    tries - 1,
                )
            progress.advance()
        rows.append(row)
    return _finished(model, text, rows, generator)


@torch.no_grad()
def blend(
    model: TarFlowLM,
    first: Encoded,
    second: Encoded,
    spans: Sequence[tuple[Sequence[Span], Sequence[Span]]],
    *,
    generator: torch.Generator,
    progress: Progress = SILENT,
    **options: Any,
) -> Edit:
    """Put spans of the second text into the first, at their places, and redraw what they leave in
    pieces.

    `spans[b]` are the spans that row b takes, and those of the first text that stay where nothing
    is taken. `progress` advances once per row. The `options` are those of `redraw`. UserError for
    texts of different lengths.
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
            row = redraw(model, row, span, generator=generator, **options)
        progress.advance()
        rows.append(row)
    return _finished(model, first, rows, generator)


@torch.no_grad()
def redraw(
    model: TarFlowLM,
    text: Encoded,
    span: Span,
    *,
    candidates: int,
    temperature: float = 1.0,
    level: int = 0,
    generator: torch.Generator,
) -> Encoded:
    """The text [1, T] with the tokens of `span` redrawn given all others, which keep their latents.

    Of R = `candidates` draws of the span, one is taken by its weight (docs/math.md, eq. 24); those
    that repeat the tokens that were there only if all do. At a `level` above 0 the span is redrawn
    in that state (see `informative_level`); then tokens beside it change only if they do for all
    candidates.

    UserError for fewer than 1 candidate, and for a temperature other than 1 where there are no
    weights of tokens.
    """
    start, stop = span
    assert 0 <= start < stop <= text.length, span
    assert 0 <= level < model.num_blocks, level
    if candidates < 1:
        raise UserError(f"candidates {candidates}: must be at least 1")
    if temperature != 1.0 and (level or not model.config.has_token_weights):
        raise UserError(
            f"temperature {temperature}: state {level} of this model has no weights of tokens, take 1"
        )
    draw: Any = (
        partial(propose_state, level=level) if level else partial(propose, temperature=temperature)
    )
    z, tokens, log_w = draw(model, text, span, candidates=candidates, generator=generator)
    k = pareto_k(log_w)
    changed = (tokens != text.tokens)[:, : text.length].cpu()
    num_inside = changed[:, start:stop].sum(1)
    for wanted in (num_inside > 0, num_inside == changed.sum(1)):
        if (wanted & (log_w > -torch.inf)).any():
            log_w = torch.where(wanted, log_w, -torch.inf)
    chosen = resample(log_w, 1, generator).to(z.device)
    # of two NaN the second, so that one number remains if there is any
    k = max(text.pareto_k, k, key=lambda k: -math.inf if math.isnan(k) else k)
    return replace(
        text, tokens=tokens[chosen], states=tuple(model.prior.states(z[chosen])[0]), pareto_k=k
    )


@torch.no_grad()
def token_costs(model: TarFlowLM, text: Encoded) -> Float[Tensor, "B T"]:
    """-log p(x_t | z_<t) of every token, in nats, as block 1 alone sees it: one sample of a bound
    (eq. 21).

    Tokens of a position share the cost of the position equally.
    """
    patch, z = model.config.patch, text.states[0]
    log_p = model.prior.block(0).log_prob(model.prior.patch(z)[0]) / patch
    normaliser = model.codebook.log_normaliser(z).unflatten(1, (-1, patch)).mean(2)
    return (normaliser - log_p).repeat_interleave(patch, 1)[:, : text.length]


def _finished(
    model: TarFlowLM, before: Encoded, rows: Sequence[Encoded], generator: torch.Generator
) -> Edit:
    states = [torch.cat(level) for level in zip(*(row.states for row in rows), strict=True)]
    edit = compared(model, before, torch.cat([row.tokens for row in rows]), states[::-1], generator)
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
