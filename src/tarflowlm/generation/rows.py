"""Rows of text that grow through block 1 with its KV cache, for both particle filters.

`Positions` complete one position after the other, with some tokens given, in any model of any
patch. `Pieces` grow by a drawn token or by a whole given piece; they need a block 1 with weights of
tokens, and one token per position. Both draw a token from its weights by `inverse_cdf`.

Shape legend: B rows (samples or particles), T tokens, P patch, N = T / P positions, d channels per
token (0 for the baseline), C = P d, D width, S tokens of a piece, V symbols.
"""

from abc import ABC, abstractmethod
from typing import cast

import torch
from torch import Tensor

from tarflowlm.baseline import TokenLM
from tarflowlm.flow import wide_dtype, widen
from tarflowlm.flow.couplings import AdjustWeights, inverse_cdf
from tarflowlm.flow.fills import complete
from tarflowlm.flow.mixd import MixDCoupling
from tarflowlm.flow.numerics import standard_normal_log_prob
from tarflowlm.generation.sampling import drop_finished, num_leading
from tarflowlm.model import LanguageModel, TarFlowLM, as_flow


class Rows:
    """Rows whose first `at` positions are final.

    Block 1 reads `values` [B, N, ...]: latents of a flow, tokens of the baseline.
    """

    def __init__(self, model: LanguageModel, values: Tensor, adjust: AdjustWeights | None) -> None:
        self.model = model
        self.values = values
        self.adjust = adjust
        self.num_positions = values.shape[1]
        self.at = 0
        self.cache = model.conditioner.allocate_cache(len(values), self.num_positions)

    def select(self, order: Tensor) -> None:
        """Replace every row b by row order[b]."""
        self.values = self.values[order]
        self.cache.take(self.cache, order)


class Positions(Rows, ABC):
    """A pass over N positions that turns `noise` [B, N, ...] into `values`.

    Tokens are given where `is_known` [B, N, P], on the CPU, is True; their noise follows from them.
    """

    def __init__(
        self,
        model: LanguageModel,
        noise: Tensor,
        values: Tensor,
        is_known: Tensor,
        adjust: AdjustWeights | None,
    ) -> None:
        super().__init__(model, values, adjust)
        self.noise = noise
        self.is_known = is_known.view(len(noise), -1, model.config.patch)
        # read on the host once, so that a position without given tokens costs nothing for them
        self.some_known = self.is_known.any(0).tolist()
        self.ended: Tensor | None = None
        """Which rows need no more positions, [B]."""
        self.rows: Tensor | slice = slice(None)
        """The rows whose next position is completed."""

    def prefill(self) -> Tensor | None:
        """Complete the leading positions that are given in all rows at once; returns as `step`."""
        return None

    def step(self) -> Tensor | None:
        """Complete the next position: log p [B] of its given tokens, in nats; None without any."""
        if self.ended is not None:
            self.rows = drop_finished(self.rows, self.ended, self.cache)
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

    @abstractmethod
    def positions(self, x: Tensor) -> Tensor:
        """Values of tokens [B, T, ...] as values of positions [B, N, ...]."""

    def resample(self, order: Tensor, renewed: Tensor, noise: Tensor) -> None:
        """Replace every row b by row order[b]; `renewed` rows get fresh `noise` [rows, T, ...]."""
        self.select(order)
        self.noise = self.noise[order]
        self.noise[renewed, self.at :] = self.positions(noise)[:, self.at :].to(self.noise)


class LatentPositions(Positions):
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

        With `uniform` [B, N, G] the other tokens are drawn, and `noise` is not their noise.
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
        z = self.known[:, :num]
        self.values[:, :num] = z
        self.at = num
        features = self.block.features_of(self.cache, z[:, : num - 1], first=True)
        u, log_det = self.block.coupling(z, features)
        self.noise[:, :num] = u
        log_p = log_det.sum(-1) + standard_normal_log_prob(u)
        return log_p - self.log_normaliser[:, :num].sum((1, 2))

    def complete(self, n: int, features: Tensor) -> Tensor | None:
        here = self.rows, n
        noise = self.noise[here]
        uniform = None if self.uniform is None else self.uniform[here]
        if not any(self.some_known[n]):
            self.values[here] = self.invert(noise, features, self.adjust, uniform)
            return None
        self.values[here], self.noise[here], log_p = complete(
            self.block.coupling,
            noise,
            features,
            self.known[here],
            self.is_known[here],
            self.adjust,
            uniform,
        )
        return (log_p - self.log_normaliser[here]).sum(-1)


class TokenPositions(Positions):
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


class Pieces(Rows):
    """Rows with `tokens` [B, T] that grow by single tokens and by pieces.

    The values of the baseline are the tokens. Those of a flow, whose block 1 is a mixture of the
    codebook's components, are latents.
    """

    def __init__(
        self,
        model: LanguageModel,
        tokens: Tensor,
        values: Tensor,
        at: int,
        adjust: AdjustWeights | None,
    ) -> None:
        """The first `at` of `tokens` and of their `values` [B, T, ...] are written."""
        super().__init__(model, values, adjust)
        self.tokens = tokens
        self.at = at
        self.coupling: MixDCoupling | None = None
        if isinstance(model, TarFlowLM):
            self.coupling = cast(MixDCoupling, model.prior.block(0).coupling)
        if at:
            self._features(0, at)

    def _features(self, start: int, end: int) -> Tensor:
        """Features [B, n, D] of the positions from `start` up to `end`, where the cache ends."""
        self.cache.rewind(start)
        past = self.values[:, max(start - 1, 0) : end - 1]
        return self.model.conditioner.features_of(self.cache, past, first=start == 0)

    def _log_weights(self, features: Tensor) -> Tensor:
        """Log-weights of the tokens [B, n, V], from features [B, n, D]."""
        if self.coupling is None:
            return widen(cast(TokenLM, self.model).head(features))
        return widen(self.coupling.weight_head(features))

    def add(self, tokens: Tensor, values: Tensor) -> Tensor:
        """Write a piece, tokens [S] with values [B, S, ...]: its log-probability [B], in nats.

        For a flow it is log p(z_t | z_<t) - log sum_j N_j(z_t), summed: the factors of (21).
        """
        start = self.at
        self.at += len(tokens)
        if start == self.at:
            return torch.zeros(len(values))
        self.tokens[:, start : self.at] = tokens
        self.values[:, start : self.at] = values
        features = self._features(start, self.at)
        if self.coupling is not None:
            return self.coupling.log_prob(values, features, relative=True).sum(-1)
        log_p = self._log_weights(features).log_softmax(-1)
        return log_p[:, range(len(tokens)), tokens].sum(-1)

    def draw(self, uniform: Tensor, noise: Tensor, mask: Tensor | None) -> Tensor:
        """Write one token by random numbers [B] and [B, d], among those in `mask` [V] or [B, V].

        Returns the log-weight [B] of the draw, in nats: the log-probability of the mask.
        """
        features = self._features(self.at, self.at + 1)
        log_w = self._log_weights(features)[:, 0]
        log_w = (log_w if self.adjust is None else self.adjust(log_w)).log_softmax(-1)
        # tokens that the adjustment dropped
        log_w = log_w.masked_fill(log_w < torch.finfo(log_w.dtype).min / 2, -torch.inf)
        allowed = log_w if mask is None else log_w.masked_fill(~mask, -torch.inf)
        token = inverse_cdf(allowed, uniform.to(log_w.device))
        value = token
        gain: Tensor | float = 0.0
        if self.coupling is not None:
            token, value, gain = self._emit(token, noise, log_w, allowed)
        self.tokens[:, self.at] = token
        self.values[:, self.at] = value
        self.at += 1
        return allowed.logsumexp(-1) + gain

    def _emit(
        self, drawn: Tensor, noise: Tensor, log_w: Tensor, allowed: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | float]:
        """The token, latents and additional log-weight [B] of the components `drawn` [B].

        z ~ g = sum_A w_k N_k / w(A); the weight of (23) over w(A) is p(z) p(A|z) w(A) / g(z).
        """
        codebook = as_flow(self.model).codebook
        z = codebook.encode(drawn, noise)
        if allowed is log_w:
            return codebook.decode(z), z, 0.0
        log_p = codebook.log_posterior(z)
        inside = log_p.masked_fill(allowed == -torch.inf, -torch.inf)
        mixed = (log_w + log_p).logsumexp(-1) - (allowed + log_p).logsumexp(-1)
        return inside.argmax(-1), z, mixed + inside.logsumexp(-1)

    def holds_twice(self, piece: Tensor) -> Tensor:
        """Whether each row [B], which ends in this piece [S], holds it before."""
        places = self.tokens[:, : self.at].unfold(1, len(piece), 1)
        return (places == piece.to(places)).all(-1)[:, :-1].any(1).cpu()

    def select(self, order: Tensor) -> None:
        super().select(order)
        self.tokens = self.tokens[order]
