"""Texts that grow by single tokens, drawn among those that may come, and by given pieces.

Shape legend: B rows, T tokens, S tokens of a piece, V symbols, C channels of a value.
"""

import torch
from torch import Tensor

from tarflowlm.generation.decoder import TokenDecoder
from tarflowlm.model import LanguageModel, TarFlowLM, as_flow
from tarflowlm.requests import Adjustment


class Pieces(TokenDecoder):
    """Texts that grow by single tokens and by pieces, one token per position."""

    def __init__(
        self,
        model: LanguageModel,
        tokens: Tensor,
        values: Tensor,
        at: int,
        adjust: Adjustment | None,
        within: Adjustment | None = None,
    ) -> None:
        """The first `at` of `tokens` [B, T, 1] and of their `values` [B, T, C] are written."""
        super().__init__(model, 0, tokens, values)
        self.adjust, self.within = adjust, within
        if at:
            self.settle(values[:, :at])

    def add(self, tokens: Tensor, values: Tensor) -> Tensor:
        """Write a piece, tokens [S] with values [B, S, C]: its log-probability [B], in nats."""
        if not len(tokens):
            return torch.zeros(len(values))
        here = slice(None), slice(self.at, self.at + len(tokens))
        self.tokens[here] = tokens[:, None].to(self.tokens)
        self.values[here] = values
        return self.read(self.at + len(tokens))

    def draw(self, gumbel: Tensor, noise: Tensor, mask: Tensor | None) -> Tensor:
        """Write one token by numbers [B, V] and noise [B, d], among those in `mask` [V] or [B, V].

        Returns the log-weight [B] of the draw, in nats: the log-probability of the mask, and for a
        flow the other factor of its draw (docs/math.md, eq. 23).
        """
        features, _ = self.next_features()
        log_w = next(self.law.log_weights(features, self.cache.linear))
        log_w = (log_w if self.adjust is None else self.adjust(log_w)).log_softmax(-1)
        # tokens that the adjustment dropped
        log_w = _without_dropped(log_w)
        allowed = log_w if mask is None else log_w.masked_fill(~mask, -torch.inf)
        if self.within is not None:
            # of the tokens that may come some are dropped, and the others get their probability
            kept = _without_dropped(self.within(allowed).log_softmax(-1))
            kept = kept + allowed.logsumexp(-1, True)
            log_w = kept if mask is None else torch.where(mask, kept, log_w)
            allowed = kept
        token = (allowed + gumbel).argmax(-1)
        value = self.values_of(token[:, None], noise[:, None])
        gain: Tensor | float = 0.0
        if isinstance(self.model, TarFlowLM):
            token, gain = self._emit(value, log_w, allowed)
        self.tokens[:, self.at, 0] = token
        self.values[:, self.at] = value
        self.at += 1
        return allowed.logsumexp(-1) + gain

    def _emit(self, z: Tensor, log_w: Tensor, allowed: Tensor) -> tuple[Tensor, Tensor | float]:
        """The token and the additional log-weight [B] of latents z [B, d] of a drawn component.

        z ~ g = sum_A w_k N_k / w(A); the weight of (23) over w(A) is p(z) p(A|z) w(A) / g(z).
        """
        codebook = as_flow(self.model).codebook
        if allowed is log_w:
            return codebook.decode(z), 0.0
        log_p = codebook.log_posterior(z)
        inside = log_p.masked_fill(allowed == -torch.inf, -torch.inf)
        mixed = (log_w + log_p).logsumexp(-1) - (allowed + log_p).logsumexp(-1)
        return inside.argmax(-1), mixed + inside.logsumexp(-1)


def _without_dropped(log_w: Tensor) -> Tensor:
    """-inf for the tokens that an adjustment gave the lowest log-weight of the format."""
    return log_w.masked_fill(log_w < torch.finfo(log_w.dtype).min / 2, -torch.inf)
