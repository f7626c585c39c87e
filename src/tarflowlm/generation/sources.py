"""Where the noise of a passage comes from, and what that does to the weights of particles."""

import torch
from torch import Tensor

from tarflowlm.flow.numerics import log_standard_normal
from tarflowlm.flow.stack import FlowBlock
from tarflowlm.generation.inversion import Inverted
from tarflowlm.generation.noise import row_normal, row_uniform
from tarflowlm.generation.passage import Tick
from tarflowlm.generation.stack import Decoders, invert_stack
from tarflowlm.model import TarFlowLM


class UniformSource:
    """Uniform numbers for the baseline: nothing stands above it, so they do not touch the weights."""

    def __init__(self, generators: list[torch.Generator], particles: int, num_tokens: int) -> None:
        self.generators, self.shape = generators, (particles, num_tokens)
        self.uniform = row_uniform(generators, particles, num_tokens).flatten(0, 1)

    def close(self, own: Tensor, parents: Tensor, at: int) -> None:
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
    tokens of a patch that is used in part. After its particles were drawn anew a sample takes fresh draws, so that
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
        """`is_known` [num N, T] on the CPU."""
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

    def _spend(self, rows: Tensor, at: int) -> None:
        """The draws of these rows served up to position `at`: their factor."""
        if self.single:
            return
        prior, token = self.model.prior, torch.arange(self.shape[1], device=self.since.device)
        used = (token >= self.since[rows, None]) & (token < at * self.model.config.patch) & ~self.is_known[rows]
        h, used_NP = self.draw[rows], used.view(len(rows), -1, self.model.config.patch)
        second = prior.blocks[1]
        assert isinstance(second, FlowBlock)
        whole = second.position_log_prob(prior.patch(h)[0]) * ~used_NP.any(-1)
        partly = used_NP.any(-1, keepdim=True) & ~used_NP
        normal = log_standard_normal(h).sum(-1) * partly.flatten(1)
        self.correction[rows] += whole.sum(-1) + normal.sum(-1) - self.log_p[rows]

    def close(self, own: Tensor, parents: Tensor, at: int) -> None:
        self._spend(own, at)
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
        self._spend(torch.arange(len(h)), -(-self.shape[1] // self.model.config.patch))
        given = (log_standard_normal(h).sum(-1) * self.is_known).sum(-1)
        return self._log_p(h) - given + self.correction
