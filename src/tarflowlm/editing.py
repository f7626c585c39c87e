r"""Editing in latent space: a text is encoded, its state changed at some block, and led back down.

A text x has latents z ~ q(z|x) and states h^(0) = z, ..., h^(L) = u; every change of a state is a new text, for the
flow is invertible. What a change leaves as it was stays as it was: in each block, positions before the first changed
one (in the order of the block) keep their latents to the bit. Paper: section 4 (docs/math.md, section 10).
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tarflowlm.errors import UserError
from tarflowlm.generation import generate
from tarflowlm.generation.inversion import Decoders, Tick, invert_block, per_block
from tarflowlm.generation.passage import LatentPassage
from tarflowlm.language_model import LanguageModel
from tarflowlm.model import TarFlowLM
from tarflowlm.objective import negative_bound


@dataclass(frozen=True)
class Edit:
    """A text and what it became; tensors [B, ...]."""

    before: Tensor
    tokens: Tensor
    """[B, T]."""
    changed: Tensor
    """Which tokens differ, [B, T]."""
    bound_before: Tensor
    """Upper bound on -log p(x) of the text before, [B], nats: a mean over posterior samples."""
    bound: Tensor
    """And of the new text."""
    states: tuple[Tensor, ...]
    """h^(L), ..., h^(0) of the new text, [B, T, d], as it came down."""


@dataclass(frozen=True)
class Encoded:
    """A text with all its states."""

    tokens: Tensor
    """[B, T], T a whole number of patches."""
    length: int
    """Tokens of the text itself; the rest fills its last patch."""
    states: tuple[Tensor, ...]
    """h^(0) = z, ..., h^(L) = u."""


@torch.no_grad()
def encode(model: TarFlowLM, tokens: Int[Tensor, "B T"], generator: torch.Generator) -> Encoded:
    """Latents and states of texts. A last patch that is not full is filled by the model itself.

    Latents that decode to another token, which a blurred codebook allows, are replaced by the mean of their token.
    Raises UserError for texts that are empty, longer than the context, or of unknown tokens.
    """
    length, patch = tokens.shape[1], model.config.patch
    if length < 1:
        raise UserError("the text is empty: give at least one token")
    if length > model.config.context:
        raise UserError(f"the text has {length} tokens, more than the context of {model.config.context}: shorten it")
    if length % patch:
        full = length + patch - length % patch
        tokens = generate(
            model, num_tokens=full, num=len(tokens), template=tokens, generator=generator, decoder="parallel"
        ).tokens.cpu()
    book = model.codebook
    tokens = tokens.to(book.mean.device)
    z = book.encode(tokens, model.draw_noise(tokens, generator))
    z = torch.where((book.decode(z) == tokens)[..., None], z, book.mean[tokens])
    return Encoded(tokens, length, tuple(model.prior.states(z)[0]))


@torch.no_grad()
def renoise(
    model: TarFlowLM,
    text: Encoded,
    *,
    level: int,
    strength: float,
    generator: torch.Generator,
    where: Bool[Tensor, " T"] | None = None,
    decoder: Decoders = "sequential",
    tick: Tick | None = None,
) -> Edit:
    r"""h^(l) -> sqrt(1 - s^2) h^(l) + s eps with eps ~ N(0, I), then down to a new text.

    `level` l is 0 (the latents) to L (the noise), `strength` s is 0 (the text itself) to 1 (its state is forgotten).
    At l = L the marginal law of the state is kept, whatever s. `where` limits the change to some tokens.
    Raises UserError for s or l out of range.
    """
    if not 0 <= strength <= 1:
        raise UserError(f"strength {strength}: must be between 0 (no change) and 1 (a new state)")
    state = text.states[_checked_level(model, level)]
    eps = torch.randn(*state.shape, generator=generator, device=generator.device).to(state)
    changed = (1 - strength**2) ** 0.5 * state + strength * eps
    # s = 0 must not even round
    keep = torch.zeros_like(state, dtype=torch.bool) if strength else torch.ones_like(state, dtype=torch.bool)
    if where is not None:
        keep = keep | ~where.to(state.device)[:, None]
    return _descend(model, text, level, torch.where(keep, state, changed), decoder, generator, tick)


@torch.no_grad()
def interpolate(
    model: TarFlowLM,
    first: Encoded,
    second: Encoded,
    *,
    level: int,
    weight: float,
    generator: torch.Generator,
    decoder: Decoders = "sequential",
    tick: Tick | None = None,
) -> Edit:
    r"""Spherical interpolation of two texts' states at block l: sin((1-w) a) / sin(a) h + sin(w a) / sin(a) h'.

    a is the angle between the two states of a sequence, so that norms are kept and with them, at l = L, the law of
    the noise. `weight` 0 is the first text, 1 the second, exactly. Raises UserError for texts of different length and
    for numbers out of range.
    """
    if not 0 <= weight <= 1:
        raise UserError(f"weight {weight}: must be between 0 (the first text) and 1 (the second)")
    if first.length != second.length:
        raise UserError(f"texts of {first.length} and {second.length} tokens: cut them to the same length")
    a, b = (text.states[_checked_level(model, level)] for text in (first, second))
    if weight in (0.0, 1.0):
        anchor = first if weight == 0.0 else second
        return _descend(model, anchor, level, anchor.states[level], decoder, generator, tick, before=first)
    cosine = torch.nn.functional.cosine_similarity(a.flatten(1), b.flatten(1)).double()
    angle = cosine.clamp(-1, 1).arccos().clamp(1e-4, torch.pi - 1e-4)[:, None, None]
    state = (((1 - weight) * angle).sin() * a + (weight * angle).sin() * b) / angle.sin()
    return _descend(model, first, level, state.to(a), decoder, generator, tick)


@torch.no_grad()
def substitute(
    model: TarFlowLM,
    text: Encoded,
    replacements: Int[Tensor, " T"],
    *,
    generator: torch.Generator,
    tick: Tick | None = None,
) -> Edit:
    """Change some tokens and regenerate the rest from the noise it had: what the text would have been.

    `replacements` [T] holds new tokens and -1 elsewhere. The noise of block 1 stays as it was except at the new
    tokens, so what comes before them in the text stays, and what follows changes where its context asks for it.
    Raises UserError where nothing is replaced and for unknown tokens.
    """
    if replacements.shape != (text.length,):
        raise UserError(f"replacements for {len(replacements)} tokens: the text has {text.length}")
    if not (replacements >= 0).any():
        raise UserError("nothing is replaced: name at least one token to change")
    if (replacements >= model.config.vocab_size).any():
        raise UserError(f"replacements {replacements.tolist()}: tokens go from 0 to {model.config.vocab_size - 1}")
    B, T = text.tokens.shape
    wanted = torch.full((T,), -1)
    wanted[: text.length] = replacements.cpu()
    is_known = (wanted >= 0).expand(B, T)
    noise = torch.randn(B, T, model.config.latent_dim, generator=generator, device=generator.device)
    known = model.codebook.encode(wanted.clamp_min(0).expand(B, T).to(text.tokens.device), noise.to(text.states[0]))
    passage = LatentPassage(model, text.states[1], known, is_known, None)
    passage.settle(model.prior.patch(text.states[0])[0], int(is_known[0].int().argmax()) // model.config.patch)
    while passage.at < passage.num_positions:
        passage.step()
        if tick is not None:
            tick()
    z = model.prior.patch.inverse(passage.values)
    tokens = torch.where(wanted >= 0, wanted, model.codebook.decode(z).cpu()).to(z.device)
    return _edit(model, text, tokens, tuple(model.prior.states(z)[0][::-1]), generator)


def _descend(
    model: TarFlowLM,
    text: Encoded,
    level: int,
    state: Tensor,
    decoder: Decoders,
    generator: torch.Generator,
    tick: Tick | None,
    before: Encoded | None = None,
) -> Edit:
    """Lead a changed state h^(level) of `text` down to z, and compare with `before` where that is another text."""
    if not torch.isfinite(state).all():
        raise UserError("the state is not finite: lower the strength, or use another checkpoint")
    prior, chosen = model.prior, per_block(decoder, model.num_blocks)

    def invert(index: int, u: Tensor) -> Tensor:
        block = prior.block(index)
        above, below = (prior.patch(text.states[i])[0] for i in (index + 1, index))
        # in the block's order; both directions come out with the axis of positions second
        same = (block.order(u)[0] == block.order(above)[0]).all(2).all(0)
        settled = int(same.long().cumprod(0).sum())
        return invert_block(block, u, decoder=chosen[-1 - index], settled=below, num_settled=settled, tick=tick).h

    states = prior.descend(state, invert, top=level)
    return _edit(model, before or text, model.codebook.decode(states[-1]), tuple(states), generator)


def _edit(
    model: TarFlowLM, text: Encoded, tokens: Tensor, states: tuple[Tensor, ...], generator: torch.Generator
) -> Edit:
    n = text.length
    # The filled part of a last patch belongs to the sequence the bound is of; both texts get the same noise, so that
    # what their bounds differ by is the texts' own.
    seed = int(torch.randint(2**62, (1,), generator=generator, device=generator.device))
    before, after = (bound(model, x, torch.Generator().manual_seed(seed)) for x in (text.tokens, tokens))
    return Edit(
        before=text.tokens[:, :n],
        tokens=tokens[:, :n],
        changed=(tokens != text.tokens)[:, :n],
        bound_before=before,
        bound=after,
        states=tuple(h[:, :n] for h in states),
    )


@torch.no_grad()
def bound(
    model: LanguageModel, tokens: Int[Tensor, "B T"], generator: torch.Generator, *, samples: int = 8
) -> Float[Tensor, " B"]:
    """The negative ELBO of texts, a mean over posterior samples; exact for the baseline: [B], nats."""
    draws = 1 if model.is_exact else samples
    return torch.stack([negative_bound(model, tokens, generator=generator) for _ in range(draws)]).mean(0)


def _checked_level(model: TarFlowLM, level: int) -> int:
    if not 0 <= level <= model.num_blocks:
        raise UserError(f"block {level}: the model has states 0 (the latents) to {model.num_blocks} (the noise)")
    return level
