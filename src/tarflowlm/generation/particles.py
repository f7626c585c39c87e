"""Sampling with given tokens: sequential Monte Carlo over positions (docs/math.md, section 9).

Each sample has R particles that agree on the given tokens, weighted by the probabilities that they
assigned to these. Particles of uneven weights are resampled, and at the end one is drawn by weight:
exact in the limit of many. With R = 1 the other tokens are drawn from left to right.
"""

import math
from collections.abc import Generator
from dataclasses import replace

import torch
from torch import Tensor

from tarflowlm.config import Decoder
from tarflowlm.errors import SILENT, Progress
from tarflowlm.flow.fills import complete
from tarflowlm.flow.numerics import log_standard_normal, standard_normal_log_prob
from tarflowlm.generation.inversion import Inverted, finish, stack_inversion
from tarflowlm.generation.rows import Drawn
from tarflowlm.generation.sampling import Evidence, Gumbel, Noise, Work
from tarflowlm.model import TarFlowLM, as_flow
from tarflowlm.requests import Adjustment

RESAMPLE_BELOW = 0.5
"""Particles are resampled when their effective sample size falls below this times R."""
FEWEST = 25
"""Weights below which a tail is too short to fit."""
UNRELIABLE = 0.7
"""Tail index above which the mean of weights is unreliable."""


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
        )

    def pick(self) -> Tensor:
        """One particle of each sample by weight: rows [num]."""
        picked = [resample(w, 1, g) for w, g in zip(self.log_w, self.generators, strict=True)]
        return torch.cat(picked) + torch.arange(len(picked)) * self.log_w.shape[1]


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


class Completed(Inverted):
    """The pass of a flow through block 1: noise to latents, and back for given tokens (eq. 21).

    A given token x_t has the latents z_t ~ q(z_t | x_t) in `known`, and the log-probability
    log p(z_t | z_<t) - log sum_j N_j(z_t).
    """

    def __init__(
        self,
        model: TarFlowLM,
        noise: Tensor,
        known: Tensor,
        is_known: Tensor,
        adjust: Adjustment | None,
        gumbel: Gumbel | None = None,
    ) -> None:
        """`noise`, `known` [B, T, d]; `is_known` [B, T] on the CPU; `gumbel` as in `Inverted`."""
        self.patch = model.prior.patch
        block = model.prior.block(0)
        reorders = block.order.reverse or block.order.mixes
        assert not reorders, "given latents need the order of the tokens"
        super().__init__(block, self.patch(noise).clone(), adjust, gumbel)
        self.known = self.patch(known)
        self.is_known = is_known.unflatten(1, (-1, model.config.patch))
        # read on the host once, so that a position without given tokens costs nothing for them
        self.some_known = self.is_known.any(2).any(0).tolist()
        mask = self.is_known.to(noise.device)
        self.log_normaliser = model.codebook.log_normaliser(known).view(mask.shape) * mask

    def prefill(self, first: Tensor) -> Tensor | None:
        """As `Drawn.prefill`."""
        num = int(first.min())
        if num == 0:
            return None
        z = self.known[:, :num]
        u, log_det = self.source.coupling(z, self.settle(z))
        self.noise[:, :num] = u
        log_p = log_det.sum(-1) + standard_normal_log_prob(u)
        return log_p - self.log_normaliser[:, :num].sum((1, 2))

    def step(self) -> Tensor | None:
        """As `Drawn.step`, always one position."""
        n = self.at
        if not self.some_known[n]:
            return super().step()
        here, features, gumbel = self.next_position()
        known, is_known = self.known[here], self.is_known[self.rows, n]
        self.values[here], self.noise[here], log_p = complete(
            self.source.coupling, self.noise[here], features, known, is_known, self.adjust, gumbel
        )
        every = log_p.new_zeros(len(self.values))
        every[self.there] = (log_p - self.log_normaliser[here]).sum(-1)
        return every

    def resample(self, order: Tensor, renewed: Tensor, noise: Tensor | None) -> None:
        """As `Drawn.resample`; `renewed` rows get fresh `noise` [rows, T, ...]."""
        self.select(order)
        self.noise = self.noise[order]
        if noise is not None:
            self.noise[renewed, self.at :] = self.patch(noise)[:, self.at :].to(self.noise)


def particle_filter(
    rows: Drawn | Completed, noise: Noise, progress: Progress, source: "UpperBlocks | None" = None
) -> Generator[Tensor, None, Weights]:
    """Run `rows` to their end, and return their weights.

    Rows that are resampled get fresh noise from the `source`. A single particle is final after
    every position, so the generator yields its values so far. `progress` advances once per
    position.
    """
    weights = Weights(noise)
    num, particles = weights.log_w.shape
    # a sample alone is resampled after its prompt
    first = rows.is_known.all(2).long().cumprod(1).sum(1)
    prompts = first.view(num, particles)[:, 0]
    weights.add(rows.prefill(first))
    progress.advance(rows.at)
    while rows.at < rows.num_positions:
        before = rows.at
        weights.add(rows.step())
        progress.advance(rows.at - before)
        if particles == 1:
            yield rows.values[:, : rows.at]
            continue
        if rows.at == rows.num_positions:
            break
        is_due = is_uneven(weights.log_w) & (prompts < rows.at)
        uneven: list[int] = is_due.nonzero().flatten().tolist()
        if not uneven:
            continue
        order = torch.arange(num * particles).view(num, particles)
        own = order[uneven].flatten()
        for b in uneven:
            chosen, weights.log_w[b] = weights.chosen(b, weights.log_w[b], particles)
            order[b] = order[b, chosen]
        device = rows.values.device
        own, order = own.to(device), order.flatten().to(device)
        fresh = None if source is None else source.redraw(uneven, own, order[own], rows.at)
        rows.resample(order, own, fresh)
    return weights


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
        decoder: Decoder,
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
        steps = stack_inversion(
            self.model,
            u,
            decoder=self.decoder,
            above=1,
            adjust=self.adjust,
            gumbel=noise.draws(u.shape[1]) if self.draws else None,
            progress=progress,
        )
        states, work = finish(steps)
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
        """Fresh draws h' [rows, T, d] for the rows `own`, which are all particles of the `samples`.

        They go on from the position `at` of their `parents`, whose factors they get.
        """
        self._account_for_draw(own, at)
        self.correction[own] = self.correction[parents]
        generators = [self.noise.generators[b] for b in samples]
        fresh, _ = self._draw(replace(self.noise, generators=generators), SILENT)
        self.draw[own] = fresh
        self.log_p[own] = self.model.prior.log_prob(fresh, above=1)
        self.since[own] = at * self.model.config.patch
        return fresh

    def log_factor(self, h: Tensor) -> Tensor:
        """The log of the factor, [num R], in nats, given the final noise h* [num R, T, d]."""
        if self.single:
            return torch.zeros_like(self.log_p)
        self._account_for_draw(torch.arange(len(h)), h.shape[1])
        known = (log_standard_normal(h).sum(-1) * self.is_known).sum(-1)
        return self.model.prior.log_prob(h, above=1) - known + self.correction


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
