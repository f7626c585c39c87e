r"""Editing by redrawing: a span of a text gets new tokens, and all other tokens keep theirs, latents included.

Candidates for the span come from block 1 given what is before it; one is taken by how well the model expects what
follows (docs/math.md, section 10, eq. 24).
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tarflowlm.editing.states import Edit, Encoded, compared
from tarflowlm.editing.words import Span
from tarflowlm.errors import UserError
from tarflowlm.flow.couplings import AdjustWeights
from tarflowlm.flow.numerics import standard_normal_log_prob
from tarflowlm.generation.inversion import Tick
from tarflowlm.generation.particles import resample
from tarflowlm.generation.passage import LatentPassage
from tarflowlm.generation.sampling import adjust_weights
from tarflowlm.model import TarFlowLM


@torch.no_grad()
def rewrite(
    model: TarFlowLM,
    text: Encoded,
    spans: Sequence[Sequence[Span]],
    *,
    candidates: int,
    temperature: float = 1.0,
    generator: torch.Generator,
    tick: Tick | None = None,
) -> Edit:
    """Redraw the spans of every text, `spans[b]` those of row b, one after the other given everything else.

    `tick` is called once per span. UserError as in `redraw`.
    """
    rows = []
    for b, chosen in enumerate(spans):
        row = text.row(b)
        for span in chosen:
            row = redraw(model, row, span, candidates=candidates, temperature=temperature, generator=generator)
            if tick is not None:
                tick()
        rows.append(row)
    return _finished(model, text, rows, generator)


@torch.no_grad()
def blend(
    model: TarFlowLM,
    first: Encoded,
    second: Encoded,
    spans: Sequence[tuple[Sequence[Span], Sequence[Span]]],
    *,
    candidates: int,
    temperature: float = 1.0,
    generator: torch.Generator,
    tick: Tick | None = None,
) -> Edit:
    """Put spans of the second text into the first, at their places, and redraw what they leave in pieces.

    `spans[b]` are the spans that row b takes, and those of the first text that stay where nothing is taken.
    UserError for texts of different lengths, and as in `redraw`; `tick` is called once per row.
    """
    if first.length != second.length:
        raise UserError(f"texts of {first.length} and {second.length} tokens: cut them to the same length")
    rows = []
    for b, (taken, kept) in enumerate(spans):
        is_second, stays = (_covered(part, first.tokens.shape[1]) for part in (taken, kept))
        row, other = first.row(b), second.row(b)
        mask = is_second.to(row.tokens.device)
        z = torch.where(mask[:, None], other.states[0], row.states[0])
        tokens = torch.where(mask, other.tokens, row.tokens)
        row = replace(row, tokens=tokens, states=tuple(model.prior.states(z)[0]))
        free = ~(is_second | stays)
        free[first.length :] = False
        for span in _runs(free):
            row = redraw(model, row, span, candidates=candidates, temperature=temperature, generator=generator)
        if tick is not None:
            tick()
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
    generator: torch.Generator,
) -> Encoded:
    """The text [1, T] with the tokens of `span` redrawn given all others, which keep their latents.

    Of R = `candidates` draws of the span, one is taken by its weight (docs/math.md, eq. 24); those that repeat the
    tokens that were there only if all do. UserError for fewer than 1 candidate, or a span outside the text.
    """
    start, stop = span
    if candidates < 1:
        raise UserError(f"candidates {candidates}: must be at least 1")
    if not 0 <= start < stop <= text.length:
        raise UserError(f"tokens {start} to {stop}: the text has {text.length}")
    z, tokens, log_w = propose(model, text, span, candidates=candidates, temperature=temperature, generator=generator)
    same = (tokens == text.tokens).all(1).cpu()
    log_w = torch.where(same & ~same.all(), -torch.inf, log_w)
    chosen = resample(log_w, 1, generator).to(z.device)
    return replace(text, tokens=tokens[chosen], states=tuple(model.prior.states(z[chosen])[0]))


def propose(
    model: TarFlowLM,
    text: Encoded,
    span: Span,
    *,
    candidates: int,
    temperature: float = 1.0,
    generator: torch.Generator,
) -> tuple[Float[Tensor, "R T d"], Int[Tensor, "R T"], Float[Tensor, " R"]]:
    """R candidates for a span of the text [1, T]: latents, tokens, and log-weights in float64 on the CPU, in nats.

    The noise of the span is standard normal, so that a candidate has the density prod_t p(z_t | z_<t) of block 1.
    Its weight is p(z) over that: the densities of block 1 behind the span, times p_{>1}(h) / N(h; 0, I) for the noise
    h = h^(1) of the whole text. At another temperature h keeps the noise that was drawn in the span.
    """
    start, stop = span
    patch, prior = model.config.patch, model.prior
    known, before = prior.patch(text.states[0])[0], prior.patch(text.states[1])[0]
    first, end = start // patch, -(-stop // patch)
    R, (T, d) = candidates, text.states[0].shape[1:]
    noise = torch.randn(R, T, d, generator=generator, device=generator.device).to(known)
    is_known = torch.ones(R, T, dtype=torch.bool)
    is_known[:, start:stop] = False
    passage = LatentPassage(model, noise, text.states[0].expand(R, -1, -1), is_known, _adjustment(model, temperature))
    passage.settle(known, first)
    passage.noise[:, :first] = before[:, :first]
    log_w = noise.new_zeros(R)
    while passage.at < end:
        log_p = passage.step()
        log_w = log_w if log_p is None else log_w + log_p
    if end < passage.num_positions:
        behind = known[:, end:].expand(R, -1, -1)
        features = passage.block.features_of(
            passage.cache, torch.cat((passage.values[:, end - 1 : end], behind[:, :-1]), 1), first=False
        )
        passage.noise[:, end:], log_det = passage.block.coupling(behind, features)
        passage.values[:, end:] = behind
        log_w = log_w + log_det + standard_normal_log_prob(passage.noise[:, end:])
    z, h = prior.patch.inverse(passage.values), prior.patch.inverse(passage.noise)
    if model.num_blocks > 1:
        log_w = log_w + prior.log_prob(h, above=1) - standard_normal_log_prob(passage.noise)
    tokens = torch.where(is_known.to(z.device), text.tokens, model.codebook.decode(z))
    return z, tokens, log_w.double().cpu().nan_to_num(nan=-torch.inf)


def _adjustment(model: TarFlowLM, temperature: float) -> AdjustWeights | None:
    adjust = adjust_weights(temperature)
    if adjust is not None and not model.config.weighs_tokens:
        raise UserError(f"temperature {temperature}: block 1 of this model has no weights of tokens, take 1")
    return adjust


@torch.no_grad()
def token_costs(model: TarFlowLM, text: Encoded) -> Float[Tensor, "B T"]:
    """-log p(x_t | z_<t) of every token, in nats, as block 1 alone sees it: one sample of a bound (eq. 21).

    Tokens of a position share the cost of the position equally.
    """
    patch, z = model.config.patch, text.states[0]
    log_p = model.prior.block(0).position_log_prob(model.prior.patch(z)[0]) / patch
    normaliser = model.codebook.log_normaliser(z).unflatten(1, (-1, patch)).mean(2)
    return (normaliser - log_p).repeat_interleave(patch, 1)[:, : text.length]


def _finished(model: TarFlowLM, before: Encoded, rows: Sequence[Encoded], generator: torch.Generator) -> Edit:
    states = tuple(torch.cat(level) for level in zip(*(row.states for row in rows), strict=True))
    return compared(model, before, torch.cat([row.tokens for row in rows]), states[::-1], generator)


def _covered(spans: Sequence[Span], length: int) -> Tensor:
    found = torch.zeros(length, dtype=torch.bool)
    for start, stop in spans:
        found[start:stop] = True
    return found


def _runs(mask: Tensor) -> list[Span]:
    """Maximal runs of True."""
    edges = torch.diff(mask.int(), prepend=torch.zeros(1, dtype=torch.int), append=torch.zeros(1, dtype=torch.int))
    return list(zip((edges == 1).nonzero()[:, 0].tolist(), (edges == -1).nonzero()[:, 0].tolist(), strict=True))
