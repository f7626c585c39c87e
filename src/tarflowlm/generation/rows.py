"""Rows of text that grow through a block with its KV cache.

`TokenRows` draw tokens from weights: the baseline's, or those of a Mix-d block. `Drawn` ones have
all their numbers from the start.
`inversion.Inverted` rows turn noise into latents, `particles.Completed` where tokens are given.

Shape legend: B rows (samples or particles), b rows that need more, T tokens, P patch, N = T / P
positions, d channels per token (0 for the baseline), C = P d, D width, K choices.
"""

from typing import cast

import torch
from torch import Tensor

from tarflowlm.baseline import TokenLM
from tarflowlm.flow.conditioner import Conditioner
from tarflowlm.flow.mixd import MixDCoupling
from tarflowlm.generation.sampling import BLANK, Gumbel
from tarflowlm.model import LanguageModel, TarFlowLM
from tarflowlm.requests import Adjustment

Place = tuple[slice | Tensor, slice | Tensor]
"""An index of rows and of their positions, for tensors [B, N, ...]."""


class Rows:
    """Rows whose first `at` positions are final, and the KV cache of their block.

    The block reads `values` [B, N, ...]: latents of a flow, tokens of the baseline.
    """

    values: Tensor
    num_positions: int
    ended: Tensor | None = None
    """Which rows need no more positions, [B]."""
    rows: Tensor | slice = slice(None)
    """The rows in the cache, whose next position is written; on the CPU."""
    there: Tensor | slice = slice(None)
    """The rows in the cache, on the device."""
    passes = 0
    """Calls of the Transformer, but for leading given positions."""

    def __init__(
        self,
        source: Conditioner,
        size: tuple[int, int],
        adjust: Adjustment | None,
        *,
        half: bool = False,
    ) -> None:
        """With `size` = B, N."""
        self.source = source
        self.adjust = adjust
        self.at = 0
        self.cache = source.allocate_cache(*size, half=half)

    def features(self, start: int, end: int) -> Tensor:
        """Features [b, n, D] of the positions from `start` up to `end`, where the cache ends."""
        self.cache.rewind(start)
        past = self.values[self.there, max(start - 1, 0) : end - 1]
        return self.source.features_of(self.cache, past)

    def settle(self, values: Tensor) -> Tensor:
        """Begin after the `values` [B, n, ...] of the first positions: their features [B, n, D]."""
        self.at = values.shape[1]
        self.values[:, : self.at] = values
        return self.features(0, self.at)

    def drop(self, over: Tensor) -> None:
        """Leave out the rows that are `over` [B], once these are a quarter of the present ones."""
        goes_on = ~over[self.rows]
        if 0 < goes_on.sum() <= 0.75 * len(goes_on):
            self.cache.keep(goes_on.nonzero()[:, 0])
            self.rows = torch.arange(len(over))[self.rows][goes_on]
            self.there = self.rows.to(self.values.device)

    def select(self, order: Tensor) -> None:
        """Replace the values and the cache of every row b by those of row order[b]."""
        self.values = self.values[order]
        self.cache.take(self.cache, order)


class TokenRows(Rows):
    """Rows of `tokens` [B, N, P] that are drawn from weights by Gumbel numbers.

    The baseline's values are the tokens. In a block, a token x_t has latents mu_x + sigma_x eps_t.
    """

    def __init__(
        self,
        model: LanguageModel,
        index: int,
        tokens: Tensor,
        adjust: Adjustment | None,
        *,
        half: bool = False,
    ) -> None:
        """Block `index` of a flow, in the order of the tokens, is a Mix-d block."""
        self.model = model
        self.tokens = tokens
        self.law: TokenLM | MixDCoupling
        source: Conditioner
        if isinstance(model, TarFlowLM):
            source = model.prior.block(index)
            self.law = cast(MixDCoupling, source.coupling)
            book = self.law.components
            self.mean, self.std = book.mean, book.log_std.exp()
        else:
            assert isinstance(model, TokenLM)
            source = self.law = model
        super().__init__(source, (len(tokens), tokens.shape[1]), adjust, half=half)

    def values_of(self, tokens: Tensor, noise: Tensor) -> Tensor:
        """Values [..., C] of tokens [..., P] with noise [..., P, d]."""
        if isinstance(self.law, TokenLM):
            return tokens
        return torch.addcmul(self.mean[tokens], self.std[tokens, None], noise).flatten(-2)

    def log_prob(self, features: Tensor, here: Place) -> Tensor:
        """log p [b, n, P] of the tokens at these places, in nats, given features [b, n, D].

        For a flow it is log p(z_t | z_<t) - log sum_j N_j(z_t) (docs/math.md, eq. 21).
        """
        if isinstance(self.law, MixDCoupling):
            return self.law.token_log_prob(self.values[here], features, relative=True)
        tokens = self.tokens[here]
        return self.law.log_prob_of(features, tokens.flatten(1)).view(tokens.shape)


class Drawn(TokenRows):
    """Rows whose random numbers are there from the start: Gumbel numbers, and the noise eps."""

    begins: Tensor | None = None
    """The tokens [V] that may be drawn at the position `first`; None for all."""
    first: Tensor
    """The number [B] of leading positions that are given."""

    def __init__(
        self,
        model: LanguageModel,
        index: int,
        noise: Tensor,
        gumbel: Gumbel,
        given: Tensor,
        adjust: Adjustment | None,
    ) -> None:
        """Block `index`, in the order of the tokens, draws with `noise` eps [B, T, d] and `gumbel`.

        Tokens `given` [B, T], on the CPU, are kept; there is BLANK elsewhere.
        """
        P = model.config.patch
        given = given.unflatten(1, (-1, P))
        self.is_known = given != BLANK
        # as a list, so that a position without given tokens costs nothing for them
        self.some_known = self.is_known.any(2).any(0).tolist()
        self.noise = noise.unflatten(1, (-1, P))
        self.gumbel = gumbel
        tokens = given.clamp_min(0).to(model.device)
        # an inverse needs the same features as the forward map; drawing does not
        half = not model.is_exact and noise.is_cuda and noise.dtype == torch.float32
        super().__init__(model, index, tokens, adjust, half=half)
        self.values = self.values_of(tokens, self.noise)
        self.num_positions = self.values.shape[1]

    def prefill(self, first: Tensor) -> Tensor | None:
        """Write at once the leading positions that are given in all rows; returns as `step`.

        The first `first` [B] positions of each are given.
        """
        self.first = first
        num = int(first.min())
        if num == 0:
            return None
        features = self.settle(self.values[:, :num])
        return self.log_prob(features, (slice(None), slice(num))).sum((1, 2))

    def step(self) -> Tensor | None:
        """Write the next position: log p [B] of its given tokens, in nats; None without any."""
        if self.ended is not None:
            self.drop(self.ended)
        n = self.at
        features = self.features(n, n + 1)
        self.passes += 1
        is_known = self.is_known[self.rows, n].to(features.device) if self.some_known[n] else None
        tokens = self._draw(features[:, 0], is_known)
        self.tokens[self.there, n] = tokens
        self.values[self.there, n] = self.values_of(tokens, self.noise[self.there, n])
        self.at += 1
        if is_known is None:
            return None
        here = self.there, slice(n, n + 1)
        found = torch.where(is_known, self.log_prob(features, here)[:, 0], 0.0).sum(1)
        log_p = found.new_zeros(len(self.tokens))
        log_p[self.there] = found
        return log_p

    def _draw(self, features: Tensor, is_known: Tensor | None) -> Tensor:
        """Tokens [b, P] of the next position, but given ones, where `is_known` [b, P], are kept."""
        n = self.at
        walk = self.law.log_weights(features, self.cache.linear)
        given, noise = self.tokens[self.there, n], self.noise[self.there, n]
        tokens: list[Tensor] = []
        value: Tensor | None = None
        for a in range(given.shape[1]):
            log_w = walk.send(value)
            if self.begins is not None:
                is_first = self.first[self.rows] == n
                barred = (is_first[:, None] & ~self.begins).to(log_w.device)
                log_w = log_w.masked_fill(barred, torch.finfo(log_w.dtype).min)
            token = self.gumbel.draw(
                log_w, self.adjust, self.there, n, a, is_compiled=self.cache.is_compiled
            )
            if is_known is not None:
                token = torch.where(is_known[:, a], given[:, a], token)
            tokens.append(token)
            # only the next tokens of a patch read their latents
            if a + 1 < given.shape[1]:
                value = self.values_of(token[:, None], noise[:, a : a + 1])
        return torch.stack(tokens, -1)

    def resample(self, order: Tensor, renewed: Tensor, noise: Tensor | None) -> None:
        """Replace every row b by row order[b]: the numbers of later places are fresh."""
        later = self.values[:, self.at :]
        self.select(order)
        self.values[:, self.at :] = later
        self.tokens[:, : self.at] = self.tokens[order, : self.at]
