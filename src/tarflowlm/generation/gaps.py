"""Gaps of unknown length and constrained tokens: particles over texts of several lengths.

A particle is a text up to the end of a given piece. It fills the next gap at its greatest length,
and is a candidate for every length. The probability of the given piece after its tokens and the
masks of its draws weight a candidate. R of all candidates are kept (docs/math.md, eq. 23).

Shape legend: R particles, B = num R rows, T tokens, S tokens of a piece, G gaps, V symbols.
"""

import math
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from tarflowlm.data.prompts import Gap
from tarflowlm.errors import Progress, UserError
from tarflowlm.flow.numerics import standard_normal_log_prob
from tarflowlm.generation.particles import Weights, weight
from tarflowlm.generation.plan import Plan, checked_mask
from tarflowlm.generation.rows import Pieces
from tarflowlm.generation.sampling import GapLengths, Generation, Noise
from tarflowlm.model import TarFlowLM


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
        B = self.weights.log_w.numel()
        self.tokens = torch.zeros(B, plan.num_tokens, dtype=torch.long, device=self.model.device)
        self.values = self.tokens.clone()
        self.width = 0
        """Channels of a token; none for the baseline."""
        if self.flow is not None:
            mean = self.flow.codebook.mean
            self.width = mean.shape[1]
            self.values = mean.new_zeros(B, plan.num_tokens, self.width)
        self.lengths = torch.zeros(B, len(self.gaps), dtype=torch.long)
        self.ends = torch.zeros(B, dtype=torch.long)
        self.candidates: Tensor | None = None

    @property
    def log_w(self) -> Tensor:
        """The log-weight of every row [B], to be changed in place."""
        return self.weights.log_w.view(-1)

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
        is_weighed = self.allowed is not None or self.model.num_blocks > 1
        if is_weighed:
            self._finish()
        if self.flow is not None and self.flow.num_blocks > 1:
            # block 1 was given noise h ~ N(0, I): the blocks above weight it by p(h) / N(h; 0, I)
            prior = self.flow.prior
            h = prior.patch.inverse(prior.block(0)(prior.patch(self.values))[0])
            self.log_w.add_(weight(prior.log_prob(h, above=1) - standard_normal_log_prob(h)))
        after = self._shares(self.log_w, self.lengths)
        if (self.weights.log_w == -torch.inf).all(-1).any():
            what = f"none of {self.noise.particles} candidates fits"
            raise UserError(f"{what}: raise the particles, or loosen the constraint")
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
        """The inputs of block 1 for given tokens [S], by row: latents [B, S, d], or the tokens."""
        tokens = piece.to(self.tokens).expand(len(self.tokens), -1)
        if self.flow is None:
            return tokens
        return self.flow.codebook.encode(tokens, self.noise.normal(len(piece), self.width))

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
            yield own, Pieces(self.model, self.tokens[own], self.values[own], end, adjust)

    def _fill(self, index: int) -> list[Tensor]:
        """Fill a gap and write the piece after it: `_shares` of all candidates."""
        gap = self.gaps[index]
        piece = self.pieces[index + 1]
        lengths = torch.arange(gap.least, gap.most + 1)
        span = len(lengths)
        values = self._values_of(piece)
        numbers = self.noise.uniform(gap.most), self.noise.normal(gap.most, self.width)
        scores = torch.zeros(len(self.tokens), span, dtype=torch.float64)
        for own, rows in self._groups():
            end = rows.at
            gained = self._draw(own, rows, gap, numbers)
            # the longest first: a piece overwrites only later tokens
            for place in reversed(range(span)):
                rows.at = end + gap.least + place
                score = gained[:, gap.least + place] + weight(rows.add(piece, values[own]))
                if gap.once:
                    score[rows.holds_twice(piece)] = -torch.inf
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

    def _draw(self, own: Tensor, rows: Pieces, gap: Gap, numbers: tuple[Tensor, Tensor]) -> Tensor:
        """Fill a gap at its greatest length: log-weights [n, most + 1] after each number of draws.

        Where the length is fixed, rows may be resampled after every draw.
        """
        uniform, noise = (part[own] for part in numbers)
        gained = [torch.zeros(len(own), dtype=torch.float64)]
        for n in range(gap.most):
            mask = self._mask(rows, gap.begins if n == 0 else None)
            gain = weight(rows.draw(uniform[:, n], noise[:, n], mask))
            if mask is None:
                gain = torch.zeros_like(gain)  # up to rounding
            elif gap.least == gap.most:
                self.log_w[own] += gain
                self._even_out(own, rows)
                gain = torch.zeros_like(gain)
            gained.append(gained[-1] + gain)
            if len(own) == len(self.tokens):
                self.progress.advance()
        self.tokens[own] = rows.tokens
        self.values[own] = rows.values
        return torch.stack(gained, 1)

    def _mask(self, rows: Pieces, begins: Tensor | None) -> Tensor | None:
        """The tokens that may be drawn next, [V] or [n, V]."""
        mask = self.allowed
        if mask is not None and not isinstance(mask, Tensor):
            texts = rows.tokens[:, self.plan.lead : rows.at].cpu()
            mask = torch.stack([checked_mask(mask(text), self.model) for text in texts])
        if mask is not None and self.plan.end is not None:
            # tokens after the end belong to another document, which is not shown
            drawn = rows.tokens[:, len(self.pieces[0]) : rows.at]
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
        rows.select(order)
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
        numbers = self.noise.uniform(num_tokens), self.noise.normal(num_tokens, self.width)
        for own, rows in self._groups():
            left = num_tokens - rows.at
            self._draw(own, rows, Gap(most=left, least=left), numbers)
