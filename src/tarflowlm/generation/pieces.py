"""Texts that grow by single tokens, drawn among those that may come, and by given pieces.

Shape legend: B rows, T tokens, S tokens of a piece, V symbols, C channels of a value.
"""

from collections.abc import Iterator, Sequence

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
        self.awaited: list[Tensor] | None = None
        self.chances: list[Tensor] = []
        if at:
            self.settle(values[:, :at])

    def add(self, tokens: Tensor, values: Tensor, known: int = 0) -> Tensor:
        """Write a piece, tokens [S] with values [B, S, C]: its log-probability [B], in nats.

        Without that of the first `known` tokens.
        """
        end = self.at + len(tokens)
        self.tokens[:, self.at : end] = tokens[:, None].to(self.tokens)
        self.values[:, self.at : end] = values
        self.at += known
        if self.at == end:
            return torch.zeros(len(values))
        return self.read(end)

    def await_tokens(self, tokens: Sequence[Tensor], values: Sequence[Tensor]) -> None:
        """From now on every draw appends to `chances` the log-probabilities [B, M], in nats, of M
        single tokens with values [B, C] in the place of the one that it draws.
        """
        self.awaited, self.chances = [*tokens], []
        if isinstance(self.model, TarFlowLM):
            # sum_k w_k N_k(z) / sum_j N_j(z), as `log_prob`
            codebook = self.model.codebook
            self.awaited = [codebook.log_posterior(value) for value in values]

    def _chances(self, log_w: Tensor) -> Iterator[Tensor]:
        """Of the awaited tokens, [B] each, given log-weights [B, V]."""
        for one in self.awaited or ():
            if isinstance(self.model, TarFlowLM):
                yield (log_w + one).logsumexp(-1)
            else:
                yield log_w[:, one]

    def draw(
        self, gumbel: Tensor, noise: Tensor, mask: Tensor | None, waits: Tensor | None = None
    ) -> Tensor:
        """Write one token by numbers [B, V] and noise [B, d], among those in `mask` [V] or [B, V].

        Rows that wait, [B], keep the one that they have there.
        Returns the log-weight [B] of the draw, in nats: the log-probability of the mask, and for a
        flow the other factor of its draw (docs/math.md, eq. 23).
        """
        features, _ = self.next_features()
        log_w = next(self.law.log_weights(features, self.cache.linear))
        if self.awaited is not None:
            self.chances.append(torch.stack([*self._chances(log_w.log_softmax(-1))], -1))
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
        here = slice(None), self.at
        if waits is not None:
            token = torch.where(waits, self.tokens[here][:, 0], token)
            value = torch.where(waits[:, None], self.values[here], value)
        self.tokens[here] = token[:, None]
        self.values[here] = value
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
