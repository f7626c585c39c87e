"""Rows of text that grow through a block with its KV cache.

`TokenRows` draw tokens from weights: the baseline's, or those of a Mix-d block. `Drawn` ones have
all their numbers from the start; where the next tokens are guessed, one call checks several.
`Completed` rows turn noise into latents, in block 1 of any model.

Shape legend: B rows (samples or particles), b rows that need more, T tokens, P patch, N = T / P
positions, d channels per token (0 for the baseline), C = P d, D width, K choices.
"""

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from tarflowlm.baseline import TokenLM
from tarflowlm.drafts import Guesser
from tarflowlm.flow.fills import complete
from tarflowlm.flow.mixd import MixDCoupling
from tarflowlm.flow.numerics import standard_normal_log_prob
from tarflowlm.flow.transformer import Conditioner
from tarflowlm.generation.sampling import BLANK, ROOM, Gumbel, drop_finished, num_leading
from tarflowlm.model import LanguageModel, TarFlowLM
from tarflowlm.requests import Adjustment, Sampling

NEAR = 2.0**-12
"""Scores that are closer than this may change places by rounding: what is computed for one position
or for several, alone or beside other rows, differs by less.
"""
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
    """The rows whose next position is written."""
    passes = 0
    """Calls of the Transformer, but for leading given positions."""

    def __init__(
        self,
        model: LanguageModel,
        source: Conditioner,
        size: tuple[int, int],
        adjust: Adjustment | None,
        *,
        half: bool = False,
    ) -> None:
        """With `size` = B, N."""
        self.model = model
        self.source = source
        self.adjust = adjust
        self.at = 0
        self.cache = source.allocate_cache(*size, half=half)

    def features(self, start: int, end: int) -> Tensor:
        """Features [B, n, D] of the positions from `start` up to `end`, where the cache ends."""
        self.cache.rewind(start)
        past = self.values[:, max(start - 1, 0) : end - 1]
        return self.source.features_of(self.cache, past, first=start == 0)

    def select(self, order: Tensor) -> None:
        """Replace every row b by row order[b]; `order` is on the device."""
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
        self.tokens = tokens
        source = model.conditioner
        self.law: TokenLM | MixDCoupling
        if isinstance(model, TarFlowLM):
            source = model.prior.block(index)
            self.law = cast(MixDCoupling, source.coupling)
            book = self.law.components
            self.mean, self.std = book.mean, book.log_std.exp()
        else:
            self.law = cast(TokenLM, model)
        super().__init__(model, source, (len(tokens), tokens.shape[1]), adjust, half=half)

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
    """Rows whose random numbers are there from the start: Gumbel numbers, and the noise eps.

    So whoever guesses a token knows its latents, and one call of the Transformer checks several
    guesses: those before the first wrong one are final, and so is the token that replaces it.
    Guesses never change a text (docs/math.md, section 7).

    Where the two best scores are so close that rounding may exchange them, or a token is as close
    to a limit of top-k, top-p or min-p, the Transformer reads the text of the row from its start,
    alone, and that decides. So a text is the same by one call or by many, alone or beside others.
    """

    def __init__(
        self,
        model: LanguageModel,
        index: int,
        noise: Tensor,
        gumbel: Gumbel,
        given: Tensor,
        adjust: Adjustment | None,
        sampling: Sampling | None = None,
    ) -> None:
        """Block `index`, in the order of the tokens, draws with `noise` eps [B, T, d] and `gumbel`.

        Tokens `given` [B, T], on the CPU, are kept; there is BLANK elsewhere. The model's drafter
        guesses if `sampling` takes the cheapest way; for several particles it is None.
        """
        self.guesser: Guesser | None = None
        if model.drafter is not None and sampling is not None and sampling.decoder == "auto":
            top_p = 0.0 if sampling.top_k == 1 else sampling.top_p
            self.guesser = Guesser(model.drafter, sampling.temperature or 1.0, top_p)
        P = model.config.patch
        # guesses may go beyond the end
        room = 0 if self.guesser is None else ROOM
        given = F.pad(given.unflatten(1, (-1, P)), (0, 0, 0, room), value=BLANK)
        self.is_known = given != BLANK
        # read on the host once, so that a position without given tokens costs nothing for them
        self.some_known = self.is_known.any(2).any(0).tolist()
        tokens = given.clamp_min(0).to(model.device)  # [B, N + room, P]
        self.noise = F.pad(noise.unflatten(1, (-1, P)), (0, 0, 0, 0, 0, room))
        self.gumbel = gumbel
        # an inverse needs the same features as the forward map; drawing does not
        half = not model.is_exact and noise.is_cuda and noise.dtype == torch.float32
        super().__init__(model, index, tokens, adjust, half=half)
        self.values = self.values_of(tokens, self.noise)
        self.num_positions = self.values.shape[1] - room
        self.decides = P == 1 and model.device.type == "cpu"
        """Whether near ties are decided by the text of the row alone."""
        self.next = torch.zeros(len(given), dtype=torch.long)
        """The next position of every row."""
        self.is_even = True
        """Whether the next position is the same in all rows that need one."""

    def _here(self, ahead: int, count: int) -> Place:
        """The `count` positions of each row that begin `ahead` of its next one."""
        if self.is_even:
            return self.rows, slice(self.at + ahead, self.at + ahead + count)
        rows = torch.arange(len(self.next))[self.rows]
        return rows[:, None], self.next[rows][:, None] + torch.arange(ahead, ahead + count)

    def _advance(self, count: Tensor) -> None:
        """Go on by `count` [b] positions, at most to the end."""
        self.next[self.rows] = (self.next[self.rows] + count).clamp(max=self.num_positions)
        needed = self.next if self.ended is None else self.next[~self.ended]
        self.at = int(needed.min()) if len(needed) else self.num_positions
        self.is_even = bool((self.next[self.rows] == self.at).all())

    def prefill(self) -> Tensor | None:
        """Write the leading positions that are given in all rows at once; returns as `step`."""
        num = num_leading(self.is_known.all(2).all(0))
        if num == 0:
            return None
        features = self.settle(self.values[:, :num])
        return self.log_prob(features, (slice(None), slice(num))).sum((1, 2))

    def settle(self, values: Tensor) -> Tensor:
        """Begin after the `values` [B, n, ...] of the first positions: their features [B, n, D]."""
        num = values.shape[1]
        self.values[:, :num] = values
        features = self.features(0, num)
        self._advance(torch.tensor(num))
        return features

    def step(self) -> Tensor | None:
        """Write the next position: log p [B] of its given tokens, in nats; None without any.

        Several positions, if the next ones are guessed right.
        """
        if self.ended is not None or not self.is_even:
            over = self.next >= self.num_positions
            over = over if self.ended is None else over | self.ended
            self.rows = drop_finished(self.rows, over, self.cache)
        guesses = self._guesses()
        count = guesses.shape[1]
        here = self._here(0, count + 1)
        some_known = any(self.some_known[self.at : int(self.next.max()) + count + 1])
        is_known = self.is_known[here].to(guesses.device) if some_known else None
        right = torch.zeros(len(guesses), dtype=torch.long)
        if count:
            ahead = self._here(0, count)
            if is_known is not None:
                guesses = torch.where(is_known[:, :count], self.tokens[ahead], guesses)
            self.values[ahead] = self.values_of(guesses, self.noise[ahead])
        self.cache.rewind(self.at if self.is_even else self.next[self.rows])
        past = self._here(-1, count + 1) if self.at else (self.rows, slice(count))
        features = self.source.features_of(self.cache, self.values[past], first=self.at == 0)
        self.passes += 1
        tokens, is_sure = self._draw(features, here, is_known)
        if count:
            # on an accelerator, the host waits here
            right = (tokens[:, :count] == guesses).all(2).long().cumprod(1).sum(1).cpu()
        self.tokens[here] = tokens
        self.values[here] = self.values_of(tokens, self.noise[here])
        if is_sure is not None and not is_sure.all():
            self._decide(right, is_sure.long().cumprod(1).sum(1))
        log_p: Tensor | None = None
        if is_known is not None:
            is_final = (torch.arange(count + 1) <= right[:, None]).to(is_known.device)
            mask = is_known & is_final[..., None]
            found = torch.where(mask, self.log_prob(features, here), 0.0).sum((1, 2))
            log_p = found.new_zeros(len(self.next))
            log_p[self.rows] = found
        self._advance(right + 1)
        return log_p

    def _guesses(self) -> Tensor:
        """Guesses [b, n, P] of the next tokens, as if none were given; n may be 0."""
        none = self.tokens[self.rows, :0]
        if self.guesser is None:
            return none
        count = min(self.guesser.most, self.num_positions - 1 - self.at)
        if count < 1:
            return none
        length = min(self.at, self.guesser.length)
        past = self.tokens[self._here(-length, length)][..., 0].cpu().numpy()
        numbers = self.gumbel.at(*self._here(0, count))[:, :, 0].cpu().numpy()
        return torch.from_numpy(self.guesser.guess(past, numbers)).to(none)[..., None]

    def _draw(
        self, features: Tensor, here: Place, is_known: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Tokens [b, n, P] from features [b, n, D], and whether rounding cannot change them [b, n].

        Given tokens are kept, where `is_known` [b, n, P]. None where near ties are not decided.
        """
        shape = features.shape[:2]
        gumbel = self.gumbel.at(*here).flatten(0, 1)
        walk = self.law.log_weights(features.flatten(0, 1))
        noise, given = (x[here].flatten(0, 1) for x in (self.noise, self.tokens))
        known = None if is_known is None else is_known.flatten(0, 1)
        found: list[Tensor] = []
        is_sure: Tensor | None = None
        value: Tensor | None = None
        for a in range(given.shape[1]):
            log_w = walk.send(value)
            if self.decides:
                token, is_sure = _chosen(log_w, gumbel[:, a], self.adjust)
            else:
                adjusted = log_w if self.adjust is None else self.adjust(log_w)
                token = (adjusted + gumbel[:, a]).argmax(-1)
            if known is not None:
                token = torch.where(known[:, a], given[:, a], token)
                is_sure = None if is_sure is None else is_sure | known[:, a]
            found.append(token)
            if a + 1 < given.shape[1]:
                value = self.values_of(found[-1][:, None], noise[:, a : a + 1])
        tokens = torch.stack(found, -1).unflatten(0, shape)
        return tokens, None if is_sure is None else is_sure.unflatten(0, shape)

    def _decide(self, right: Tensor, sure: Tensor) -> None:
        """Decide the first token of each row that is not sure, if it is final; changes `right`.

        The first `sure` [b] of the next tokens cannot be changed by rounding.
        """
        rows = torch.arange(len(self.next))[self.rows]
        for index in (sure <= right).nonzero()[:, 0].tolist():
            row, place = int(rows[index]), int(self.next[rows[index]] + sure[index])
            if place >= self.num_positions:
                continue
            features = self.source.states(self.values[row : row + 1, :place])[:, -1]
            log_w = next(self.law.log_weights(features))
            adjusted = log_w if self.adjust is None else self.adjust(log_w)
            self.tokens[row, place] = (adjusted + self.gumbel.at(row, place)).argmax(-1)
            self.values[row, place] = self.values_of(
                self.tokens[row, place], self.noise[row, place]
            )
            right[index] = sure[index]

    def resample(self, order: Tensor, renewed: Tensor, noise: Tensor | None) -> None:
        """Replace every row b by row order[b]: the numbers of later places are fresh."""
        later = self.values[:, self.at :]
        self.select(order)
        self.values[:, self.at :] = later
        self.tokens[:, : self.at] = self.tokens[order, : self.at]


def _chosen(log_w: Tensor, gumbel: Tensor, adjust: Adjustment | None) -> tuple[Tensor, Tensor]:
    """The choices [M] of numbers [M, K], and whether rounding cannot change them, [M]."""
    tempered = log_w if adjust is None else adjust.temper(log_w)
    scores = (tempered if adjust is None else adjust.limit(tempered, NEAR)) + gumbel
    best = scores.topk(min(2, scores.shape[-1]))
    token = best.indices[:, 0]
    is_sure = best.values[:, 0] - best.values[:, -1] > (NEAR if scores.shape[-1] > 1 else -1)
    if adjust is not None:
        within = adjust.limit(tempered, -NEAR).gather(-1, token[:, None])[:, 0]
        is_sure &= within > torch.finfo(within.dtype).min / 2
    return token, is_sure


class Completed(Rows):
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
        adjust: Adjustment | None,
        gumbel: Gumbel | None = None,
    ) -> None:
        """`noise`, `known` [B, T, d]; `is_known` [B, T] on the CPU.

        With `gumbel` numbers the other tokens are drawn, and `noise` is not their noise.
        """
        self.gumbel = gumbel
        self.block = model.prior.block(0)
        self.patch = model.prior.patch
        reorders = self.block.order.reverse or self.block.order.mixes
        assert not reorders, "given latents need the order of the tokens"
        self.noise = self.patch(noise).clone()
        self.known = self.patch(known)
        self.values = torch.zeros_like(self.noise)
        self.num_positions = self.noise.shape[1]
        super().__init__(model, self.block, (len(noise), self.num_positions), adjust)
        self.is_known = is_known.unflatten(1, (-1, model.config.patch))
        # read on the host once, so that a position without given tokens costs nothing for them
        self.some_known = self.is_known.any(2).any(0).tolist()
        mask = self.is_known.to(noise.device)
        self.invert = self.block.coupling.inverter()
        self.log_normaliser = model.codebook.log_normaliser(known).view(mask.shape) * mask

    def prefill(self) -> Tensor | None:
        """As `Drawn.prefill`."""
        num = num_leading(self.is_known.all(2).all(0))
        if num == 0:
            return None
        z = self.known[:, :num]
        self.values[:, :num] = z
        self.at = num
        u, log_det = self.block.coupling(z, self.features(0, num))
        self.noise[:, :num] = u
        log_p = log_det.sum(-1) + standard_normal_log_prob(u)
        return log_p - self.log_normaliser[:, :num].sum((1, 2))

    def step(self) -> Tensor | None:
        """As `Drawn.step`, always one position."""
        if self.ended is not None:
            self.rows = drop_finished(self.rows, self.ended, self.cache)
        n = self.at
        here = self.rows, n
        previous = self.values[self.rows, n - 1] if n else None
        noise, is_known = self.noise[here], self.is_known[here]
        features = self.block.features_at(self.cache, previous, len(noise))
        gumbel = None if self.gumbel is None else self.gumbel.at(*here)
        self.at += 1
        self.passes += 1
        if not self.some_known[n]:
            self.values[here] = self.invert(noise, features, self.adjust, gumbel)
            return None
        self.values[here], self.noise[here], log_p = complete(
            self.block.coupling, noise, features, self.known[here], is_known, self.adjust, gumbel
        )
        found = (log_p - self.log_normaliser[here]).sum(-1)
        every = found.new_zeros(len(self.values))
        every[self.rows] = found
        return every

    def resample(self, order: Tensor, renewed: Tensor, noise: Tensor | None) -> None:
        """As `Drawn.resample`; `renewed` rows get fresh `noise` [rows, T, ...]."""
        self.select(order)
        self.noise = self.noise[order]
        if noise is not None:
            self.noise[renewed, self.at :] = self.patch(noise)[:, self.at :].to(self.noise)
