r"""Editing in latent space: encode a text, change its state at some block, and invert the blocks
below.

A text x has latents z ~ q(z|x) and states h^(0) = z, ..., h^(L) = u. The flow is invertible, so
every changed state is a text (paper, section 4; docs/math.md, section 10).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Generator, Tensor

from tarflowlm.checks import check_tokens
from tarflowlm.errors import UserError
from tarflowlm.flow import wide_dtype
from tarflowlm.generation import generate
from tarflowlm.generation.conditioned import ConditionedLatents
from tarflowlm.generation.inversion import Decoders, invert_block, per_block
from tarflowlm.generation.sampling import num_leading
from tarflowlm.language_model import LanguageModel
from tarflowlm.model import TarFlowLM
from tarflowlm.progress import SILENT, Progress


@dataclass(frozen=True)
class Edit:
    """A batch of texts before and after an edit."""

    before: Tensor
    """Tokens before the edit, [B, T]."""
    tokens: Tensor
    """Tokens after it, [B, T], or another number where words of another length were put in."""
    changed: Tensor
    """Which of the new tokens are new, as `tokens`."""
    bound_before: Tensor
    """Upper bound on -log p(x) before the edit, [B], in nats: a mean over posterior samples."""
    bound: Tensor
    """The same after the edit."""
    states: tuple[Tensor, ...]
    """States of the new text from the edited one down to h^(0), each [B, T, d]; all L + 1 after
    `substitute`.
    """
    pareto_k: tuple[float, ...] = ()
    """For every text the largest tail index of the weights by which spans were redrawn: above 0.7
    these are unreliable. NaN for fewer than 25 candidates; empty for other edits.
    """


@dataclass(frozen=True)
class Encoded:
    """A batch of texts of equal length with all states."""

    tokens: Tensor
    """[B, T], padded by the model to whole patches."""
    length: int
    """Tokens of the text itself, without the padding."""
    states: tuple[Tensor, ...]
    """h^(0) = z, ..., h^(L) = u, each [B, T, d]."""
    pareto_k: float = math.nan
    """The largest tail index of the weights by which spans of it were redrawn."""

    def row(self, b: int) -> "Encoded":
        """Text b alone."""
        states = tuple(h[b : b + 1] for h in self.states)
        return replace(self, tokens=self.tokens[b : b + 1], states=states)

    def repeated(self, num: int) -> "Encoded":
        """A single text `num` times."""
        states = tuple(h.expand(num, -1, -1) for h in self.states)
        return replace(self, tokens=self.tokens.expand(num, -1), states=states)


@torch.no_grad()
def encode(model: TarFlowLM, tokens: Int[Tensor, "B T"], generator: Generator) -> Encoded:
    """Latents z ~ q(z|x) and states of texts; an incomplete last patch is filled with a sample of
    the model.

    Latents that decode to another token (Gaussians may overlap) become the mean of their own.
    Errors: `check_tokens`.
    """
    check_tokens(model, tokens)
    length, book = tokens.shape[1], model.codebook
    if missing := -length % model.config.patch:
        full, num = length + missing, len(tokens)
        filled = generate(
            model, num_tokens=full, num=num, prompt=tokens, generator=generator, decoder="sweeps"
        )
        tokens = filled.tokens.cpu()
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
    generator: Generator,
    where: Bool[Tensor, " T"] | None = None,
    decoder: Decoders = "steps",
    progress: Progress = SILENT,
) -> Edit:
    r"""Re-noise state l: h^(l) -> sqrt(1 - eta^2) h^(l) + eta eps with eps ~ N(0, I) (docs/math.md,
    eq. 23).

    Blocks l, ..., 1 are then inverted. `level` l runs from 0 (the latents) to L (the noise),
    `strength` eta from 0 (no change) to 1 (all noise). At l = L the distribution of the state is
    the same for every eta. `where` limits the change to some tokens. `progress` advances once per
    position and block. UserError if eta or l is out of range.
    """
    check_share(strength, "strength")
    state = text.states[_checked_level(model, level)]
    eps = torch.randn(*state.shape, generator=generator, device=generator.device).to(state)
    changed = (1 - strength**2) ** 0.5 * state + strength * eps
    # strength 0 must not change the state even by rounding
    keep = (
        torch.zeros_like(state, dtype=torch.bool)
        if strength
        else torch.ones_like(state, dtype=torch.bool)
    )
    if where is not None:
        keep = keep | ~where.to(state.device)[:, None]
    states = inverted_below(
        model, text, level, torch.where(keep, state, changed), decoder, progress
    )
    return compared(model, text, model.codebook.decode(states[-1]), states, generator)


@torch.no_grad()
def interpolate(
    model: TarFlowLM,
    first: Encoded,
    second: Encoded,
    *,
    level: int,
    weight: float,
    generator: Generator,
    decoder: Decoders = "steps",
    progress: Progress = SILENT,
) -> Edit:
    r"""Spherical interpolation of the states l of two texts (docs/math.md, eq. 23), then blocks l,
    ..., 1 inverted:

        (sin((1 - kappa) theta) first^(l) + sin(kappa theta) second^(l)) / sin(theta)

    theta is the angle between the two states of a sequence, vectors in R^(T d). `weight` kappa = 0
    gives the first text, 1 the second, exactly; `Edit.before` is the first. UserError for other
    lengths, or kappa or l out of range.
    """
    check_share(weight, "weight")
    check_lengths(first, second)
    a, b = (text.states[_checked_level(model, level)] for text in (first, second))
    anchor = second if weight == 1.0 else first
    cosine = torch.nn.functional.cosine_similarity(a.flatten(1), b.flatten(1)).to(wide_dtype(a))
    angle = cosine.clamp(-1, 1).arccos().clamp(1e-4, torch.pi - 1e-4)[:, None, None]
    state = (((1 - weight) * angle).sin() * a + (weight * angle).sin() * b) / angle.sin()
    state = anchor.states[level] if weight in (0.0, 1.0) else state.to(a)
    states = inverted_below(model, anchor, level, state, decoder, progress)
    return compared(model, first, model.codebook.decode(states[-1]), states, generator)


@torch.no_grad()
def substitute(
    model: TarFlowLM,
    text: Encoded,
    replacements: Int[Tensor, " T"],
    *,
    generator: Generator,
    progress: Progress = SILENT,
) -> Edit:
    """Replace some tokens and regenerate the others from their own noise h^(1) (docs/math.md,
    section 10).

    `replacements` holds the new tokens, and -1 elsewhere. Positions before the first new token keep
    their latents; later tokens change where their new context changes them.
    """
    assert replacements.shape == (text.length,), "one entry for every token"
    B, T = text.tokens.shape
    wanted = torch.full((T,), -1)
    wanted[: text.length] = replacements.cpu()
    is_known = (wanted >= 0).expand(B, T)
    noise = torch.randn(B, T, model.config.latent_dim, generator=generator, device=generator.device)
    known = model.codebook.encode(
        wanted.clamp_min(0).expand(B, T).to(text.tokens.device), noise.to(text.states[0])
    )
    passage = ConditionedLatents(model, text.states[1], known, is_known, None)
    passage.settle(
        model.prior.patch(text.states[0]), int(is_known[0].int().argmax()) // model.config.patch
    )
    progress.advance(passage.at)
    while passage.at < passage.num_positions:
        passage.step()
        progress.advance()
    z = model.prior.patch.inverse(passage.values)
    tokens = torch.where(wanted >= 0, wanted, model.codebook.decode(z).cpu()).to(z.device)
    return compared(model, text, tokens, model.prior.states(z)[0][::-1], generator)


def inverted_below(
    model: TarFlowLM,
    text: Encoded,
    level: int,
    state: Tensor,
    decoder: Decoders,
    progress: Progress = SILENT,
) -> list[Tensor]:
    """The states h^(level) = `state`, ..., h^(0), each [B, T, d]. What agrees with `text` is copied
    from it.

    In each block these are the positions before the first changed one, in the block's order.
    """
    prior, chosen = model.prior, per_block(decoder, model.num_blocks)
    states = [state]
    for index in reversed(range(level)):
        block, u = prior.block(index), prior.patch(states[-1])
        above, below = (prior.patch(text.states[i]) for i in (index + 1, index))
        # leading positions, in the block's order, whose noise is unchanged in all rows
        same = num_leading((block.order(u) == block.order(above)).all(2).all(0))
        found = invert_block(
            block,
            u,
            decoder=chosen[-1 - index],
            settled=block.order(below)[:, :same],
            progress=progress,
        )
        states.append(prior.patch.inverse(found.h))
    return states


def compared(
    model: TarFlowLM,
    text: Encoded,
    tokens: Tensor,
    states: Sequence[Tensor],
    generator: Generator,
    *,
    aligned: Tensor | None = None,
) -> Edit:
    """The edit of `text` into these tokens [B, T] and states, with bounds of both.

    `aligned` [T] has the old token at every place of a new text of another length, -1 for none.
    """
    # Bounds are of whole patches, padding included. All texts get the same noise, so that
    # it does not enter the differences of their bounds, and equal texts have equal ones.
    seed = int(torch.randint(2**62, (1,), generator=generator, device=generator.device))
    before, after = (
        bound(model, some, Generator().manual_seed(seed), same_noise=True)
        for some in (text.tokens, tokens)
    )
    old = text.tokens[:, : text.length]
    aligned = old if aligned is None else aligned.to(tokens.device)
    length = aligned.shape[-1]
    new = tokens[:, :length]
    return Edit(
        old,
        new,
        changed=new != aligned,
        bound_before=before,
        bound=after,
        states=tuple(h[:, :length] for h in states),
    )


@torch.no_grad()
def bound(
    model: LanguageModel,
    tokens: Int[Tensor, "B T"],
    generator: Generator,
    *,
    samples: int = 8,
    same_noise: bool = False,
) -> Float[Tensor, " B"]:
    """The negative ELBO of texts, [B], in nats, averaged over `samples` posterior samples; exact
    for the baseline.

    With `same_noise` all texts get the same samples of the noise.
    """
    draws = []
    for _ in range(1 if model.is_exact else samples):
        noise = model.draw_noise(tokens[:1] if same_noise else tokens, generator).expand(
            *tokens.shape, -1
        )
        draws.append(model.bound(tokens, noise))
    return torch.stack(draws).mean(0)


def check_share(share: float, name: str) -> None:
    """UserError, calling it `name`, for a share outside of [0, 1]."""
    if not 0 <= share <= 1:
        raise UserError(f"{name} {share}: must be between 0 (the text itself) and 1 (another text)")


def check_lengths(first: Encoded, second: Encoded) -> None:
    """UserError for texts of different lengths."""
    if first.length != second.length:
        raise UserError(
            f"texts of {first.length} and {second.length} tokens: cut them to the same length"
        )


def _checked_level(model: TarFlowLM, level: int) -> int:
    if not 0 <= level <= model.num_blocks:
        raise UserError(
            f"level {level}: the model has states 0 (the latents) to {model.num_blocks} (the noise)"
        )
    return level
