r"""Samples given some of their tokens: sequential Monte Carlo over the positions (docs/math.md, section 9).

Every sample has N particles, candidates that agree on the given tokens. Wherever a token is given, a particle's
weight is multiplied by the probability it gave to that token; when the weights of a sample become uneven, its
particles are drawn anew by weight, and the noise ahead of them is refreshed. In the end one of them is drawn by
weight. As N grows this is the exact conditional; N = 1 fixes the given tokens and draws the rest from left to right.
"""

import math
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from tarflowlm.generation.passage import Passage, Tick

RESAMPLE_BELOW = 0.5
"""Effective sample size, over the number of particles, below which they are drawn anew."""


@dataclass
class Weights:
    """Log-weights [num, N] of the particles of every sample, and what earlier draws were worth."""

    log_w: Tensor
    log_evidence: Tensor
    """[num], nats, of what was given up to the last draw."""
    draws: Tensor
    """How often the particles of each sample were drawn anew, [num]."""

    @classmethod
    def uniform(cls, num: int, particles: int) -> "Weights":
        zero = torch.zeros(num, dtype=torch.float64)
        return cls(torch.zeros(num, particles, dtype=torch.float64), zero, zero.long())

    def add(self, log_increment: Tensor) -> None:
        """Increments [num N]; what is not a number counts as impossible."""
        more = log_increment.detach().double().cpu().view(self.log_w.shape)
        self.log_w = self.log_w + torch.where(more.isnan(), -torch.inf, more)

    def effective(self) -> Tensor:
        """Effective sample size (sum w)^2 / sum w^2 of every sample: 1 to N, or 0 where all weights are zero."""
        log_w = self.log_w
        return (2 * log_w.logsumexp(-1) - (2 * log_w).logsumexp(-1)).exp().nan_to_num(0.0)

    def total(self) -> Tensor:
        """Estimate of log p(given) [num]: its exponential is unbiased."""
        return self.log_evidence + self.log_w.logsumexp(-1) - math.log(self.log_w.shape[1])

    def close(self, sample: int) -> None:
        """The particles of `sample` were drawn by weight: they are equal again."""
        self.log_evidence[sample] = self.total()[sample]
        self.log_w[sample] = 0.0
        self.draws[sample] += 1


def draw(log_w: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """`count` indices drawn by weight, systematically: index i comes count w_i times, rounded up or down."""
    w = log_w.softmax(-1)
    if not torch.isfinite(w).all():
        # nothing is possible: keep them all
        w = torch.full_like(w, 1 / len(w))
    at = (torch.arange(count, dtype=w.dtype) + torch.rand((), generator=generator, dtype=w.dtype)) / count
    return torch.searchsorted(w.cumsum(-1), at).clamp_(max=len(w) - 1)


@runtime_checkable
class Source(Protocol):
    """Where a passage takes its noise from; told when particles are drawn anew."""

    def close(self, own: Tensor, parents: Tensor, at: int) -> None:
        """The rows `own` go on from their `parents`, before position `at`."""

    def refresh(self, samples: list[int], own: Tensor, at: int) -> Tensor:
        """Noise [rows, T, ...] of the rows `own` of these samples, for position `at` and all after it."""


def walk(
    passage: Passage, weights: Weights, generators: list[torch.Generator], source: Source, tick: Tick | None
) -> None:
    """Lead the passage to its end, weigh its particles, and draw them anew where their weights become uneven."""
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
            rows[b] = rows[b, draw(weights.log_w[b], particles, generators[b])]
            weights.close(b)
        source.close(own, rows[uneven].flatten(), passage.at)
        passage.select(rows.flatten())
        passage.renew(own, source.refresh(uneven, own, passage.at))
