"""The random numbers of samples, and their results: tokens, latents, evidence and work.

Shape legend: B rows, T tokens, N positions, d channels per token.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal, NamedTuple

import torch
from torch import Generator, Tensor

from tarflowlm.data.prompts import BLANK as BLANK
from tarflowlm.errors import Progress
from tarflowlm.flow.packing import array
from tarflowlm.model import LanguageModel, TarFlowLM, as_flow
from tarflowlm.requests import Adjustment


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

    def normal(self, num_tokens: int) -> Tensor:
        """Standard normal noise [num R, T, d], drawn in float32, as the model computes.

        d = 0 for the baseline.
        """
        channels = self.model.config.latent_dim if isinstance(self.model, TarFlowLM) else 0
        # of a whole context, so that a longer text begins with the same numbers
        shape = self.particles, max(num_tokens, self.model.config.context), channels
        noise = torch.cat(
            [torch.randn(*shape, generator=g, dtype=torch.float32) for g in self.generators]
        )
        return noise[:, :num_tokens].to(next(self.model.parameters()))

    def draws(self, num_tokens: int, index: int = -1) -> "Gumbel":
        """Numbers by which the tokens of the baseline are drawn, or a block, L by default."""
        places = num_tokens // self.model.config.patch
        seeds = [torch.randint(2**62, (self.particles,), generator=g) for g in self.generators]
        all_seeds = torch.cat(seeds).to(self.model.device)
        if not isinstance(self.model, TarFlowLM):
            config = self.model.config
            return Gumbel(all_seeds, places, (config.patch, config.vocab_size))
        block = self.model.prior.block(index)
        groups = len(block.order.channels) // block.coupling.group
        return Gumbel(all_seeds, places, (groups, block.coupling.choices))


Index = Tensor | slice
GAMMA = -7046029254386353131
"""The odd number next to 2^64 over the golden ratio, as a signed integer."""
TABLE = 2**20
"""Most Gumbel numbers that are made at once: for more, a place's are made when it is drawn."""


class Gumbel:
    """Standard Gumbel numbers g by row, place and choice, each a function of these alone.

    k = argmax_k (log w_k + g_k) is a draw from weights w (docs/math.md, eq. 18d). The numbers are
    hashes (SplitMix64, Steele et al. 2014), so they do not depend on who asks for them, or when.
    """

    def __init__(self, seeds: Tensor, places: int, choices: tuple[int, int]) -> None:
        """`seeds` [B]; G groups with K choices each."""
        self.seeds = seeds
        self.places = places
        self.choices = choices
        self.steps = GAMMA * torch.arange(math.prod(choices), device=seeds.device)

    @cached_property
    def table(self) -> Tensor | None:
        """The numbers of all places, if they are few."""
        if len(self.seeds) * self.places * len(self.steps) > TABLE:
            return None
        return self._made(self.seeds[:, None], torch.arange(self.places, device=self.seeds.device))

    def at(self, rows: Index, place: int | Tensor) -> Tensor:
        """The numbers [b, G, K] of these rows at a place, or each at its own [b]."""
        if self.table is not None:
            return self.table[rows, place]
        return self._made(self.seeds[rows], torch.as_tensor(place, device=self.seeds.device))

    def draw(
        self,
        log_w: Tensor,
        adjust: Adjustment | None,
        rows: Index,
        place: int,
        group: int,
        *,
        is_compiled: bool = False,
    ) -> Tensor:
        """A choice [b] of each of these rows at a place, from log-weights [b, K] of its group."""
        if is_compiled and (adjust is None or adjust.own is None):
            from tarflowlm.compiled.draw import Limits, draw

            K = self.choices[1]
            limits = Limits(-1, 1.0, K, 1.0, 0.0) if adjust is None else Limits(*adjust.limits)
            own, seeds = array(log_w.clone()), self.seeds[rows].contiguous().numpy()
            return torch.from_numpy(draw(own, limits, seeds, place, group * K))
        adjusted = log_w if adjust is None else adjust(log_w)
        return (adjusted + self.at(rows, place)[:, group]).argmax(-1)

    def _made(self, seeds: Tensor, places: Tensor) -> Tensor:
        # the numbers of a place are a stream with a seed of its own
        stream = _mixed(seeds + GAMMA * (places + 1))
        bits = (_mixed(stream[..., None] + self.steps) >> 32) & (2**32 - 1)
        # u in (0, 1), with all its digits where u is small and -log E(1) is large
        u = bits.float().add_(0.5).mul_(2.0**-32).clamp_(max=1 - 2.0**-24)
        return u.neg_().log1p_().neg_().log_().neg_().unflatten(-1, self.choices)


def _mixed(z: Tensor) -> Tensor:
    """The finaliser of SplitMix64, on 64 bits as signed integers."""
    z = (z ^ ((z >> 30) & (2**34 - 1))) * -4658895280553007687
    z = (z ^ ((z >> 27) & (2**37 - 1))) * -7723592293110705685
    return z ^ ((z >> 31) & (2**33 - 1))


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
    particles: Tensor
    """R of each sample, [num]."""


Way = Literal["steps", "sweeps", "draw"]


class Work(NamedTuple):
    """How the latents of a block were computed."""

    decoder: Way
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
    def states(self, model: LanguageModel) -> tuple[Tensor, ...]:
        """h^(L) = u, ..., h^(0) = z, each [num, T, d]; empty without `latents`."""
        end = self.context + self.tokens.shape[1]
        states = self.latents
        if len(states) == 1:
            # not the noise that was drawn: given tokens have changed it, or it was never inverted
            states = tuple(reversed(as_flow(model).prior.states(states[0])[0]))
        return tuple(h[:, self.context : end] for h in states)

    def passes(self, model: LanguageModel) -> tuple[Tensor, ...]:
        """The `states` decoded, each [num, T], coarse to fine. The last is `tokens`."""
        states = self.states(model)
        return (*map(as_flow(model).codebook.decode, states[:-1]), self.tokens) if states else ()

    def with_row(self, row: int, other: "Generation") -> "Generation":
        """These samples, with the only sample of `other` in the place of one; both of one plan."""

        def put(ours: Any, theirs: Any) -> Any:
            if isinstance(ours, Tensor):
                return ours.index_copy(0, torch.tensor([row], device=ours.device), theirs)
            if isinstance(ours, tuple):
                return tuple(map(put, ours, theirs))
            if not isinstance(ours, Evidence | GapLengths | Generation):
                return ours
            pairs = {name: (one, getattr(theirs, name)) for name, one in vars(ours).items()}
            return replace(ours, **{name: put(*pair) for name, pair in pairs.items()})

        return replace(put(self, other), work=self.work)

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


def num_leading(mask: Tensor) -> int:
    """How many places at the start of `mask` [N] are True."""
    return int(mask.long().cumprod(0).sum())
