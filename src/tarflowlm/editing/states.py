"""Editing in latent space: change a state of a text, and invert the blocks below it.

The flow is invertible, so every changed state is a text (docs/math.md, section 10).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Int
from torch import Generator, Tensor

from tarflowlm import chunks
from tarflowlm.config import Decoder
from tarflowlm.errors import SILENT, Progress, UserError
from tarflowlm.generation import generate
from tarflowlm.generation.inverse import invert_stack
from tarflowlm.generation.sampling import row_generators
from tarflowlm.model import LanguageModel, as_flow, check_tokens

SAMPLES = 8
"""Posterior samples of a bound."""


@dataclass(frozen=True)
class Change:
    """A batch of texts before and after an edit."""

    before: Tensor
    """Tokens before the edit, [B, T]."""
    tokens: Tensor
    """Tokens after the edit, [B, T'], with T' = T unless words of another length were put in."""
    changed: Tensor
    """Which of these are new, [B, T']."""
    measure: Callable[[], tuple[Tensor, Tensor]]
    """Computes the `bounds`, which takes longer than most edits."""
    states: tuple[Tensor, ...]
    """States of the new text, from the edited one down to h^(0), each [B, T', d]."""
    pareto_k: tuple[float, ...] = ()
    """`Encoded.pareto_k` of every text if spans were redrawn, else empty."""

    @cached_property
    def bounds(self) -> tuple[Tensor, Tensor]:
        """The bounds before and after the edit, [B] each, in nats: means over SAMPLES posterior
        samples, with the same noise.
        """
        return self.measure()


@dataclass(frozen=True)
class Encoded:
    """A batch of texts of equal length with all states."""

    tokens: Tensor
    """[B, T], padded by the model to whole patches."""
    length: int
    """Tokens of the text itself, without the padding."""
    states: tuple[Tensor, ...]
    """h^(0) = z, ..., h^(L) = u, each [B, T, d]; none of a baseline."""
    pareto_k: float = math.nan
    """The largest tail index of the weights of redrawn spans; above 0.7 they are unreliable. NaN
    for fewer than 25 candidates.
    """

    def row(self, b: int) -> "Encoded":
        """Text b alone."""
        states = tuple(h[b : b + 1] for h in self.states)
        return replace(self, tokens=self.tokens[b : b + 1], states=states)

    def repeated(self, num: int) -> "Encoded":
        """A single text `num` times."""
        states = tuple(h.expand(num, -1, -1) for h in self.states)
        return replace(self, tokens=self.tokens.expand(num, -1), states=states)


@torch.no_grad()
def encode(model: LanguageModel, tokens: Int[Tensor, "B T"], generator: Generator) -> Encoded:
    """Latents z ~ q(z|x) and states of texts; the model fills an incomplete last patch.

    Latents that decode to another token (Gaussians may overlap) become the mean of their own.
    Errors: `check_tokens`.
    """
    check_tokens(model, tokens)
    length = tokens.shape[1]
    if model.is_exact:
        return Encoded(tokens.to(model.device), length, ())
    flow = as_flow(model)
    book = flow.codebook
    missing = -length % model.config.patch
    if missing:
        filled = generate(
            model,
            num_tokens=length + missing,
            num=len(tokens),
            prompt=tokens,
            generator=generator,
            decoder="sweeps",
        )
        tokens = filled.tokens.cpu()
    tokens = tokens.to(book.mean.device)
    z = book.encode(tokens, flow.draw_noise(tokens, generator))
    z = torch.where((book.decode(z) == tokens)[..., None], z, book.mean[tokens])
    return Encoded(tokens, length, tuple(flow.prior.states(z)[0]))


@dataclass(frozen=True)
class Source:
    """Texts to edit, their model and a source of noise. Each row is one edit with its own noise,
    which does not depend on the number of edits.
    """

    model: LanguageModel
    text: Encoded
    generator: Generator
    progress: Progress = SILENT

    def normal(self, *shape: int) -> Tensor:
        """Standard normal noise."""
        generator = self.generator
        device = generator.device
        noise = torch.randn(*shape, generator=generator, device=device, dtype=torch.float32)
        return noise.to(self.text.states[0])


@torch.no_grad()
def renoise(
    source: Source,
    *,
    level: int,
    strength: float,
    where: Bool[Tensor, " T"] | None = None,
    decoder: Decoder = "steps",
) -> Change:
    """Re-noise state l: h^(l) -> sqrt(1 - eta^2) h^(l) + eta eps, with eps ~ N(0, I) (eq. 25).

    Blocks l, ..., 1 are then inverted. `level` l runs from 0 (the latents) to L (the noise),
    `strength` eta from 0 (no change) to 1 (all noise). `where` limits the change to some tokens.
    The progress advances once per position and block. UserError if l is out of range.
    """
    states = source.text.states
    if not 0 <= level < len(states):
        last = len(states) - 1
        what = f"level {level}: the model has states 0 (the latents) to {last} (the noise)"
        raise UserError(what)
    state = states[level]
    noise = [
        replace(source, generator=generator).normal(1, *state.shape[1:])
        for generator in row_generators(range(len(state)), source.generator)
    ]
    changed = (1 - strength**2) ** 0.5 * state + strength * torch.cat(noise)
    if where is not None:
        changed = torch.where(where.to(state.device)[:, None], changed, state)
    below = inverted_below(source, level, changed, decoder)
    return compared(source, as_flow(source.model).codebook.decode(below[-1]), below)


def inverted_below(source: Source, level: int, state: Tensor, decoder: Decoder) -> list[Tensor]:
    """The states h^(level) = `state`, ..., h^(0), each [B, T, d]."""
    positions = state.shape[1] // source.model.config.patch
    source.progress.stage("editing, positions", level * positions)
    states, _ = invert_stack(
        as_flow(source.model),
        state,
        decoder=decoder,
        level=level,
        known=source.text.states,
        progress=source.progress,
    )
    return states


def compared(
    source: Source, tokens: Tensor, states: Sequence[Tensor], *, aligned: Tensor | None = None
) -> Change:
    """The edit of the texts into these tokens [B, T] and states, with the bounds before and after.

    `aligned` [T] has the old token at every place of a new text of another length, -1 for none.
    """
    model = source.model
    text = source.text
    old = text.tokens[:, : text.length]
    aligned = old if aligned is None else aligned.to(tokens.device)
    length = aligned.shape[-1]
    new = tokens[:, :length]
    # the same noise for both, so that equal texts have equal bounds
    noise, same_noise = row_generators((0, 0), source.generator)
    return Change(
        old,
        new,
        changed=new != aligned,
        measure=lambda: (_bound(model, text.tokens, noise), _bound(model, tokens, same_noise)),
        states=tuple(h[:, :length] for h in states),
    )


@torch.no_grad()
def _bound(
    model: LanguageModel, tokens: Int[Tensor, "B T"], generator: Generator
) -> Float[Tensor, " B"]:
    """The bound of texts of whole patches, in nats: a mean over SAMPLES posterior samples.

    It is exact for a baseline. All texts get the same noise.
    """
    if model.is_exact:
        return model.bound(tokens, model.draw_noise(tokens))
    noise = torch.cat([model.draw_noise(tokens[:1], generator) for _ in range(SAMPLES)])
    # every text with every noise
    texts = tokens.repeat_interleave(SAMPLES, 0)
    rows = chunks.bound_rows(tokens.shape[1], tokens.device)
    draws = chunks.in_parts(model.bound, rows, texts, noise.repeat(len(tokens), 1, 1))
    return torch.cat(draws).view(-1, SAMPLES).mean(1)
