r"""Samples given some of their tokens: sequential Monte Carlo over the positions (docs/math.md, section 9).

Every sample has J particles, candidates that agree on the given tokens. Wherever a token is given, a particle's
weight is multiplied by the probability it gave to that token; when the weights of a sample become uneven, its
particles are resampled by weight, and the noise ahead of them is refreshed. At the end one of them is drawn by
weight. As J grows this is the exact conditional; J = 1 fixes the given tokens and draws the rest from left to right.
"""

import math
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from tarflowlm.flow.numerics import log_standard_normal
from tarflowlm.generation.inversion import Decoders, Inverted, Tick, invert_stack
from tarflowlm.generation.passage import Passage
from tarflowlm.generation.sampling import row_normal, row_uniform
from tarflowlm.model import TarFlowLM

RESAMPLE_BELOW = 0.5
"""Effective sample size, over the number of particles, below which they are resampled."""


@dataclass
class Weights:
    """Log-weights [num, J] of the particles of every sample, and what earlier draws were worth."""

    log_w: Tensor
    log_evidence: Tensor
    """[num], nats, of what was given up to the last draw."""
    draws: Tensor
    """How often the particles of each sample were resampled, [num]."""

    @classmethod
    def uniform(cls, num: int, particles: int) -> "Weights":
        zero = torch.zeros(num, dtype=torch.float64)
        return cls(torch.zeros(num, particles, dtype=torch.float64), zero, zero.long())

    def add(self, log_increment: Tensor) -> None:
        """Increments [num J]; what is not a number counts as impossible."""
        more = log_increment.detach().double().cpu().view(self.log_w.shape)
        self.log_w = self.log_w + torch.where(more.isnan(), -torch.inf, more)

    def effective(self) -> Tensor:
        """Effective sample size (sum w)^2 / sum w^2 of every sample: 1 to J, or 0 where all weights are zero."""
        log_w = self.log_w
        return (2 * log_w.logsumexp(-1) - (2 * log_w).logsumexp(-1)).exp().nan_to_num(0.0)

    def total(self) -> Tensor:
        """Estimate of log p(given) [num]: its exponential is unbiased."""
        return self.log_evidence + self.log_w.logsumexp(-1) - math.log(self.log_w.shape[1])

    def reset(self, sample: int) -> None:
        """The particles of `sample` were resampled: their weights are equal again."""
        self.log_evidence[sample] = self.total()[sample]
        self.log_w[sample] = 0.0
        self.draws[sample] += 1


def resample(log_w: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """`count` indices drawn by weight, systematically: index i comes count w_i times, rounded up or down."""
    w = log_w.softmax(-1)
    if not torch.isfinite(w).all():
        # nothing is possible: keep them all
        w = torch.full_like(w, 1 / len(w))
    at = (torch.arange(count, dtype=w.dtype) + torch.rand((), generator=generator, dtype=w.dtype)) / count
    return torch.searchsorted(w.cumsum(-1), at).clamp_(max=len(w) - 1)


@runtime_checkable
class Source(Protocol):
    """Where a passage takes its noise from; told when particles are resampled."""

    def follow(self, own: Tensor, parents: Tensor, at: int) -> None:
        """The rows `own` continue from their `parents`, before position `at`."""

    def refresh(self, samples: list[int], own: Tensor, at: int) -> Tensor:
        """Noise [rows, T, ...] of the rows `own` of these samples, for position `at` and all after it."""


def particle_filter(
    passage: Passage, weights: Weights, generators: list[torch.Generator], source: Source, tick: Tick | None
) -> None:
    """Take the passage to its end; weight its particles, and resample them where their weights become uneven."""
    num, particles = weights.log_w.shape
    while passage.at < passage.num_positions:
        weights.add(passage.step())
        if tick is not None:
            tick()
        if particles == 1 or passage.at == passage.num_positions:
            continue
        uneven = (weights.effective() < RESAMPLE_BELOW * particles).nonzero().flatten().tolist()
        if not uneven:
            continue
        rows = torch.arange(num * particles).view(num, particles)
        own = rows[uneven].flatten()
        for b in uneven:
            rows[b] = rows[b, resample(weights.log_w[b], particles, generators[b])]
            weights.reset(b)
        source.follow(own, rows[uneven].flatten(), passage.at)
        passage.select(rows.flatten())
        passage.renew(own, source.refresh(uneven, own, passage.at))


class UniformSource:
    """Uniform numbers for the baseline: nothing stands above it, so they do not touch the weights."""

    def __init__(self, generators: list[torch.Generator], particles: int, num_tokens: int) -> None:
        self.generators, self.shape = generators, (particles, num_tokens)
        self.uniform = row_uniform(generators, particles, num_tokens).flatten(0, 1)

    def follow(self, own: Tensor, parents: Tensor, at: int) -> None:
        pass

    def refresh(self, samples: list[int], own: Tensor, at: int) -> Tensor:
        return row_uniform([self.generators[b] for b in samples], *self.shape).flatten(0, 1)


class LatentSource:
    r"""Noise for block 1 from the blocks above it, drawn without knowing what is given (docs/math.md, eq. 22).

    The noise h^(1) of block 1 has density P, the prior of the blocks above. A full draw h' ~ P serves a particle at
    the positions where nothing is given; what is given has the noise h* that it has. The factor that this brings to
    the particle's weight is

        P(h*) / N(h*_given)  prod_{draws h'} R(h'_unused | h'_used) / P(h')

    with any density R, and makes the mean weight p(given) exactly. The nearer R to P's conditional, the more even the
    weights: it is that of block 2 alone, which is P itself in a stack of two, and a standard normal for the unused
    tokens of a patch that is used in part. After resampling, a sample takes fresh draws, so that
    they part again. Without blocks above all factors cancel.
    """

    def __init__(
        self,
        model: TarFlowLM,
        generators: list[torch.Generator],
        particles: int,
        is_known: Tensor,
        decoder: Decoders,
        tick: Tick | None,
    ) -> None:
        """`is_known` [num J, T] on the CPU."""
        self.model, self.generators, self.decoder = model, generators, decoder
        self.single = model.num_blocks == 1
        self.is_known = is_known.to(model.codebook.mean.device)
        self.shape = (particles, is_known.shape[1], model.config.latent_dim)
        self.draw, self.work = self._draw(generators, tick)
        self.log_p = self._log_p(self.draw)
        self.correction = torch.zeros_like(self.log_p)
        self.since = torch.zeros(len(is_known), dtype=torch.long, device=self.is_known.device)

    def _draw(self, generators: list[torch.Generator], tick: Tick | None) -> tuple[Tensor, list[Inverted]]:
        noise = row_normal(generators, *self.shape).flatten(0, 1).to(self.model.codebook.mean)
        states, work = invert_stack(self.model, noise, decoder=self.decoder, above=1, tick=tick)
        return states[-1], work

    def _log_p(self, h: Tensor) -> Tensor:
        return h.new_zeros(len(h)) if self.single else self.model.prior.log_prob(h, above=1)

    def _account_for_draw(self, rows: Tensor, at: int) -> None:
        """The draws of these rows served up to position `at`: their factor."""
        if self.single:
            return
        prior, token = self.model.prior, torch.arange(self.shape[1], device=self.since.device)
        used = (token >= self.since[rows, None]) & (token < at * self.model.config.patch) & ~self.is_known[rows]
        h, used_NP = self.draw[rows], used.view(len(rows), -1, self.model.config.patch)
        whole = prior.block(1).position_log_prob(prior.patch(h)[0]) * ~used_NP.any(-1)
        partly = used_NP.any(-1, keepdim=True) & ~used_NP
        normal = log_standard_normal(h).sum(-1) * partly.flatten(1)
        self.correction[rows] += whole.sum(-1) + normal.sum(-1) - self.log_p[rows]

    def follow(self, own: Tensor, parents: Tensor, at: int) -> None:
        self._account_for_draw(own, at)
        self.correction[own] = self.correction[parents]

    def refresh(self, samples: list[int], own: Tensor, at: int) -> Tensor:
        fresh, _ = self._draw([self.generators[b] for b in samples], None)
        self.draw[own], self.log_p[own] = fresh, self._log_p(fresh)
        self.since[own] = at * self.model.config.patch
        return fresh

    def log_factor(self, h: Tensor) -> Tensor:
        """The factor of every row, given the noise h* [rows, T, d] it ended with."""
        if self.single:
            return torch.zeros_like(self.log_p)
        self._account_for_draw(torch.arange(len(h)), -(-self.shape[1] // self.model.config.patch))
        given = (log_standard_normal(h).sum(-1) * self.is_known).sum(-1)
        return self._log_p(h) - given + self.correction
