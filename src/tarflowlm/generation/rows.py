"""Rows of text that grow through block 1, by drawn tokens or by whole given pieces.

They need a block 1 with weights of tokens, and one token per position. Shape legend: B rows, T
tokens, S tokens of a piece, V symbols, d channels per token (0 for the baseline).
"""

from abc import ABC, abstractmethod
from typing import cast

import torch
from torch import Tensor

from tarflowlm.baseline import TokenLM
from tarflowlm.flow import widen
from tarflowlm.flow.couplings import AdjustWeights, inverse_cdf
from tarflowlm.flow.mixd import MixDCoupling
from tarflowlm.model import LanguageModel, as_flow


class Rows(ABC):
    """The first `at` of `tokens` [B, T] are written; `values` [B, T, ...] are what block 1 reads.

    The values are latents z, or for the baseline the tokens.
    """

    def __init__(
        self,
        model: LanguageModel,
        tokens: Tensor,
        values: Tensor,
        at: int,
        adjust: AdjustWeights | None,
    ) -> None:
        self.model = model
        self.tokens = tokens
        self.values = values
        self.adjust = adjust
        self.cache = model.conditioner.allocate_cache(*tokens.shape)
        self.at = at
        if at:
            self._features(0, at)

    def _features(self, start: int, end: int) -> Tensor:
        """Features [B, n, D] of the positions from `start` up to `end`, where the cache ends."""
        self.cache.rewind(start)
        past = self.values[:, max(start - 1, 0) : end - 1]
        return self.model.conditioner.features_of(self.cache, past, first=start == 0)

    def add(self, tokens: Tensor, values: Tensor) -> Tensor:
        """Write a piece, tokens [S] with values [B, S, ...]: its log-probability [B], in nats."""
        start = self.at
        self.at += len(tokens)
        if start == self.at:
            return torch.zeros(len(values))
        self.tokens[:, start : self.at] = tokens
        self.values[:, start : self.at] = values
        return self.weigh(tokens, values, self._features(start, self.at))

    def draw(self, uniform: Tensor, noise: Tensor, mask: Tensor | None) -> Tensor:
        """Write one token by random numbers [B] and [B, d], among those in `mask` [V] or [B, V].

        Returns the log-weight [B] of the draw, in nats: the log-probability of the mask.
        """
        features = self._features(self.at, self.at + 1)
        log_w = self.log_weights(features)[:, 0]
        log_w = (log_w if self.adjust is None else self.adjust(log_w)).log_softmax(-1)
        # dropped by top-k or top-p
        log_w = log_w.masked_fill(log_w < torch.finfo(log_w.dtype).min / 2, -torch.inf)
        allowed = log_w if mask is None else log_w.masked_fill(~mask, -torch.inf)
        drawn = inverse_cdf(allowed, uniform.to(log_w.device))
        token, value, gain = self.emit(drawn, noise, log_w, allowed)
        self.tokens[:, self.at] = token
        self.values[:, self.at] = value
        self.at += 1
        return allowed.logsumexp(-1) + gain

    def holds_twice(self, piece: Tensor) -> Tensor:
        """Whether each row [B], which ends in this piece [S], holds it before."""
        places = self.tokens[:, : self.at].unfold(1, len(piece), 1)
        return (places == piece.to(places)).all(-1)[:, :-1].any(1).cpu()

    def select(self, order: Tensor) -> None:
        """Replace every row b by row order[b]."""
        self.tokens = self.tokens[order]
        self.values = self.values[order]
        self.cache.take(self.cache, order)

    @abstractmethod
    def log_weights(self, features: Tensor) -> Tensor:
        """Log-weights of the tokens [B, n, V], from features [B, n, D]."""

    @abstractmethod
    def weigh(self, tokens: Tensor, values: Tensor, features: Tensor) -> Tensor:
        """The log-probability [B] of a piece, in nats."""

    @abstractmethod
    def emit(
        self, drawn: Tensor, noise: Tensor, log_w: Tensor, allowed: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | float]:
        """Token, value and additional log-weight [B] of components `drawn` [B] by `allowed`."""


class TokenRows(Rows):
    """Rows of the baseline."""

    def log_weights(self, features: Tensor) -> Tensor:
        head = cast(TokenLM, self.model).head
        return widen(head(features))

    def weigh(self, tokens: Tensor, values: Tensor, features: Tensor) -> Tensor:
        log_p = self.log_weights(features).log_softmax(-1)
        return log_p[:, range(len(tokens)), tokens].sum(-1)

    def emit(
        self, drawn: Tensor, noise: Tensor, log_w: Tensor, allowed: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | float]:
        return drawn, drawn, 0.0


class LatentRows(Rows):
    """Rows of a flow whose block 1 is a mixture of the codebook's components."""

    @property
    def coupling(self) -> MixDCoupling:
        return cast(MixDCoupling, as_flow(self.model).prior.block(0).coupling)

    def log_weights(self, features: Tensor) -> Tensor:
        return widen(self.coupling.weight_head(features))

    def weigh(self, tokens: Tensor, values: Tensor, features: Tensor) -> Tensor:
        """log p(z_t | z_<t) - log sum_j N_j(z_t), summed: the factors of (21)."""
        return self.coupling.log_prob(values, features, relative=True).sum(-1)

    def emit(
        self, drawn: Tensor, noise: Tensor, log_w: Tensor, allowed: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | float]:
        """z ~ g = sum_A w_k N_k / w(A); the weight of (23) over w(A) is p(z) p(A|z) w(A)/g(z)."""
        codebook = as_flow(self.model).codebook
        z = codebook.encode(drawn, noise)
        if allowed is log_w:
            return codebook.decode(z), z, 0.0
        log_p = codebook.log_posterior(z)
        inside = log_p.masked_fill(allowed == -torch.inf, -torch.inf)
        mixed = (log_w + log_p).logsumexp(-1) - (allowed + log_p).logsumexp(-1)
        return inside.argmax(-1), z, mixed + inside.logsumexp(-1)
