"""The random numbers of samples, and their results: tokens, latents, evidence and work.

Shape legend: B rows, T tokens, N positions, d channels per token.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Generator, Tensor

from tarflowlm.config import Decoder
from tarflowlm.data.prompts import BLANK as BLANK
from tarflowlm.errors import Progress
from tarflowlm.flow import wide_dtype
from tarflowlm.flow.transformer import KVCache
from tarflowlm.model import LanguageModel, TarFlowLM, as_flow


def row_generators(rows: Iterable[int], generator: Generator) -> list[Generator]:
    """A generator per row, from `generator` and the row; on the CPU, the same for every device."""
    seed = int(torch.randint(2**62, (1,), generator=generator, device=generator.device))
    return [Generator().manual_seed(seed + row) for row in rows]


@dataclass(frozen=True)
class Noise:
    """The random numbers of samples of R particles each: by row, then by position.

    All that is random in a text comes from here. A sample's numbers depend on its generator and on
    its earlier requests, never on other samples.
    """

    model: LanguageModel
    generators: Sequence[Generator]
    """One per sample."""
    particles: int

    def normal(self, *shape: int) -> Tensor:
        """Standard normal noise [num R, *shape], drawn in float32, as the model computes."""
        noise = [torch.randn(self.particles, *shape, generator=g) for g in self.generators]
        return torch.cat(noise).to(next(self.model.parameters()))

    def uniform(self, *shape: int) -> Tensor:
        """Uniform numbers [num R, *shape] in [0, 1), in float64 on the CPU."""
        numbers = [
            torch.rand(self.particles, *shape, generator=g, dtype=torch.float64)
            for g in self.generators
        ]
        return torch.cat(numbers)

    def draws(self, num_tokens: int) -> Tensor:
        """Uniform numbers [num R, N, G] by which block L is drawn."""
        prior = as_flow(self.model).prior
        block = prior.block(-1)
        groups = len(block.order.channels) // block.coupling.group
        uniform = self.uniform(num_tokens // prior.patch.patch, groups)
        return uniform.to(block.start.device, wide_dtype(block.start))

    def of(self, samples: Sequence[int]) -> "Noise":
        """The noise of some of the samples, by their numbers."""
        return replace(self, generators=[self.generators[b] for b in samples])


@dataclass(frozen=True)
class Evidence:
    """How well samples agree with their given tokens, by the weights of their particles."""

    log_evidence: Tensor
    """An estimate of log p(given tokens), [num], in nats; its exponential is unbiased."""
    ess: Tensor
    """Effective sample size of the particles at the end, [num]."""
    pareto_k: Tensor
    """Tail index of the weights, [num]: unreliable above 0.7. NaN if R < 25."""
    draws: Tensor
    """How often the particles of each sample were resampled, [num]."""


class Work(NamedTuple):
    """How the latents of a block were computed."""

    decoder: Decoder
    passes: int
    """Steps and sweeps, each one pass of the Transformer over some positions."""


@dataclass(frozen=True)
class GapLengths:
    """How the gaps of a template were filled."""

    given: Tensor
    """Where the tokens are given ones, [num, T]."""
    ends: Tensor
    """Tokens up to the end of the template, [num]."""
    lengths: tuple[Tensor, ...]
    """For each gap of unknown length the probabilities [num, ...] of least to most tokens."""


@dataclass(frozen=True)
class Generation:
    """Samples, and how they came about."""

    tokens: Tensor
    """[num, T]."""
    evidence: Evidence | None = None
    """How well the samples agree with the given tokens; None without given tokens."""
    work: tuple[Work, ...] = ()
    """The work in each block, L first; empty for the baseline."""
    filled: GapLengths | None = None
    """How gaps of unknown length were filled; None without them or a constraint."""
    latents: tuple[Tensor, ...] = ()
    """The states h^(L) = u, ..., h^(0) = z of the inversion, each [num, T', d] in whole patches and
    with the context; z alone where it was drawn or completed. Empty for the baseline, for texts
    beyond the trained context, and where samples may end early.
    """
    context: int = 0
    """Number of latents at the start that are context, and have no `tokens`."""

    @torch.no_grad()
    def states(self, model: TarFlowLM) -> tuple[Tensor, ...]:
        """h^(L) = u, ..., h^(0) = z, each [num, T, d]; empty without `latents`."""
        end = self.context + self.tokens.shape[1]
        states = self.latents
        if len(states) == 1:
            # not the noise that was drawn: given tokens have changed it, or it was never inverted
            states = tuple(reversed(model.prior.states(states[0])[0]))
        return tuple(h[:, self.context : end] for h in states)

    def passes(self, model: TarFlowLM) -> tuple[Tensor, ...]:
        """The `states` decoded, each [num, T], coarse to fine. The last is `tokens`."""
        states = self.states(model)
        return (*map(model.codebook.decode, states[:-1]), self.tokens) if states else ()

    def drop_context(self, num: int) -> "Generation":
        """The samples without their first `num` tokens, which were context."""
        if not num:
            return self
        filled = self.filled
        if filled is not None:
            filled = GapLengths(filled.given[:, num:], filled.ends - num, filled.lengths)
        return replace(self, tokens=self.tokens[:, num:], evidence=None, filled=filled, context=num)


class Meter(Progress):
    """Counts positions of windows and blocks, and tells `progress` of finished tokens."""

    def __init__(self, progress: Progress, num_tokens: int, positions: int) -> None:
        self.progress = progress
        self.num_tokens = num_tokens
        self.positions = positions
        self.passed = 0

    def advance(self, count: int = 1) -> None:
        before = self.num_tokens * self.passed // self.positions
        self.passed = min(self.positions, self.passed + count)
        self.progress.advance(self.num_tokens * self.passed // self.positions - before)


def drop_finished(rows: Tensor | slice, ended: Tensor, cache: KVCache) -> Tensor | slice:
    """The `rows` of a cache, without those that `ended` [B] once these are a quarter of them."""
    continues = ~ended[rows]
    if not 0 < continues.sum() <= 0.75 * len(continues):
        return rows
    cache.keep(continues.nonzero()[:, 0])
    return torch.arange(len(ended))[rows][continues]


def num_leading(mask: Tensor) -> int:
    """How many places at the start of `mask` [N] are True."""
    return int(mask.long().cumprod(0).sum())
