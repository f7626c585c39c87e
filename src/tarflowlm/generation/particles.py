"""Sampling with given tokens: sequential Monte Carlo over positions (docs/math.md, section 9).

Each sample has R particles that agree on the given tokens, weighted by the probabilities that they
assigned to these. Particles of uneven weights are resampled, and at the end one is drawn by weight:
exact in the limit of many. With R = 1 the other tokens are drawn from left to right.
"""

import math
from dataclasses import replace

import torch
from torch import Tensor

from tarflowlm import config
from tarflowlm.errors import SILENT, Progress
from tarflowlm.flow.numerics import log_standard_normal
from tarflowlm.generation.decoder import Drawing
from tarflowlm.generation.inverse import invert_stack
from tarflowlm.generation.inversion import Inversion
from tarflowlm.generation.sampling import BLANK, Evidence, Gumbel, Noise, Work
from tarflowlm.model import TarFlowLM, as_flow
from tarflowlm.requests import Adjustment

RESAMPLE_BELOW = 0.5
"""Particles are resampled when their effective sample size falls below this times R."""
FEWEST = 25
"""Weights below which a tail is too short to fit."""
UNRELIABLE = 0.7
"""Tail index above which the mean of weights is unreliable."""
FEW = 4.0
"""An effective sample size that is small by any measure."""


class Weights:
    """The weights of R particles per sample, in float64 on the CPU (docs/math.md, eq. 21)."""

    def __init__(self, noise: Noise) -> None:
        """Weights of 1."""
        self.generators = noise.generators
        num = len(self.generators)
        self.log_w = torch.zeros(num, noise.particles, dtype=torch.float64)
        """log omega_r [num, R], in nats; after resampling all have the mean weight."""
        self.draws = torch.zeros(num, dtype=torch.long)

    def add(self, log_increment: Tensor | None) -> None:
        """Multiply the weights by exp(`log_increment`), [num R]."""
        if log_increment is not None:
            self.log_w += weight(log_increment).view(self.log_w.shape)

    def chosen(self, sample: int, log_w: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """`count` of the particles of a sample with weights `log_w` [C], and their new weights.

        They are resampled if they are uneven, or too many.
        """
        if len(log_w) == count and not is_uneven(log_w):
            return torch.arange(count), log_w
        self.draws[sample] += 1
        mean = log_w.logsumexp(-1) - math.log(len(log_w))
        return resample(log_w, count, self.generators[sample]), mean.expand(count)

    def evidence(self, candidates: Tensor | None = None) -> Evidence:
        """The evidence at the end; `candidates` [num, C] are log-weights before the last choice."""
        tails = self.log_w if candidates is None else candidates
        return Evidence(
            log_evidence=self.log_w.logsumexp(-1) - math.log(self.log_w.shape[1]),
            ess=effective(tails),
            pareto_k=torch.tensor([pareto_k(log_w) for log_w in tails], dtype=torch.float64),
            draws=self.draws,
            particles=torch.full_like(self.draws, self.log_w.shape[1]),
        )

    def pick(self) -> Tensor:
        """One particle of each sample by weight: rows [num]."""
        picked = [resample(w, 1, g) for w, g in zip(self.log_w, self.generators, strict=True)]
        return torch.cat(picked) + torch.arange(len(picked)) * self.log_w.shape[1]


def is_rough(evidence: Evidence) -> Tensor:
    """Where a choice rests on a few particles, [num]."""
    # as a line shows it, with one digit
    return (10 * evidence.ess).round() < 10 * FEW


def weight(log_w: Tensor) -> Tensor:
    """A log-weight on the CPU, in float64; NaN counts as probability zero."""
    return log_w.detach().cpu().double().nan_to_num(nan=-torch.inf, neginf=-torch.inf)


def effective(log_w: Tensor) -> Tensor:
    """Effective sample size (sum_r omega_r)^2 / sum_r omega_r^2 of [..., R]; 0 without weight."""
    return (2 * log_w.logsumexp(-1) - (2 * log_w).logsumexp(-1)).exp().nan_to_num(0.0)


def is_uneven(log_w: Tensor) -> Tensor:
    """True where particles of weights `log_w` [..., R] are to be resampled."""
    return effective(log_w) < RESAMPLE_BELOW * log_w.shape[-1]


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


class ParticleFilter:
    """R particles per sample, through block 1 or the baseline; they agree on given tokens."""

    def __init__(
        self, rows: Drawing | Inversion, noise: Noise, upper: "UpperBlocks | None" = None
    ) -> None:
        """Reads the leading positions that are given in all rows.

        Rows that are resampled get fresh noise from the `upper` blocks.
        """
        self.rows, self.upper = rows, upper
        self.weights = Weights(noise)
        # a sample alone is resampled after its prompt
        self.prompts = rows.first.view(self.weights.log_w.shape)[:, 0]
        if first := int(rows.first.min()):
            self.weights.add(rows.read(first))

    def step(self) -> None:
        """Write the next position, and resample where weights are uneven."""
        rows, weights = self.rows, self.weights
        weights.add(rows.step())
        num, particles = weights.log_w.shape
        if particles == 1 or not rows.is_open:
            return
        is_due = is_uneven(weights.log_w) & (self.prompts < rows.at)
        uneven: list[int] = is_due.nonzero().flatten().tolist()
        if not uneven:
            return
        order = torch.arange(num * particles).view(num, particles)
        own = order[uneven].flatten()
        for b in uneven:
            chosen, weights.log_w[b] = weights.chosen(b, weights.log_w[b], particles)
            order[b] = order[b, chosen]
        device = rows.values.device
        own, order = own.to(device), order.flatten().to(device)
        rows.take(order)
        if self.upper is not None and isinstance(rows, Inversion):
            fresh = self.upper.redraw(uneven, own, order[own], rows.at)
            rows.noise[own, rows.at :] = fresh[:, rows.at :].to(rows.noise)


class UpperBlocks:
    """Noise for block 1, drawn from the blocks above it without the given tokens (eq. 22).

    A particle takes the noise of its free tokens from a full draw h' ~ p_{>1} of these blocks;
    given tokens have the noise h* of their latents. The weight gains the factor of (22), which is 1
    for a single block.
    """

    def __init__(
        self,
        noise: Noise,
        is_known: Tensor,
        decoder: config.Decoder,
        draws: bool,
        adjust: Adjustment | None,
        progress: Progress,
    ) -> None:
        """`is_known` [num R, T] says which tokens are given. Block L is drawn if `draws`."""
        self.model = as_flow(noise.model)
        self.noise = noise
        self.decoder = decoder
        self.draws = draws
        # with several particles the weights would need the density of adjusted draws
        self.adjust = adjust if noise.particles == 1 else None
        self.single = self.model.num_blocks == 1
        self.is_known = is_known.to(self.model.device)
        self.draw, self.work = self._draw(noise, progress)
        self.log_p = self.model.prior.log_prob(self.draw, above=1)
        # sum over finished draws of log rho(h'_unused | h'_used) - log p_{>1}(h'), per row
        self.correction = torch.zeros_like(self.log_p)
        # first token for which the present draw of a row is used
        self.since = torch.zeros(len(is_known), dtype=torch.long, device=self.is_known.device)

    def _draw(self, noise: Noise, progress: Progress) -> tuple[Tensor, list[Work]]:
        u = noise.normal(self.is_known.shape[1])
        if self.single:
            return u, []
        states, work = invert_stack(
            self.model,
            u,
            decoder=self.decoder,
            above=1,
            adjust=self.adjust,
            gumbel=noise.draws(u.shape[1]) if self.draws else None,
            progress=progress,
        )
        return states[-1], work

    def _account_for_draw(self, rows: Tensor, at: int) -> None:
        """Add log rho(h'_unused | h'_used) - log p_{>1}(h') for draws that were used up to `at`."""
        if self.single:
            return
        prior = self.model.prior
        patch = self.model.config.patch
        h = self.draw[rows]
        token = torch.arange(h.shape[1], device=h.device)
        is_served = (token >= self.since[rows, None]) & (token < at * patch)
        used = (is_served & ~self.is_known[rows]).view(len(rows), -1, patch)
        whole = prior.block(1).log_prob(prior.patch(h)) * ~used.any(-1)
        is_left = used.any(-1, keepdim=True) & ~used
        normal = log_standard_normal(h).sum(-1) * is_left.flatten(1)
        self.correction[rows] += whole.sum(-1) + normal.sum(-1) - self.log_p[rows]

    def redraw(self, samples: list[int], own: Tensor, parents: Tensor, at: int) -> Tensor:
        """Fresh draws h' [rows, N, C] for the rows `own`, which are all particles of the `samples`.

        They go on from the position `at` of their `parents`, whose factors they get.
        """
        self._account_for_draw(own, at)
        self.correction[own] = self.correction[parents]
        generators = [self.noise.generators[b] for b in samples]
        fresh, _ = self._draw(replace(self.noise, generators=generators), SILENT)
        self.draw[own] = fresh
        self.log_p[own] = self.model.prior.log_prob(fresh, above=1)
        self.since[own] = at * self.model.config.patch
        return self.model.prior.patch(fresh)

    def log_factor(self, h: Tensor) -> Tensor:
        """The log of the factor, [num R], in nats, given the final noise h* [num R, T, d]."""
        if self.single:
            return torch.zeros_like(self.log_p)
        self._account_for_draw(torch.arange(len(h)), h.shape[1])
        known = (log_standard_normal(h).sum(-1) * self.is_known).sum(-1)
        return self.model.prior.log_prob(h, above=1) - known + self.correction


def completing(
    model: TarFlowLM,
    noise: Tensor,
    given: Tensor,
    eps: Tensor,
    adjust: Adjustment | None,
    gumbel: Gumbel | None,
) -> Inversion:
    """Block 1 from `noise` [B, T, d], in which given tokens keep the latents that `eps` gives them.

    Tokens `given` [B, T], on the CPU, are BLANK elsewhere; `gumbel` as in `Inversion`.
    """
    block, patch = model.prior.block(0), model.prior.patch
    reorders = block.order.reverse or block.order.mixes
    assert not reorders, "given latents need the order of the tokens"
    known = model.codebook.encode(given.clamp_min(0).to(eps.device), eps)
    is_known = (given != BLANK).unflatten(1, (-1, model.config.patch))
    rows = Inversion(
        block, patch(noise).clone(), adjust, gumbel, known=patch(known), is_known=is_known
    )
    mask = is_known.to(noise.device)
    rows.log_normaliser = model.codebook.log_normaliser(known).view(mask.shape) * mask
    return rows


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
