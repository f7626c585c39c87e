"""Gaps of unknown length and constrained tokens: particles over texts of several lengths.

A particle is a text up to the end of a given piece. It fills the next gap at its greatest length,
and is a candidate for every length. The probability of the given piece after its tokens and the
masks of its draws weight a candidate. R of all candidates are kept (docs/math.md, eq. 23).

Shape legend: R particles, B = num R rows, T tokens, S tokens of a piece, G gaps, V symbols.
"""

import math
from collections.abc import Iterator
from copy import copy
from dataclasses import replace

import torch
from torch import Tensor

from tarflowlm.data.prompts import Gap
from tarflowlm.errors import Progress, UserError
from tarflowlm.flow.numerics import standard_normal_log_prob
from tarflowlm.generation.decoder import TokenDecoder
from tarflowlm.generation.particles import Weights, weight
from tarflowlm.generation.plan import Plan, checked_mask
from tarflowlm.generation.sampling import GapLengths, Generation, Gumbel, Noise
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
    ) -> None:
        """The first `at` of `tokens` [B, T, 1] and of their `values` [B, T, C] are written."""
        super().__init__(model, 0, tokens, values)
        self.adjust = adjust
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
        log_w = log_w.masked_fill(log_w < torch.finfo(log_w.dtype).min / 2, -torch.inf)
        allowed = log_w if mask is None else log_w.masked_fill(~mask, -torch.inf)
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


class GapFilter:
    """The particles of several samples of one plan."""

    def __init__(self, plan: Plan, noise: Noise, progress: Progress) -> None:
        self.plan = plan
        self.noise = noise
        self.progress = progress
        self.model = noise.model
        self.flow = self.model if isinstance(self.model, TarFlowLM) else None
        self.pieces = plan.pieces
        self.gaps = plan.gaps
        self.allowed = plan.allowed
        self.weights = Weights(noise)
        self.log_w = self.weights.log_w.view(-1)
        """The log-weight of every row [B], a view of those of `weights`, to be changed in place."""
        B = len(self.log_w)
        self.tokens = torch.zeros(B, plan.num_tokens, dtype=torch.long, device=self.model.device)
        self.values = self.tokens[..., None].clone()
        if self.flow is not None:
            mean = self.flow.codebook.mean
            self.values = mean.new_zeros(B, plan.num_tokens, mean.shape[1])
        self.lengths = torch.zeros(B, len(self.gaps), dtype=torch.long)
        self.ends = torch.zeros(B, dtype=torch.long)
        self.candidates: Tensor | None = None

    def write(self) -> Generation:
        """The samples, all at once. UserError if no particle of a sample fits."""
        first = self.pieces[0]
        values = self._values_of(first)
        for own, rows in self._groups():
            self.log_w[own] = weight(rows.add(first, values))
        self._append(first, values)
        candidates: list[Tensor] = []
        for index in range(len(self.gaps)):
            candidates = self._fill(index)
        before = self._shares(self.log_w, self.lengths)
        if not self.plan.continues:
            self.allowed = None
        # masks and upper blocks weight the rest of the text, too; else one particle can write it
        masks = self.allowed, self.plan.begins
        is_weighed = any(mask is not None for mask in masks) or self.model.num_blocks > 1
        if is_weighed:
            self._finish()
        if self.flow is not None and self.flow.num_blocks > 1:
            # block 1 was given noise h ~ N(0, I): the blocks above weight it by p(h) / N(h; 0, I)
            prior = self.flow.prior
            h = prior.patch.inverse(prior.block(0)(prior.patch(self.values))[0])
            self.log_w.add_(weight(prior.log_prob(h, above=1) - standard_normal_log_prob(h)))
        after = self._shares(self.log_w, self.lengths)
        if (self.weights.log_w == -torch.inf).all(-1).any():
            # tokens that a limit drops fit in no candidate, however many there are
            steps = [] if self.plan.adjust is None else self.plan.adjust.remedies
            remedy = ", ".join([*steps, "raise the particles", "or loosen the constraint"])
            raise UserError(f"none of {self.noise.particles} candidates fits: {remedy}")
        evidence = self.weights.evidence(self.candidates)
        if is_weighed:
            last = self.weights.evidence()
            evidence = replace(
                evidence,
                ess=torch.minimum(evidence.ess, last.ess),
                pareto_k=torch.fmax(evidence.pareto_k, last.pareto_k),
            )
        self._take(self.weights.pick())
        self.noise = replace(self.noise, particles=1)
        if not is_weighed:
            self._finish()
        # candidates of several lengths advanced by given tokens alone
        self.progress.advance(self.plan.num_tokens)
        posteriors = []
        for gap, all_of, old, new in zip(self.gaps, candidates, before, after, strict=True):
            if gap.least < gap.most and not gap.once:
                # reweight each length by its surviving particles
                share = all_of * torch.where(old > 0, new / old, 1.0)
                posteriors.append(share[:, gap.least :] / share.sum(-1, keepdim=True))
        return Generation(
            self.tokens,
            evidence,
            filled=GapLengths(self._given(), self.ends, tuple(posteriors)),
            latents=() if self.flow is None else (self.values,),
        )

    def _given(self) -> Tensor:
        """Which tokens belong to given pieces, [B, T]."""
        places = torch.arange(self.tokens.shape[1])
        given = torch.zeros(self.tokens.shape, dtype=torch.bool)
        start = torch.zeros(len(given), dtype=torch.long)
        for piece, length in zip(self.pieces, [*self.lengths.T, 0], strict=True):
            end = start + len(piece)
            given |= (start[:, None] <= places) & (places < end[:, None])
            start = end + length
        return given

    def _values_of(self, piece: Tensor) -> Tensor:
        """The values of given tokens [S] in every row, [B, S, C]."""
        tokens = piece.to(self.tokens).expand(len(self.tokens), -1)
        if self.flow is None:
            return tokens[..., None]
        return self.flow.codebook.encode(tokens, self.noise.normal(len(piece)))

    def _append(self, piece: Tensor, values: Tensor) -> None:
        """Write a given piece [S] at the end of every row."""
        rows = torch.arange(len(self.tokens))[:, None]
        places = self.ends[:, None] + torch.arange(len(piece))
        self.tokens[rows, places] = piece.to(self.tokens)
        self.values[rows, places] = values
        self.ends = self.ends + len(piece)
        self.progress.advance(len(piece))

    def _take(self, parents: Tensor) -> None:
        """Replace the rows by copies of `parents`; the caller sets the weights."""
        self.tokens = self.tokens[parents]
        self.values = self.values[parents]
        self.lengths = self.lengths[parents]
        self.ends = self.ends[parents]

    def _groups(self) -> Iterator[tuple[Tensor, Pieces]]:
        """Rows of equal length: their indices, and copies of them that grow."""
        adjust = self.plan.adjust
        for end in self.ends.unique().tolist():
            own = (self.ends == end).nonzero()[:, 0]
            tokens = self.tokens[own, :, None]
            yield own, Pieces(self.model, tokens, self.values[own], end, adjust)

    def _fill(self, index: int) -> list[Tensor]:
        """Fill a gap and write the piece after it: `_shares` of all candidates."""
        gap = self.gaps[index]
        piece = self.pieces[index + 1]
        lengths = torch.arange(gap.least, gap.most + 1)
        span = len(lengths)
        values = self._values_of(piece)
        numbers = self.noise.normal(gap.most), self.noise.draws(gap.most, index=0)
        scores = torch.zeros(len(self.tokens), span, dtype=torch.float64)
        for own, rows in self._groups():
            end = rows.at
            gained = self._draw(own, rows, gap, numbers)
            # the longest first: a piece overwrites only later tokens
            for place in reversed(range(span)):
                rows.at = end + gap.least + place
                score = gained[:, gap.least + place] + weight(rows.add(piece, values[own]))
                if gap.once:
                    # the piece must not end within the gap, unless a word goes on there
                    text = rows.tokens[:, max(0, end - len(piece) + 1) : rows.at, 0].cpu()
                    found = (text.unfold(1, len(piece), 1) == piece).all(-1)[:, :-1]
                    if self.plan.begins is not None:
                        found &= self.plan.begins[text[:, len(piece) :]]
                    score[found.any(1)] = -torch.inf
                scores[own, place] = score
        log_w = self.log_w[:, None] + scores
        self.candidates = log_w.view(len(self.weights.log_w), -1)
        of_each = self.lengths.repeat_interleave(span, 0)
        of_each[:, index] = lengths.repeat(len(self.tokens))
        shares = self._shares(log_w, of_each)
        picked = []
        kept = []
        for b, of_sample in enumerate(self.candidates):
            chosen, new = self.weights.chosen(b, of_sample, self.noise.particles)
            picked.append(chosen + b * len(of_sample))
            kept.append(new)
        order = torch.cat(picked)
        self._take(order // span)
        # first places exclude each other, so their probabilities add up
        self.log_w[:] = torch.cat(kept) + (math.log(span) if gap.once else 0.0)
        self.lengths[:, index] = of_each[order, index]
        self.ends = self.ends + self.lengths[:, index]
        self._append(piece, values[order // span])
        return shares

    def _draw(self, own: Tensor, rows: Pieces, gap: Gap, numbers: tuple[Tensor, Gumbel]) -> Tensor:
        """Fill a gap at its greatest length: log-weights [n, most + 1] after each number of draws.

        `numbers` are noise [B, n, d] and Gumbel numbers. Where the length is fixed, rows may be
        resampled after every draw.
        """
        here = own.to(rows.values.device)
        noise, gumbel = numbers[0][here], numbers[1]
        gained = [torch.zeros(len(own), dtype=torch.float64)]
        for n in range(gap.most):
            mask = self._mask(rows, gap.begins if n == 0 else None)
            gain = weight(rows.draw(gumbel.at(here, n)[:, 0], noise[:, n], mask))
            if mask is None:
                gain = torch.zeros_like(gain)  # up to rounding
            elif gap.least == gap.most:
                self.log_w[own] += gain
                self._even_out(own, rows)
                gain = torch.zeros_like(gain)
            gained.append(gained[-1] + gain)
            if len(own) == len(self.tokens):
                self.progress.advance()
        self.tokens[here] = rows.tokens[..., 0]
        self.values[here] = rows.values
        return torch.stack(gained, 1)

    def _mask(self, rows: Pieces, begins: Tensor | None) -> Tensor | None:
        """The tokens that may be drawn next, [V] or [n, V]."""
        mask = self.allowed
        if mask is not None and not isinstance(mask, Tensor):
            texts = rows.tokens[:, self.plan.lead : rows.at, 0].cpu()
            mask = torch.stack([checked_mask(mask(text), self.model) for text in texts])
        if mask is not None and self.plan.end is not None:
            # tokens after the end belong to another document, which is not shown
            drawn = rows.tokens[:, len(self.pieces[0]) : rows.at, 0]
            mask = mask | (drawn == self.plan.end).any(1, keepdim=True).cpu()
        if begins is not None:
            mask = begins if mask is None else mask & begins
        return None if mask is None else mask.to(rows.tokens.device)

    def _even_out(self, own: Tensor, rows: Pieces) -> None:
        """Resample those rows `own` of a sample whose weights are uneven."""
        order = torch.arange(len(own))
        sample = own // self.noise.particles
        for b in sample.unique().tolist():
            mine = (sample == b).nonzero()[:, 0]
            chosen, kept = self.weights.chosen(b, self.log_w[own[mine]], len(mine))
            order[mine] = mine[chosen]
            self.log_w[own[mine]] = kept
        rows.take(order.to(rows.values.device))
        self.lengths[own] = self.lengths[own[order]]

    def _shares(self, log_w: Tensor, lengths: Tensor) -> list[Tensor]:
        """For each gap the total weight of its lengths, [num, most + 1]; candidates have [C, G]."""
        shares = log_w.view(len(self.weights.log_w), -1).softmax(-1)
        found = []
        for gap, length in zip(self.gaps, lengths.T, strict=True):
            table = shares.new_zeros(len(shares), gap.most + 1)
            found.append(table.scatter_add(1, length.reshape(shares.shape), shares))
        return found

    def _finish(self) -> None:
        """Draw the tokens after the template."""
        num_tokens = self.tokens.shape[1]
        numbers = self.noise.normal(num_tokens), self.noise.draws(num_tokens, index=0)
        for own, rows in self._groups():
            if rows.adjust is not None:
                # only before given text must a document go on
                rows.adjust = copy(rows.adjust)
                rows.adjust.banned = None
            left = num_tokens - rows.at
            rest = Gap(most=left, least=left, begins=self.plan.begins)
            self._draw(own, rows, rest, numbers)
