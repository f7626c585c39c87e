"""Gaps of unknown length and constrained tokens: particles over texts of several lengths.

A particle is a text up to the end of a given piece. It fills the next gap at its greatest length,
and is a candidate for every length. The probability of the given piece after its tokens and the
masks of its draws weight a candidate. R of all candidates are kept (docs/math.md, eq. 23).

Shape legend: R particles, B = num R rows, T tokens, S tokens of a piece, G gaps, V symbols.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from copy import copy
from dataclasses import replace

import torch
from torch import Tensor

from tarflowlm.data.prompts import Gap
from tarflowlm.errors import Progress, UserError
from tarflowlm.flow.numerics import standard_normal_log_prob
from tarflowlm.generation.particles import Weights, weight
from tarflowlm.generation.pieces import Pieces
from tarflowlm.generation.plan import Plan
from tarflowlm.generation.rules import Enough, Rules
from tarflowlm.generation.sampling import GapLengths, Generation, Gumbel, Noise
from tarflowlm.model import TarFlowLM

EVERY = 8
"""Look every 8 tokens whether all texts are over."""


class GapFilter:
    """The particles of several samples of one plan.

    Words that a text must contain are the pieces after the gaps that have them `once`; each of
    these gaps is a candidate for each word that is left.
    """

    def __init__(self, plan: Plan, noise: Noise, progress: Progress) -> None:
        self.plan = plan
        self.noise = noise
        self.progress = progress
        self.model = noise.model
        self.flow = self.model if isinstance(self.model, TarFlowLM) else None
        self.pieces = plan.pieces
        self.gaps = plan.gaps
        self.allowed = plan.allowed
        self.rules = Rules(plan.rules, plan.end) if plan.rules else None
        self.sizes = torch.tensor(list(map(len, self.pieces)))
        self.weights = Weights(noise)
        self.log_w = self.weights.log_w.view(-1)
        """The log-weight of every row [B], a view of those of `weights`, to be changed in place."""
        B = len(self.log_w)
        self.tokens = torch.zeros(B, plan.num_tokens, dtype=torch.long, device=self.model.device)
        self.values = self.tokens[..., None].clone()
        if self.flow is not None:
            mean = self.flow.codebook.mean
            self.values = mean.new_zeros(B, plan.num_tokens, mean.shape[1])
        self.order = torch.arange(len(self.pieces)).repeat(B, 1)
        """Which piece stands where in a row, [B, G + 1]."""
        self.lengths = torch.zeros(B, len(self.gaps), dtype=torch.long)
        """Tokens in the gap after each of them, [B, G]."""
        self.written = 0
        """Pieces that are written."""
        self.ends = torch.zeros(B, dtype=torch.long)
        self.candidates: Tensor | None = None

    def write(self) -> Generation:
        """The samples, all at once. UserError if no particle of a sample fits."""
        first = self.pieces[0]
        values = self._values_of(first)
        for own, rows in self._groups():
            self.log_w[own] = weight(rows.add(first, values))
        self._append({0: values})
        candidates: list[Tensor] = []
        for index in range(len(self.gaps)):
            candidates = self._fill(index)
        before = self._shares(self.log_w, self.lengths)
        if not self.plan.continues:
            self.allowed = self.rules = None
        # masks and upper blocks weight the rest of the text, too; else one particle can write it
        masks = self.allowed, self.rules, self.plan.begins
        is_weighed = any(mask is not None for mask in masks) or self.model.num_blocks > 1
        if is_weighed:
            self._finish()
        if self.rules is not None:
            lead = self.plan.lead
            lengths, fits = self.rules.whole(self.tokens[:, lead:].cpu(), self._given()[:, lead:])
            self.ends = lead + lengths
            self.log_w[~fits] = -torch.inf
        if self.flow is not None and self.flow.num_blocks > 1:
            # block 1 was given noise h ~ N(0, I): the blocks above weight it by p(h) / N(h; 0, I)
            prior = self.flow.prior
            h = prior.patch.inverse(prior.block(0)(prior.patch(self.values))[0])
            self.log_w.add_(weight(prior.log_prob(h, above=1) - standard_normal_log_prob(h)))
        after = self._shares(self.log_w, self.lengths)
        is_last = self.noise.particles == self.plan.most_particles
        if is_last and (self.weights.log_w == -torch.inf).all(-1).any():
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
        sizes = self.sizes[self.order].T[: self.written]
        for size, length in zip(sizes, [*self.lengths.T, 0], strict=False):
            given |= (start[:, None] <= places) & (places < (start + size)[:, None])
            start = start + size + length
        return given

    def _values_of(self, piece: Tensor) -> Tensor:
        """The values of given tokens [S] in every row, [B, S, C]."""
        tokens = piece.to(self.tokens).expand(len(self.tokens), -1)
        if self.flow is None:
            return tokens[..., None]
        return self.flow.codebook.encode(tokens, self.noise.normal(len(piece)))

    def _append(self, values: Mapping[int, Tensor]) -> None:
        """Write the next piece of every row at its end; `values` [B, S, C] are those of each."""
        which = self.order[:, self.written]
        for index, of_piece in values.items():
            rows = (which == index).nonzero()
            places = self.ends[rows] + torch.arange(len(self.pieces[index]))
            self.tokens[rows, places] = self.pieces[index].to(self.tokens)
            self.values[rows, places] = of_piece[rows[:, 0]]
        self.ends = self.ends + self.sizes[which]
        self.written += 1
        self.progress.advance(int(self.sizes[which].min()))

    def _take(self, parents: Tensor) -> None:
        """Replace the rows by copies of `parents`; the caller sets the weights."""
        self.tokens = self.tokens[parents]
        self.values = self.values[parents]
        self.order = self.order[parents]
        self.lengths = self.lengths[parents]
        self.ends = self.ends[parents]

    def _groups(self) -> Iterator[tuple[Tensor, Pieces]]:
        """Rows of equal length: their indices, and copies of them that grow."""
        adjust, within = self.plan.adjust, self.plan.within
        for end in self.ends.unique().tolist():
            own = (self.ends == end).nonzero()[:, 0]
            tokens = self.tokens[own, :, None]
            yield own, Pieces(self.model, tokens, self.values[own], end, adjust, within)

    def _fill(self, index: int) -> list[Tensor]:
        """Fill a gap and write the piece after it: `_shares` of all candidates."""
        gap = self.gaps[index]
        choices = [index + 1]
        if gap.once:
            choices = [place for place, one in enumerate(self.gaps, 1) if one.once]
        pieces = [self.pieces[choice] for choice in choices]
        lengths = torch.arange(gap.least, gap.most + 1)
        span = len(lengths)
        values = {choice: self._values_of(self.pieces[choice]) for choice in choices}
        numbers = self.noise.normal(gap.most), self.noise.draws(gap.most, index=0)
        written = self.order[:, : self.written, None]
        is_left = (written != torch.tensor(choices)).all(1)
        # words share their room
        needed = (is_left * self.sizes[choices]).sum(1)
        room = self.tokens.shape[1] - self.ends - needed if gap.once else self.ends + gap.most
        scores = torch.full((len(self.tokens), len(choices), span), -torch.inf).double()
        for own, rows in self._groups():
            end = rows.at
            most = min(gap.most, int(room[own].max()))
            gained = self._draw(own, rows, replace(gap, most=most), numbers)
            # the longest first: a piece overwrites only later tokens
            for length in reversed(range(gap.least, most + 1)):
                for place, (choice, piece) in enumerate(zip(choices, pieces, strict=True)):
                    rows.at = end + length
                    has_room = rows.at + len(piece) <= self.tokens.shape[1]
                    if not has_room or not is_left[own, place].any():
                        continue
                    score = gained[:, length] + weight(rows.add(piece, values[choice][own]))
                    if gap.once:
                        fits = is_left[own, place] & (length <= room[own])
                        score[~fits | self._occurs(rows, end, pieces, is_left[own])] = -torch.inf
                    if self.rules is not None:
                        texts, is_given = self._shown(own, rows)
                        is_given[:, texts.shape[1] - len(piece) :] = True
                        score[~self.rules.go_on(texts, is_given)] = -torch.inf
                    scores[own, place, length - gap.least] = score
        log_w = self.log_w[:, None] + scores.flatten(1)
        self.candidates = log_w.view(len(self.weights.log_w), -1)
        of_each = self.lengths.repeat_interleave(scores[0].numel(), 0)
        of_each[:, index] = lengths.repeat(len(self.tokens) * len(choices))
        shares = self._shares(log_w, of_each)
        picked = []
        kept = []
        for b, of_sample in enumerate(self.candidates):
            chosen, new = self.weights.chosen(b, of_sample, self.noise.particles)
            picked.append(chosen + b * len(of_sample))
            kept.append(new)
        order = torch.cat(picked)
        parents = order // scores[0].numel()
        self._take(parents)
        # first places exclude each other, so their probabilities add up
        self.log_w[:] = torch.cat(kept) + (math.log(scores[0].numel()) if gap.once else 0.0)
        self.lengths[:, index] = of_each[order, index]
        self.order[:, index + 1] = torch.tensor(choices)[order % scores[0].numel() // span]
        self.ends = self.ends + self.lengths[:, index]
        self._append({choice: one[parents] for choice, one in values.items()})
        return shares

    def _occurs(self, rows: Pieces, end: int, words: Sequence[Tensor], is_left: Tensor) -> Tensor:
        """Whether one of the words that are left ends behind `end`, but before the end, [n].

        A longer word that goes on there is another word.
        """
        found = torch.zeros(len(rows.tokens), dtype=torch.bool)
        for word, left in zip(words, is_left.T, strict=True):
            text = rows.tokens[:, max(0, end - len(word) + 1) : rows.at, 0].cpu()
            if text.shape[1] < len(word):
                continue
            at = (text.unfold(1, len(word), 1) == word).all(-1)[:, :-1]
            if self.plan.begins is not None:
                at &= self.plan.begins[text[:, len(word) :]]
            found |= at.any(1) & left
        return found

    def _shown(self, own: Tensor, rows: Pieces) -> tuple[Tensor, Tensor]:
        """Texts [n, t] so far without hidden context, on the CPU, and which tokens are given."""
        shown = slice(self.plan.lead, rows.at)
        return rows.tokens[:, shown, 0].cpu(), self._given()[own, shown]

    def _draw(
        self,
        own: Tensor,
        rows: Pieces,
        gap: Gap,
        numbers: tuple[Tensor, Gumbel],
        *,
        may_end: bool = False,
    ) -> Tensor:
        """Fill a gap at its greatest length: log-weights [n, most + 1] after each number of draws.

        `numbers` are noise [B, n, d] and Gumbel numbers. Where the length is fixed, rows may be
        resampled after every draw. It `may_end` once all texts are over by a rule.
        """
        here = own.to(rows.values.device)
        noise, gumbel = numbers[0][here], numbers[1]
        gained = [torch.zeros(len(own), dtype=torch.float64)]
        rules = self.rules if may_end else None
        for n in range(gap.most):
            if (
                rules is not None
                and n % EVERY == 0
                and rules.are_over(*self._shown(own, rows)).all()
            ):
                break
            mask = self._mask(own, rows, gap.begins if n == 0 else None)
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

    def _mask(self, own: Tensor, rows: Pieces, begins: Tensor | None) -> Tensor | None:
        """The tokens that may be drawn next, [V] or [n, V]."""
        mask = self.allowed
        if mask is not None and self.plan.end is not None:
            # tokens after the end belong to another document, which is not shown
            drawn = rows.tokens[:, len(self.pieces[0]) : rows.at, 0]
            mask = mask | (drawn == self.plan.end).any(1, keepdim=True).cpu()
        if self.rules is not None:
            found = self.rules.mask(*self._shown(own, rows))
            mask = found if mask is None else mask & found
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
        self.order[own] = self.order[own[order]]

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
            if rows.adjust is not None and not any(isinstance(x, Enough) for x in self.plan.rules):
                # only before given text, and for more of it, must a document go on
                rows.adjust = copy(rows.adjust)
                rows.adjust.banned = None
            left = num_tokens - rows.at
            rest = Gap(most=left, least=left, begins=self.plan.begins)
            # the blocks above read the whole text
            self._draw(own, rows, rest, numbers, may_end=self.model.num_blocks == 1)
