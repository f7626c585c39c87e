"""One passage through a sequence, position by position with the KV cache, some of its tokens given.

Rows are samples or particles. Every step returns the log-probability it found for the given tokens, which is what
`particles` weighs rows by; `select` and `renew` let it copy rows and refresh the noise ahead of them.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

from tarflowlm.baseline import TokenLM
from tarflowlm.flow.couplings import AdjustWeights
from tarflowlm.flow.numerics import standard_normal_log_prob
from tarflowlm.flow.stack import FlowBlock
from tarflowlm.flow.transformer import KVCache
from tarflowlm.model import TarFlowLM

Tick = Callable[[], None]


class Passage(ABC):
    """Positions before `at` are done."""

    at: int
    num_positions: int
    cache: KVCache

    @abstractmethod
    def step(self) -> Tensor:
        """Go one position on: log-probability [B], nats, of the tokens given there, given all before them."""

    @abstractmethod
    def select(self, rows: Tensor) -> None:
        """Continue with the pasts of these rows [B]; what lies ahead stays as it is."""

    @abstractmethod
    def renew(self, rows: Tensor, noise: Tensor) -> None:
        """Noise [n, T, ...] for what lies ahead of these rows [n]."""


class LatentPassage(Passage):
    """Block 1 of a flow: noise to latents where nothing is given, latents to noise where a token is.

    A given token x has the latents z ~ q(z|x) in `known`. Its log-probability is log p(z | past) + log p(x|z)
    - log q(z|x) = log p(z | past) - log sum_j N_j(z), whose exponential is unbiased for p(x | past).
    """

    def __init__(
        self, model: TarFlowLM, noise: Tensor, known: Tensor, is_known: Tensor, adjust: AdjustWeights | None
    ) -> None:
        """`noise`, `known` [B, T, d]; `is_known` [B, T] on the CPU."""
        block = model.prior.blocks[0]
        assert isinstance(block, FlowBlock)
        assert block.keeps_order, "given latents need a block in the order of the tokens"
        self.model, self.block, self.adjust = model, block, adjust
        self.noise, self.known = model.prior.patch(noise)[0].clone(), model.prior.patch(known)[0]
        self.is_known = is_known.view(len(noise), -1, model.config.patch)
        mask = self.is_known.to(noise.device)
        self.log_normaliser = model.codebook.log_normaliser(known).view(mask.shape) * mask
        self.num_positions, self.at = self.noise.shape[1], 0
        self.z = torch.zeros_like(self.noise)
        self.cache = block.transformer.allocate_cache(len(noise), self.num_positions, block.start.to(noise.dtype))

    def prefill(self) -> Tensor:
        """The leading positions that are given in all rows, in one parallel pass; as `step`."""
        num = int(self.is_known.all(2).all(0).long().cumprod(0).sum())
        if num == 0:
            return self.noise.new_zeros(len(self.noise))
        features = self.settle(self.known, num)
        u, log_det = self.block.coupling(self.known[:, :num], features)
        self.noise[:, :num] = u
        return log_det + standard_normal_log_prob(u) - self.log_normaliser[:, :num].sum((1, 2))

    def settle(self, z: Tensor, num: int) -> Tensor:
        """Take the first `num` positions from z [B, N, C], in one parallel pass; returns their features."""
        self.z[:, :num], self.at = z[:, :num], num
        if num == 0:
            return self.z.new_zeros(len(z), 0, 0)
        return self.block.features_of(self.cache, z[:, : num - 1], first=True)

    def step(self) -> Tensor:
        n = self.at
        features = self.block.features_at(self.cache, self.z[:, n - 1] if n else None, len(self.z))
        z, u, log_p = self.block.coupling.complete(
            self.noise[:, n], features, self.known[:, n], self.is_known[:, n], self.adjust
        )
        self.z[:, n], self.noise[:, n], self.at = z, u, n + 1
        return (log_p - self.log_normaliser[:, n]).sum(-1)

    def select(self, rows: Tensor) -> None:
        self.z[:, : self.at] = self.z[rows, : self.at]
        self.noise[:, : self.at] = self.noise[rows, : self.at]
        self.cache.select(rows)

    def renew(self, rows: Tensor, noise: Tensor) -> None:
        self.noise[rows, self.at :] = self.model.prior.patch(noise)[0][:, self.at :]


class TokenPassage(Passage):
    """The discrete baseline: token t of row b is the inverse of its cumulative distribution at `uniform` [B, T]."""

    def __init__(
        self, model: TokenLM, uniform: Tensor, given: Tensor, is_known: Tensor, adjust: AdjustWeights | None
    ) -> None:
        """`given` tokens [B, T], read where `is_known` [B, T], on the CPU."""
        self.model, self.adjust = model, adjust
        device = model.start.device
        # some devices have no float64
        self.wide = torch.float32 if device.type == "mps" else torch.float64
        self.uniform, self.is_known = uniform.to(device, self.wide), is_known
        self.tokens = (given * is_known).to(device)
        self.num_positions, self.at = uniform.shape[1] // model.config.patch, 0
        self.cache = model.transformer.allocate_cache(len(uniform), self.num_positions, model.start)

    def step(self) -> Tensor:
        P, start = self.model.config.patch, self.at * self.model.config.patch
        previous = self.tokens[:, start - P : start] if start else None
        features = self.model.features_at(self.cache, previous, len(self.tokens))[:, None]
        # a view: the in-patch weights of token j see tokens < j, those after it have no effect
        patch = self.tokens[:, start : start + P]
        log_p = self.uniform.new_zeros(len(patch))
        for j in range(P):
            known = self.is_known[:, start + j]
            logits = self.model.patch_logits(features, patch)[:, 0, j]
            if known.any():
                here = logits.to(self.wide).log_softmax(-1).gather(-1, patch[:, j, None])[:, 0]
                log_p += here * known.to(here.device)
            if not known.all():
                changed = logits if self.adjust is None else self.adjust(logits)
                cumulative = changed.to(self.wide).softmax(-1).cumsum(-1)
                drawn = (cumulative < self.uniform[:, start + j, None] * cumulative[:, -1:]).sum(-1)
                patch[:, j] = torch.where(known.to(drawn.device), patch[:, j], drawn)
        self.at += 1
        return log_p

    def select(self, rows: Tensor) -> None:
        done = self.at * self.model.config.patch
        self.tokens[:, :done] = self.tokens[rows, :done]
        self.cache.select(rows)

    def renew(self, rows: Tensor, uniform: Tensor) -> None:
        done = self.at * self.model.config.patch
        self.uniform[rows, done:] = uniform[:, done:].to(self.uniform)
