"""Rows of text that grow through a block with its KV cache.

`TokenRows` draw tokens from weights: the baseline's, or those of a Mix-d block. `Drawn` ones have
all their numbers from the start; where the next tokens are guessed, one call checks several.
`inversion.Inverted` rows turn noise into latents, `particles.Completed` where tokens are given.

Shape legend: B rows (samples or particles), b rows that need more, T tokens, P patch, N = T / P
positions, d channels per token (0 for the baseline), C = P d, D width, K choices.
"""

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from tarflowlm.baseline import TokenLM
from tarflowlm.drafts import Guesser
from tarflowlm.flow.conditioner import Conditioner
from tarflowlm.flow.mixd import MixDCoupling
from tarflowlm.generation.sampling import BLANK, ROOM, Gumbel
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
    """Rows whose random numbers are there from the start: Gumbel numbers, and the noise eps.

    So whoever guesses a token knows its latents, and one call of the Transformer checks several
    guesses: those before the first wrong one are final, and so is the token that replaces it.
    Guesses never change a text (docs/math.md, section 7).

    Where the two best scores are so close that rounding may exchange them, or a token is as close
    to a limit of top-k, top-p or min-p, the Transformer reads the text of the row from its start,
    alone, and that decides. So a text is the same by one call or by many, alone or beside others.
    """

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
        # as a list, so that a position without given tokens costs nothing for them
        self.some_known = self.is_known.any(2).any(0).tolist()
        self.text = given.clamp_min(0)
        """The tokens [B, N + room, P] on the CPU, as far as guesses need them."""
        tokens = self.text.to(model.device)
        self.noise = F.pad(noise.unflatten(1, (-1, P)), (0, 0, 0, 0, 0, room))
        self.gumbel = self.numbers = gumbel
        if self.guesser is not None and tokens.device.type != "cpu":
            # guesses are made on the CPU, for which the device need not be asked for its numbers
            self.numbers = Gumbel(gumbel.seeds.cpu(), given.shape[1] - room, gumbel.choices)
        # an inverse needs the same features as the forward map; drawing does not
        half = not model.is_exact and noise.is_cuda and noise.dtype == torch.float32
        super().__init__(model, index, tokens, adjust, half=half)
        self.values = self.values_of(tokens, self.noise)
        self.num_positions = self.values.shape[1] - room
        self.decides = P == 1 and model.device.type == "cpu"
        """Whether near ties are decided by the text of the row alone."""
        self.next = torch.zeros(len(given), dtype=torch.long)
        """The next position of every row, on the CPU."""
        self.is_even = True
        """Whether the next position is the same in all rows that need one."""

    def _advance(self, count: Tensor) -> None:
        """Go on by `count` [b] positions, at most to the end."""
        self.next[self.rows] = (self.next[self.rows] + count).clamp(max=self.num_positions)
        needed = self.next if self.ended is None else self.next[~self.ended]
        self.at = int(needed.min()) if len(needed) else self.num_positions
        self.is_even = bool((self.next[self.rows] == self.at).all())

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

    def settle(self, values: Tensor) -> Tensor:
        features = super().settle(values)
        self._advance(torch.tensor(self.at))
        return features

    def step(self) -> Tensor | None:
        """Write the next position: log p [B] of its given tokens, in nats; None without any.

        Several positions, if the next ones are guessed right.
        """
        if self.ended is not None or not self.is_even:
            over = self.next >= self.num_positions
            self.drop(over if self.ended is None else over | self.ended)
        start: int | Tensor = self.at if self.is_even else self.next[self.rows][:, None]
        at, guesses, is_known = self._guesses(start)
        count = guesses.shape[1]
        here, ahead = (_places(self.there, at, n) for n in (count + 1, count))
        if count:
            self.values[ahead] = self.values_of(guesses, self.noise[ahead])
        if isinstance(at, int):
            self.cache.rewind(at)
        else:
            self.cache.rewind(int(self.next[self.rows].max()), at[:, 0])
        past = _places(self.there, at - 1, count + 1) if self.at else ahead
        features = self.source.features_of(self.cache, self.values[past])
        self.passes += 1
        tokens, is_sure = self._draw(features, here, is_known)
        right = torch.zeros(len(tokens), dtype=torch.long)
        if self.guesser is not None:
            right = (tokens[:, :count] == guesses).all(2).long().cumprod(1).sum(1)
        self.tokens[here] = tokens
        self.values[here] = self.values_of(tokens, self.noise[here])
        if is_sure is not None and not is_sure.all():
            self._decide(right, is_sure.long().cumprod(1).sum(1))
        log_p: Tensor | None = None
        if is_known is not None:
            if count:
                is_final = torch.arange(count + 1, device=right.device) <= right[:, None]
                is_known = is_known & is_final[..., None]
            found = torch.where(is_known, self.log_prob(features, here), 0.0).sum((1, 2))
            log_p = found.new_zeros(len(self.next))
            log_p[self.there] = found
        if self.guesser is not None and self.text is not self.tokens:
            drawn, right = _moved((tokens, right), self.text.device)
            self.text[_places(self.rows, start, count + 1)] = drawn
        self._advance(right + 1)
        return log_p

    def _guesses(self, start: int | Tensor) -> tuple[int | Tensor, Tensor, Tensor | None]:
        """Where rows continue, guesses [b, n, P] from there, and where tokens are given, if at all.

        They begin at `start`, [b, 1] where rows differ. All is sent to the device at once, for
        which the host waits. Given tokens are marked in [b, n + 1, P].
        """
        starts = self.next[self.rows][:, None]
        guesses = starts[:, :0, None]
        if self.guesser is None and not self.some_known[self.at]:
            return start, guesses, None
        most = self.num_positions - 1 - self.at
        if self.guesser is not None and most > 0:
            length, most = min(self.at, self.guesser.length), min(self.guesser.most, most)
            past = self.text[_places(self.rows, start - length, length)][..., 0].numpy()
            numbers = self.numbers.at(*_places(self.rows, start, most))[:, :, 0].numpy()
            guesses = torch.from_numpy(self.guesser.guess(past, numbers))[..., None]
        count = guesses.shape[1]
        some_known = any(self.some_known[self.at : int(starts.max()) + count + 1])
        is_known = starts[:, :0]
        if some_known:
            is_known = self.is_known[_places(self.rows, start, count + 1)]
            given = self.text[_places(self.rows, start, count)]
            guesses = torch.where(is_known[:, :count], given, guesses)
        starts, guesses, is_known = _moved((starts, guesses, is_known), self.tokens.device)
        at = start if isinstance(start, int) else starts
        return at, guesses, is_known if some_known else None

    def _draw(
        self, features: Tensor, here: Place, is_known: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Tokens [b, n, P] from features [b, n, D], and whether rounding cannot change them [b, n].

        Given tokens are kept, where `is_known` [b, n, P]. None where near ties are not decided.
        """
        shape = features.shape[:2]
        gumbel = self.gumbel.at(*here).flatten(0, 1)
        walk = self.law.log_weights(features.flatten(0, 1))
        patch = self.tokens.shape[-1]
        # only the next tokens of a patch read their latents
        noise = self.noise[here].flatten(0, 1) if patch > 1 else self.noise
        known = given = None
        if is_known is not None:
            known, given = is_known.flatten(0, 1), self.tokens[here].flatten(0, 1)
        found: list[Tensor] = []
        is_sure: Tensor | None = None
        value: Tensor | None = None
        for a in range(patch):
            log_w = walk.send(value)
            if self.begins is not None:
                log_w = self._begun(log_w, self.rows, self.next[self.rows], shape[1])
            if self.decides:
                token, is_sure = _chosen(log_w, gumbel[:, a], self.adjust)
            else:
                adjusted = log_w if self.adjust is None else self.adjust(log_w)
                token = (adjusted + gumbel[:, a]).argmax(-1)
            if known is not None and given is not None:
                token = torch.where(known[:, a], given[:, a], token)
                is_sure = None if is_sure is None else is_sure | known[:, a]
            found.append(token)
            if a + 1 < patch:
                value = self.values_of(found[-1][:, None], noise[:, a : a + 1])
        tokens = torch.stack(found, -1).unflatten(0, shape)
        return tokens, None if is_sure is None else is_sure.unflatten(0, shape)

    def _begun(self, log_w: Tensor, rows: Tensor | slice, at: Tensor, count: int) -> Tensor:
        """Log-weights [b count, K] of these rows from their places `at` [b], without those tokens
        after the given ones that are not among `begins`.
        """
        assert self.begins is not None
        is_first = (at[:, None] + torch.arange(count) == self.first[rows, None]).flatten()
        if not is_first.any():
            return log_w
        barred = (is_first[:, None] & ~self.begins).to(log_w.device)
        return log_w.masked_fill(barred, torch.finfo(log_w.dtype).min)

    def _decide(self, right: Tensor, sure: Tensor) -> None:
        """Decide the first token of each row that is not sure, if it is final; changes `right`.

        The first `sure` [b] of the next tokens cannot be changed by rounding.
        """
        rows = torch.arange(len(self.next))[self.rows]
        for index in (sure <= right).nonzero()[:, 0].tolist():
            row, place = here = int(rows[index]), int(self.next[rows[index]] + sure[index])
            if place >= self.num_positions:
                continue
            features = self.source.states(self.values[row : row + 1, :place])[:, -1]
            log_w = next(self.law.log_weights(features))
            if self.begins is not None:
                log_w = self._begun(log_w, slice(row, row + 1), torch.tensor([place]), 1)
            adjusted = log_w if self.adjust is None else self.adjust(log_w)
            self.tokens[here] = (adjusted + self.gumbel.at(row, place)).argmax(-1)
            self.values[here] = self.values_of(self.tokens[here], self.noise[here])
            right[index] = sure[index]

    def resample(self, order: Tensor, renewed: Tensor, noise: Tensor | None) -> None:
        """Replace every row b by row order[b]: the numbers of later places are fresh."""
        later = self.values[:, self.at :]
        self.select(order)
        self.values[:, self.at :] = later
        self.tokens[:, : self.at] = self.tokens[order, : self.at]


def _places(rows: Tensor | slice, at: int | Tensor, count: int) -> Place:
    """The `count` positions of these rows from `at`, which is [b, 1] where rows differ."""
    if isinstance(at, int):
        return rows, slice(at, at + count)
    if isinstance(rows, slice):
        rows = torch.arange(len(at), device=at.device)
    return rows[:, None], at + torch.arange(count, device=at.device)


def _moved(parts: tuple[Tensor, ...], device: torch.device) -> tuple[Tensor, ...]:
    """The `parts` [b, ...], integers and bool, on a device: at once, as the host waits for it."""
    if parts[0].device == device:
        return parts
    flat = [part.reshape(len(part), -1) for part in parts]
    moved = torch.cat(flat, 1).to(device).split([x.shape[1] for x in flat], 1)
    return tuple(x.view(y.shape).to(y.dtype) for x, y in zip(moved, parts, strict=True))


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
