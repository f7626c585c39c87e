"""The decoder: texts go through a block, or the baseline, position by position.

A `Decoder` has the KV cache and the values so far. What a step makes of the features differs:
`Drawing` draws tokens by their weights, `inversion.Inversion` turns noise into latents, and
`pieces.Pieces` draws among the tokens that may come and weighs what it draws.

Shape legend: B rows (samples or particles), b rows that need more, T tokens, P patch, N = T / P
positions, d channels per token (0 for the baseline), C = P d, D width, K choices.
"""

from abc import ABC, abstractmethod
from functools import cached_property
from typing import cast

import torch
from torch import Tensor

from tarflowlm.baseline import TokenLM
from tarflowlm.errors import SILENT, Progress
from tarflowlm.flow.conditioner import Conditioner
from tarflowlm.flow.mixd import MixDCoupling
from tarflowlm.generation.sampling import BLANK, Gumbel
from tarflowlm.model import LanguageModel, TarFlowLM
from tarflowlm.requests import Adjustment

Place = tuple[slice | Tensor, slice | Tensor | int]
"""An index of rows and of their positions, for tensors [B, N, ...]."""


class Decoder(ABC):
    """B texts whose first `at` positions are final, and the KV cache of their block.

    The block reads `values` [B, N, ...]: latents of a flow, tokens of the baseline.
    """

    progress: Progress = SILENT
    """Advances once per position."""
    ended: Tensor | None = None
    """Which rows need no more positions, [B]."""
    rows: Tensor | slice = slice(None)
    """The rows in the cache, whose next position is written; on the CPU."""
    there: Tensor | slice = slice(None)
    """The rows in the cache, on the device."""
    at = 0
    passes = 0
    """Calls of the Transformer, but for leading given positions."""

    def __init__(
        self, source: Conditioner, values: Tensor, is_known: Tensor | None, *, half: bool = False
    ) -> None:
        """Tokens are given where `is_known` [B, N, P], on the CPU; None: nowhere."""
        self.source = source
        self.values = values
        self.num_positions = values.shape[1]
        self.is_known = is_known
        # as a list, so that a position without given tokens costs nothing for them
        self.some_known = [False] * self.num_positions
        if is_known is not None:
            self.some_known = is_known.any(2).any(0).tolist()
        self.cache = source.allocate_cache(*values.shape[:2], half=half)

    @property
    def is_open(self) -> bool:
        """Whether positions are left to write."""
        return self.at < self.num_positions

    @cached_property
    def first(self) -> Tensor:
        """How many leading positions of every row are given, [B]."""
        if self.is_known is None:
            return torch.zeros(len(self.values), dtype=torch.long)
        return self.is_known.all(2).long().cumprod(1).sum(1)

    def features(self, end: int) -> Tensor:
        """Features [b, n, D] of the positions from `at` up to `end`."""
        self.cache.rewind(self.at)
        past = self.values[self.there, max(self.at - 1, 0) : end - 1]
        return self.source.features_of(self.cache, past)

    def settle(self, values: Tensor) -> Tensor:
        """Go on after the `values` [B, n, ...] of the next positions: their features [B, n, D]."""
        end = self.at + values.shape[1]
        self.values[:, self.at : end] = values
        features = self.features(end)
        self.progress.advance(end - self.at)
        self.at = end
        return features

    def settle_alike(self, values: Tensor) -> None:
        """Go on after the first `values` [1, n, ...], which are those of all rows: read once."""
        self.at = values.shape[1]
        if not self.at:
            return
        self.values[:, : self.at] = values
        one = self.source.allocate_cache(1, self.at)
        self.source.features_of(one, values[:, :-1])
        rows = torch.zeros(len(self.values), dtype=torch.long, device=self.values.device)
        self.cache.take(one, rows)

    @abstractmethod
    def read(self, end: int) -> Tensor:
        """Go on to `end`, with tokens that are given in all rows: their log p [B], in nats."""

    def next_features(self) -> tuple[Tensor, Tensor | None]:
        """Features [b, D] of the next position, and which of its tokens are given, [b, P]."""
        if self.ended is not None:
            self._drop(self.ended)
        self.passes += 1
        is_known = None
        if self.is_known is not None and self.some_known[self.at]:
            is_known = self.is_known[self.rows, self.at]
        return self.features(self.at + 1)[:, 0], is_known

    def of_all(self, x: Tensor) -> Tensor:
        """Numbers [b] of the present rows as numbers [B] of all, with zeros."""
        every = x.new_zeros(len(self.values))
        every[self.there] = x
        return every

    def _drop(self, over: Tensor) -> None:
        """Leave out the rows that are `over` [B], once these are a quarter of the present ones."""
        goes_on = ~over[self.rows]
        if 0 < goes_on.sum() <= 0.75 * len(goes_on):
            self.cache.keep(goes_on.nonzero()[:, 0])
            self.rows = torch.arange(len(over))[self.rows][goes_on]
            self.there = self.rows.to(self.values.device)

    def take(self, order: Tensor) -> None:
        """Replace what is final of every row b, and its cache, by that of row order[b]."""
        self.values[:, : self.at] = self.values[order, : self.at]
        self.cache.take(self.cache, order)


class TokenDecoder(Decoder):
    """Texts of `tokens` [B, N, P] with weights: of the baseline, or of a Mix-d block.

    The baseline's values are the tokens. In a block, a token x_t has latents mu_x + sigma_x eps_t.
    """

    def __init__(
        self,
        model: LanguageModel,
        index: int,
        tokens: Tensor,
        values: Tensor | None,
        noise: Tensor | None = None,
        is_known: Tensor | None = None,
        *,
        half: bool = False,
    ) -> None:
        """Block `index` of a flow, in the order of the tokens, is a Mix-d block.

        Without `values` they are those of the `tokens`, with `noise` eps [B, N, P, d].
        """
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
        if values is None:
            assert noise is not None
            values = self.values_of(tokens, noise)
        super().__init__(source, values, is_known, half=half)

    def values_of(self, tokens: Tensor, noise: Tensor) -> Tensor:
        """Values [..., C] of tokens [..., P] with noise [..., P, d]."""
        if isinstance(self.law, TokenLM):
            return tokens
        return torch.addcmul(self.mean[tokens], self.std[tokens, None], noise).flatten(-2)

    def log_prob(self, features: Tensor, here: Place) -> Tensor:
        """log p [b, n, P] of the tokens at these places, in nats, given features [b, n, D].

        For a flow it is log p(z_t | z_<t) - log sum_j N_j(z_t) (docs/math.md, eq. 21). Tokens are
        given only where the mixture is one of the encoder's codebook, as the second sum needs.
        """
        if isinstance(self.law, MixDCoupling):
            return self.law.token_log_prob(self.values[here], features, relative=True)
        tokens = self.tokens[here]
        return self.law.log_prob_of(features, tokens.flatten(1)).view(tokens.shape)

    def read(self, end: int) -> Tensor:
        here = slice(None), slice(self.at, end)
        return self.log_prob(self.settle(self.values[here]), here).sum((1, 2))

    def take(self, order: Tensor) -> None:
        super().take(order)
        self.tokens[:, : self.at] = self.tokens[order, : self.at]


class Drawing(TokenDecoder):
    """Texts that are drawn step by step, from random numbers that belong to a row and a place.

    The noise eps is a tensor. A Gumbel number is a hash of the seed of its row, the place and the
    choice. `write.Writer` makes a Drawing and takes its steps.
    """

    begins: Tensor | None = None
    """The tokens [V] that may be drawn after the leading given positions; None for all."""

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
        is_known = given != BLANK
        self.noise = noise.unflatten(1, (-1, P))
        self.gumbel = gumbel
        self.adjust = adjust
        tokens = given.clamp_min(0).to(model.device)
        # an inverse needs the same features as the forward map; drawing does not
        half = not model.is_exact and noise.is_cuda and noise.dtype == torch.float32
        super().__init__(model, index, tokens, None, self.noise, is_known, half=half)

    def step(self) -> Tensor | None:
        """Write the next position: log p [B] of its given tokens, in nats; None without any.

            x_t = argmax_k (log w_k + g_k)    with Gumbel numbers g, after the sampler changed log w
            z_t = mu_x + sigma_x eps_t

        is an exact draw from the mixture (docs/math.md, eq. 18d). The text has what z_t decodes to,
        which is x_t where codes are apart, and z_t is what the next position reads.
        """
        features, is_known = self.next_features()
        here = self.there, self.at
        given, noise = self.tokens[here], self.noise[here]
        weights = self.law.log_weights(features, self.cache.linear)
        tokens: list[Tensor] = []
        value: Tensor | None = None
        for a in range(given.shape[1]):
            log_w = weights.send(value)
            if self.begins is not None:
                is_first = self.first[self.rows] == self.at
                barred = (is_first[:, None] & ~self.begins).to(log_w.device)
                log_w = log_w.masked_fill(barred, torch.finfo(log_w.dtype).min)
            token = self.gumbel.draw(
                log_w, self.adjust, *here, a, is_compiled=self.cache.is_compiled
            )
            if is_known is not None:
                token = torch.where(is_known[:, a].to(token.device), given[:, a], token)
            tokens.append(token)
            # only the next tokens of a patch read their latents
            if a + 1 < given.shape[1]:
                value = self.values_of(token[:, None], noise[:, a : a + 1])
        self.tokens[here] = torch.stack(tokens, -1)
        self.values[here] = self.values_of(self.tokens[here], noise)
        self.at += 1
        self.progress.advance()
        if is_known is None:
            return None
        log_p = self.log_prob(features[:, None], (self.there, slice(self.at - 1, self.at)))[:, 0]
        return self.of_all(torch.where(is_known.to(log_p.device), log_p, 0.0).sum(1))
