"""Sampling with given tokens: sequential Monte Carlo over positions (docs/math.md, section 9).

Each sample has R particles that agree on the given tokens, weighted by the probabilities that they
assigned to these. Uneven particles are resampled, and at the end one is drawn by weight: exact in
the limit of many. With R = 1 the other tokens are drawn from left to right.
"""

import math
from collections.abc import Generator
from dataclasses import dataclass

import torch
from torch import Tensor

from tarflowlm.config import Decoder
from tarflowlm.flow.numerics import log_standard_normal
from tarflowlm.generation.conditioned import Conditioned
from tarflowlm.generation.inversion import Inverted, invert_stack
from tarflowlm.generation.sampling import row_draws, row_normal, row_uniform
from tarflowlm.model import TarFlowLM
from tarflowlm.progress import SILENT, Progress

RESAMPLE_BELOW = 0.5
"""Particles are resampled when their effective sample size falls below this times R."""
FEWEST = 25
"""Weights below which a tail is too short to fit."""
UNRELIABLE = 0.7
"""Tail index above which the mean of weights is unreliable."""


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


@dataclass
class Weights:
    """The weights of R particles per sample, in float64 on the CPU (docs/math.md, eq. 21)."""

    log_w: Tensor
    """log omega_r since the last resampling, [num, R], in nats."""
    log_evidence: Tensor
    """An estimate of log p(given tokens) up to the last resampling, [num], in nats."""
    draws: Tensor
    """How often the particles of each sample were resampled, [num]."""

    @classmethod
    def uniform(cls, num: int, particles: int) -> "Weights":
        """Weights of 1."""
        zero = torch.zeros(num, dtype=torch.float64)
        return cls(torch.zeros(num, particles, dtype=torch.float64), zero, zero.long())

    def add(self, log_increment: Tensor | None) -> None:
        """Multiply the weights by exp(`log_increment`), [num R]; NaN counts as probability zero."""
        if log_increment is not None:
            increment = log_increment.detach().cpu().double().view(self.log_w.shape)
            self.log_w = self.log_w + torch.where(increment.isnan(), -torch.inf, increment)

    def effective(self) -> Tensor:
        """Effective sample size of the particles of every sample, [num]."""
        return effective(self.log_w)

    def total(self) -> Tensor:
        """The estimate of log p(given tokens), [num], in nats."""
        return self.log_evidence + self.log_w.logsumexp(-1) - math.log(self.log_w.shape[1])

    def evidence(self) -> Evidence:
        """The evidence of the weights at the end."""
        k = [pareto_k(log_w) for log_w in self.log_w]
        return Evidence(
            log_evidence=self.total(),
            ess=self.effective(),
            pareto_k=torch.tensor(k, dtype=torch.float64),
            draws=self.draws,
        )

    def reset(self, sample: int) -> None:
        """Move the mean weight of a resampled sample to the evidence; its weights are 1 again."""
        self.log_evidence[sample] = self.total()[sample]
        self.log_w[sample] = 0.0
        self.draws[sample] += 1


def effective(log_w: Tensor) -> Tensor:
    """Effective sample size (sum_r omega_r)^2 / sum_r omega_r^2 of [..., R]; 0 without weight."""
    return (2 * log_w.logsumexp(-1) - (2 * log_w).logsumexp(-1)).exp().nan_to_num(0.0)


def resample(log_w: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Systematic resampling: `count` indices, where r occurs `count` w_r times, rounded up or down.

    w is the softmax of `log_w` [R]; if all weights are zero, it is uniform.
    """
    w = log_w.softmax(-1)
    if not torch.isfinite(w).all():
        w = torch.full_like(w, 1 / len(w))
    offset = torch.rand((), generator=generator, dtype=w.dtype)
    at = (torch.arange(count, dtype=w.dtype) + offset) / count
    return torch.searchsorted(w.cumsum(-1), at).clamp_(max=len(w) - 1)


def particle_filter(
    conditioned: Conditioned,
    weights: Weights,
    generators: list[torch.Generator],
    source: "UniformSource | LatentSource",
    progress: Progress,
) -> Generator[Tensor, None, None]:
    """Run `conditioned` to its end, adding to `weights`.

    The particles of a sample are resampled when their effective number falls below a share of R;
    `source` gives them fresh noise. `generators` has one per sample. A single particle is final
    after every position: then the generator yields its values so far.
    """
    num, particles = weights.log_w.shape
    while conditioned.at < conditioned.num_positions:
        weights.add(conditioned.step())
        progress.advance()
        if particles == 1:
            yield conditioned.values[:, : conditioned.at]
            continue
        if conditioned.at == conditioned.num_positions:
            return
        is_uneven = weights.effective() < RESAMPLE_BELOW * particles
        uneven: list[int] = is_uneven.nonzero().flatten().tolist()
        if not uneven:
            continue
        rows = torch.arange(num * particles).view(num, particles)
        own = rows[uneven].flatten()
        for b in uneven:
            rows[b] = rows[b, resample(weights.log_w[b], particles, generators[b])]
            weights.reset(b)
        fresh = source.redraw(uneven, own, rows[uneven].flatten(), conditioned.at)
        conditioned.select(rows.flatten(), own, fresh)


class UniformSource:
    """Uniform random numbers for the baseline. They add no factor to the weights."""

    def __init__(self, generators: list[torch.Generator], particles: int, num_tokens: int) -> None:
        self.generators = generators
        self.shape = (particles, num_tokens)
        self.draw = row_uniform(generators, *self.shape).flatten(0, 1)

    def redraw(self, samples: list[int], own: Tensor, parents: Tensor, at: int) -> Tensor:
        """Fresh uniform numbers [rows, T] for all particles of these samples."""
        return row_uniform([self.generators[b] for b in samples], *self.shape).flatten(0, 1)


class LatentSource:
    """Noise for block 1, drawn from the blocks above it without the given tokens (eq. 22).

    A particle takes the noise of its free tokens from a full draw h' ~ p_{>1} of these blocks;
    given tokens have the noise h* of their latents. The weight gains the factor of (22), which is 1
    for a single block.
    """

    def __init__(
        self,
        model: TarFlowLM,
        generators: list[torch.Generator],
        particles: int,
        is_known: Tensor,
        decoder: tuple[Decoder, ...],
        progress: Progress,
    ) -> None:
        """`is_known` [num R, T] says which tokens are given; `generators` has one per sample."""
        self.model = model
        self.generators = generators
        self.decoder = decoder
        self.single = model.num_blocks == 1
        self.is_known = is_known.to(model.codebook.mean.device)
        self.shape = (particles, is_known.shape[1], model.config.latent_dim)
        self.draw, self.work = self._draw(generators, progress)
        self.log_p = self._log_p(self.draw)
        # sum over finished draws of log rho(h'_unused | h'_used) - log p_{>1}(h'), per row
        self.correction = torch.zeros_like(self.log_p)
        # first token that the present draw of a row serves
        self.since = torch.zeros(len(is_known), dtype=torch.long, device=self.is_known.device)

    def _draw(
        self, generators: list[torch.Generator], progress: Progress
    ) -> tuple[Tensor, list[Inverted]]:
        noise = row_normal(generators, *self.shape).flatten(0, 1).to(self.model.codebook.mean)
        if self.single:
            return noise, []
        particles, num_tokens, _ = self.shape
        uniform = row_draws(self.decoder[0], generators, self.model.prior, num_tokens, particles)
        states, work = invert_stack(
            self.model,
            noise,
            decoder=self.decoder,
            above=1,
            uniform=uniform,
            progress=progress,
        )
        return states[-1], work

    def _log_p(self, h: Tensor) -> Tensor:
        return h.new_zeros(len(h)) if self.single else self.model.prior.log_prob(h, above=1)

    def _account_for_draw(self, rows: Tensor, at: int) -> None:
        """Add log rho(h'_unused | h'_used) - log p_{>1}(h') for draws that were used up to `at`."""
        if self.single:
            return
        prior = self.model.prior
        patch = self.model.config.patch
        h = self.draw[rows]
        token = torch.arange(self.shape[1], device=self.since.device)
        is_served = (token >= self.since[rows, None]) & (token < at * patch)
        used = (is_served & ~self.is_known[rows]).view(len(rows), -1, patch)
        whole = prior.block(1).log_prob(prior.patch(h)) * ~used.any(-1)
        is_left = used.any(-1, keepdim=True) & ~used
        normal = log_standard_normal(h).sum(-1) * is_left.flatten(1)
        self.correction[rows] += whole.sum(-1) + normal.sum(-1) - self.log_p[rows]

    def redraw(self, samples: list[int], own: Tensor, parents: Tensor, at: int) -> Tensor:
        """Fresh draws h' [rows, T, d] for the rows `own` of these samples, from position `at` on.

        The rows continue those of their `parents`, and get the factors of their draws.
        """
        self._account_for_draw(own, at)
        self.correction[own] = self.correction[parents]
        fresh, _ = self._draw([self.generators[b] for b in samples], SILENT)
        self.draw[own] = fresh
        self.log_p[own] = self._log_p(fresh)
        self.since[own] = at * self.model.config.patch
        return fresh

    def log_factor(self, h: Tensor) -> Tensor:
        """The log of the factor, [num R], in nats, given the final noise h* [num R, T, d]."""
        if self.single:
            return torch.zeros_like(self.log_p)
        self._account_for_draw(torch.arange(len(h)), -(-self.shape[1] // self.model.config.patch))
        known = (log_standard_normal(h).sum(-1) * self.is_known).sum(-1)
        return self._log_p(h) - known + self.correction


def pareto_k(log_w: Tensor) -> float:
    """The tail index k of weights exp(`log_w` [R]); NaN if R < 25 or the tail has no spread.

    Moments of order 1 / k and above are infinite: from k = 1/2 on the variance. A generalised
    Pareto distribution is fitted to the largest M = min(R / 5, 3 sqrt(R)) weights (Vehtari et al.
    2024, section 2 and appendix C), by its posterior mean (Zhang and Stephens 2009).
    """
    R = len(log_w)
    w = (log_w.double() - log_w.max()).exp().sort().values
    M = math.ceil(min(0.2 * R, 3 * R**0.5))
    if R < FEWEST or not torch.isfinite(w).all():
        return math.nan
    x = w[-M:] - w[-M - 1]
    quartile = x[int(M / 4 + 0.5) - 1]
    if not quartile > 0:
        return math.nan
    points = 30 + int(M**0.5)  # of a grid of theta = -k / scale
    j = torch.arange(1, points + 1, dtype=x.dtype) - 0.5
    theta = 1 / x[-1] + (1 - (points / j).sqrt()) / (3 * quartile)
    k = torch.log1p(-theta[:, None] * x).mean(-1)
    log_likelihood = M * ((-theta / k).log() - k - 1)
    mean_theta = (log_likelihood.softmax(0) * theta).sum()
    found = torch.log1p(-mean_theta * x).mean().item()
    return (M * found + 10 * 0.5) / (M + 10)  # a weak prior, as if ten more values had said 1/2
