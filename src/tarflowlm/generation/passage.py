"""One pass over a sequence, position by position with the KV cache, some of its tokens given.

Rows are samples or particles. Every step returns the log-probability it found for the given tokens, by which
`particles` weights the rows; `select` and `renew` let it copy rows and refresh the noise ahead of them.
"""

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from tarflowlm.baseline import TokenLM
from tarflowlm.flow.couplings import AdjustWeights
from tarflowlm.flow.numerics import standard_normal_log_prob
from tarflowlm.language_model import LanguageModel
from tarflowlm.model import TarFlowLM


class Passage(ABC):
    """A pass over N positions; the first `at` of them are done. Both models have the same pass over other values.

    `noise` [B, N, ...] is read, and replaced where tokens are given; `values` [B, N, ...] is what it becomes.
    `is_known` [B, N, P] on the CPU says which tokens are given.
    """

    def __init__(
        self, model: LanguageModel, noise: Tensor, values: Tensor, is_known: Tensor, adjust: AdjustWeights | None
    ) -> None:
        self.noise, self.values, self.adjust = noise, values, adjust
        self.is_known = is_known.view(len(noise), -1, model.config.patch)
        self.num_positions, self.at = noise.shape[1], 0
        self.cache = model.allocate_cache(len(noise), self.num_positions)
        self._features_at = model.features_at

    def step(self) -> Tensor:
        """Do the next position: log-probability [B], nats, of the tokens given there, given all before them."""
        previous = self.values[:, self.at - 1] if self.at else None
        features = self._features_at(self.cache, previous, len(self.values))
        log_p = self.complete(self.at, features)
        self.at += 1
        return log_p

    @abstractmethod
    def complete(self, n: int, features: Tensor) -> Tensor:
        """Fill position n from the features [B, D] of its past; returns as `step`."""

    def select(self, rows: Tensor) -> None:
        """Continue with the pasts of these rows [B]; what lies ahead stays as it is."""
        self.values[:, : self.at] = self.values[rows, : self.at]
        self.noise[:, : self.at] = self.noise[rows, : self.at]
        self.cache.select(rows)

    def renew(self, rows: Tensor, noise: Tensor) -> None:
        """Noise [n, T, ...] for what lies ahead of these rows [n]."""
        self.noise[rows, self.at :] = self.positions(noise)[:, self.at :].to(self.noise)

    @abstractmethod
    def positions(self, x: Tensor) -> Tensor:
        """[B, T, ...] of tokens as [B, N, ...] of positions."""


class LatentPassage(Passage):
    """Block 1 of a flow: noise to latents where nothing is given, latents to noise where a token is.

    A given token x has the latents z ~ q(z|x) in `known`. Its log-probability is log p(z | past) + log p(x|z)
    - log q(z|x) = log p(z | past) - log sum_j N_j(z), whose exponential is unbiased for p(x | past).
    """

    def __init__(
        self, model: TarFlowLM, noise: Tensor, known: Tensor, is_known: Tensor, adjust: AdjustWeights | None
    ) -> None:
        """`noise`, `known` [B, T, d]; `is_known` [B, T] on the CPU."""
        self.block, self.patch = model.prior.block(0), model.prior.patch
        assert self.block.keeps_order, "given latents need a block in the order of the tokens"
        noise, self.known = self.positions(noise).clone(), self.positions(known)
        super().__init__(model, noise, torch.zeros_like(noise), is_known, adjust)
        mask = self.is_known.to(noise.device)
        self.log_normaliser = model.codebook.log_normaliser(known).view(mask.shape) * mask

    def positions(self, x: Tensor) -> Tensor:
        return self.patch(x)[0]

    def prefill(self) -> Tensor:
        """The leading positions that are given in all rows, in one parallel pass; returns as `step`."""
        num = int(self.is_known.all(2).all(0).long().cumprod(0).sum())
        if num == 0:
            return self.noise.new_zeros(len(self.noise))
        features = self.settle(self.known, num)
        u, log_det = self.block.coupling(self.known[:, :num], features)
        self.noise[:, :num] = u
        return log_det + standard_normal_log_prob(u) - self.log_normaliser[:, :num].sum((1, 2))

    def settle(self, z: Tensor, num: int) -> Tensor:
        """Take the first `num` positions from z [B, N, C], in one parallel pass; returns their features."""
        self.values[:, :num], self.at = z[:, :num], num
        if num == 0:
            return self.values.new_zeros(len(z), 0, 0)
        return self.block.features_of(self.cache, z[:, : num - 1], first=True)

    def complete(self, n: int, features: Tensor) -> Tensor:
        z, u, log_p = self.block.coupling.complete(
            self.noise[:, n], features, self.known[:, n], self.is_known[:, n], self.adjust
        )
        self.values[:, n], self.noise[:, n] = z, u
        return (log_p - self.log_normaliser[:, n]).sum(-1)


class TokenPassage(Passage):
    """The discrete baseline: a token is the inverse of its cumulative distribution at a uniform number."""

    def __init__(
        self, model: TokenLM, uniform: Tensor, given: Tensor, is_known: Tensor, adjust: AdjustWeights | None
    ) -> None:
        """`uniform` [B, T]; `given` tokens [B, T], read where `is_known` [B, T], on the CPU."""
        self.model, device = model, model.device
        # some devices have no float64
        wide = torch.float32 if device.type == "mps" else torch.float64
        noise, values = (self.positions(x) for x in (uniform.to(device, wide), (given * is_known).to(device)))
        super().__init__(model, noise, values, is_known, adjust)

    def positions(self, x: Tensor) -> Tensor:
        return x.view(len(x), -1, self.model.config.patch)

    def complete(self, n: int, features: Tensor) -> Tensor:
        # a view: the in-patch weights of token j see tokens < j, those after it have no effect
        patch, uniform = self.values[:, n], self.noise[:, n]
        log_p = uniform.new_zeros(len(patch))
        for j in range(patch.shape[1]):
            known = self.is_known[:, n, j]
            logits = self.model.patch_logits(features[:, None], patch)[:, 0, j]
            if known.any():
                here = logits.to(uniform.dtype).log_softmax(-1).gather(-1, patch[:, j, None])[:, 0]
                log_p += here * known.to(here.device)
            if not known.all():
                changed = logits if self.adjust is None else self.adjust(logits)
                cumulative = changed.to(uniform.dtype).softmax(-1).cumsum(-1)
                drawn = (cumulative < uniform[:, j, None] * cumulative[:, -1:]).sum(-1)
                patch[:, j] = torch.where(known.to(drawn.device), patch[:, j], drawn)
        return log_p
