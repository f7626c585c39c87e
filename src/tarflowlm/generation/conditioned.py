"""A pass over a sequence with some given tokens, position by position with the KV cache.

Rows are samples or particles, which `particles` weights by the given tokens and resamples.

Shape legend: B rows, T tokens, P patch, N = T / P positions, d channels per token, C = P d, D
width.
"""

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from tarflowlm.baseline import TokenLM
from tarflowlm.flow import wide_dtype
from tarflowlm.flow.couplings import AdjustWeights, inverse_cdf
from tarflowlm.flow.numerics import standard_normal_log_prob
from tarflowlm.generation.sampling import num_leading, without_ended
from tarflowlm.model import LanguageModel, TarFlowLM


class Conditioned(ABC):
    """A pass over N positions, of which the first `at` are done.

    It turns `noise` [B, N, ...] into `values` [B, N, ...]: latents for a flow, tokens for the
    baseline. Tokens are given where `is_known` [B, N, P], on the CPU, is True; their noise is the
    one that belongs to them.
    """

    def __init__(
        self,
        model: LanguageModel,
        noise: Tensor,
        values: Tensor,
        is_known: Tensor,
        adjust: AdjustWeights | None,
    ) -> None:
        self.model = model
        self.noise = noise
        self.values = values
        self.adjust = adjust
        self.is_known = is_known.view(len(noise), -1, model.config.patch)
        # read on the host once, so that a position without given tokens costs nothing for them
        self.some_known = self.is_known.any(0).tolist()
        self.num_positions = noise.shape[1]
        self.at = 0
        self.cache = model.conditioner.allocate_cache(len(noise), self.num_positions)
        self.ended: Tensor | None = None
        """The rows [B] that need no more positions."""
        self.rows: Tensor | slice = slice(None)
        """The rows whose next position is completed."""

    def prefill(self) -> Tensor | None:
        """Complete the leading positions that are given in all rows at once; returns as `step`."""
        return None

    def step(self) -> Tensor | None:
        """Complete the next position: log p [B] of its given tokens, in nats; None without any."""
        if self.ended is not None:
            self.rows = without_ended(self.rows, self.ended, self.cache)
        previous = self.values[self.rows, self.at - 1] if self.at else None
        num_rows = len(self.is_known[self.rows])
        features = self.model.conditioner.features_at(self.cache, previous, num_rows)
        found = self.complete(self.at, features)
        self.at += 1
        if found is None:
            return None
        log_p = found.new_zeros(len(self.values))
        log_p[self.rows] = found
        return log_p

    @abstractmethod
    def complete(self, n: int, features: Tensor) -> Tensor | None:
        """Complete position n of `rows` from its features c_n [b, D]; returns as `step`, [b]."""

    def select(self, rows: Tensor, renewed: Tensor, noise: Tensor) -> None:
        """Copy the completed positions of row rows[b] to every row b.

        The rows `renewed` get the noise ahead from `noise` [rows, T, ...].
        """
        self.values[:, : self.at] = self.values[rows, : self.at]
        self.noise[:, : self.at] = self.noise[rows, : self.at]
        self.noise[renewed, self.at :] = self.positions(noise)[:, self.at :].to(self.noise)
        self.cache.take(self.cache, rows)

    @abstractmethod
    def positions(self, x: Tensor) -> Tensor:
        """Values of tokens [B, T, ...] as values of positions [B, N, ...]."""


class ConditionedLatents(Conditioned):
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
        adjust: AdjustWeights | None,
        uniform: Tensor | None = None,
    ) -> None:
        """`noise`, `known` [B, T, d]; `is_known` [B, T] on the CPU.

        With `uniform` [B, N, G] the other tokens are drawn; then `noise` is not theirs.
        """
        self.uniform = uniform
        self.block = model.prior.block(0)
        self.patch = model.prior.patch
        reorders = self.block.order.reverse or self.block.order.mixes
        assert not reorders, "given latents need the order of the tokens"
        noise = self.patch(noise).clone()
        self.known = self.patch(known)
        super().__init__(model, noise, torch.zeros_like(noise), is_known, adjust)
        mask = self.is_known.to(noise.device)
        self.invert = self.block.coupling.inverter()
        self.log_normaliser = model.codebook.log_normaliser(known).view(mask.shape) * mask

    def positions(self, x: Tensor) -> Tensor:
        return self.patch(x)

    def prefill(self) -> Tensor | None:
        num = num_leading(self.is_known.all(2).all(0))
        if num == 0:
            return None
        u, log_det = self.block.coupling(self.known[:, :num], self.settle(self.known, num))
        self.noise[:, :num] = u
        log_p = log_det.sum(-1) + standard_normal_log_prob(u)
        return log_p - self.log_normaliser[:, :num].sum((1, 2))

    def settle(self, z: Tensor, num: int) -> Tensor:
        """Copy the first `num` > 0 positions from z [B, N, C]; returns their features."""
        self.values[:, :num] = z[:, :num]
        self.at = num
        return self.block.features_of(self.cache, z[:, : num - 1], first=True)

    def complete(self, n: int, features: Tensor) -> Tensor | None:
        here = self.rows, n
        noise = self.noise[here]
        uniform = None if self.uniform is None else self.uniform[here]
        if not any(self.some_known[n]):
            self.values[here] = self.invert(noise, features, self.adjust, uniform)
            return None
        self.values[here], self.noise[here], log_p = self.block.coupling.complete(
            noise, features, self.known[here], self.is_known[here], self.adjust, uniform
        )
        return (log_p - self.log_normaliser[here]).sum(-1)


class ConditionedTokens(Conditioned):
    """The pass of the baseline: a token is the inverse of its CDF at a uniform random number."""

    def __init__(
        self,
        model: TokenLM,
        uniform: Tensor,
        given: Tensor,
        is_known: Tensor,
        adjust: AdjustWeights | None,
    ) -> None:
        """`uniform` [B, T] in [0, 1); tokens `given` [B, T] where `is_known`; all on the CPU."""
        self.baseline = model
        noise = self.positions(uniform.to(model.device, wide_dtype(model.start)))
        values = self.positions((given * is_known).to(model.device))
        super().__init__(model, noise, values, is_known, adjust)

    def positions(self, x: Tensor) -> Tensor:
        return x.view(len(x), -1, self.baseline.config.patch)  # [B, N, P]

    def complete(self, n: int, features: Tensor) -> Tensor | None:
        # the logits at place a depend on the tokens before a only
        patch = self.values[self.rows, n]
        log_p = None
        for a, some in enumerate(self.some_known[n]):
            logits = self.baseline.place_logits(features, patch, a)
            uniform = self.noise[self.rows, n, a]
            drawn = inverse_cdf(logits if self.adjust is None else self.adjust(logits), uniform)
            if not some:
                patch[:, a] = drawn
                continue
            known = self.is_known[self.rows, n, a].to(drawn.device)
            log_probs = logits.to(uniform.dtype).log_softmax(-1)
            here = log_probs.gather(-1, patch[:, a, None])[:, 0] * known
            log_p = here if log_p is None else log_p + here
            patch[:, a] = torch.where(known, patch[:, a], drawn)
        self.values[self.rows, n] = patch
        return log_p
