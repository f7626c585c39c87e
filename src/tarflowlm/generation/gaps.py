"""Gaps of unknown length and constrained tokens: particles over texts of several lengths.

A particle is a text up to the end of a given piece. It fills the next gap at its greatest length,
and is a candidate for every length. The probability of the given piece after its tokens and the
masks of its draws weight a candidate. R of all candidates are kept (docs/math.md, eq. 23).

Shape legend: R particles, B = num R rows, T tokens, S tokens of a piece, G gaps, V symbols.
"""

import math
from collections.abc import Mapping, Sequence
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
        self.log_w[:] = weight(self._rows().add(first, values))
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

    def _rows(self) -> Pieces:
        """Copies of all texts, which grow from where the shortest one ends."""
        tokens, values = self.tokens[..., None].clone(), self.values.clone()
        start = int(self.ends.min())
        return Pieces(self.model, tokens, values, start, self.plan.adjust, self.plan.within)

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
        rows = self._rows()
        start = rows.at
        if span > 1 and all(map(len, pieces)):
            # a draw tells how probable the first token of a piece is in its place
            rows.await_tokens(
                [piece[0] for piece in pieces], [one[:, 0] for one in values.values()]
            )
        gained = self._draw(rows, gap, numbers)
        drawn = start + torch.arange(gained.shape[1]) - self.ends[:, None]
        can = (gap.least <= drawn) & (drawn <= gap.most)
        if gap.once:
            # words share their room
            needed = (is_left * self.sizes[choices]).sum(1)
            can &= drawn <= (self.tokens.shape[1] - self.ends - needed)[:, None]
        scores = gained.new_full((len(can), len(choices), can.shape[1]), -torch.inf)
        # the last place first: a piece overwrites only later tokens
        for n in reversed(range(can.shape[1])):
            for place, (choice, piece) in enumerate(zip(choices, pieces, strict=True)):
                rows.at = start + n
                fits = can[:, n] & is_left[:, place]
                if rows.at + len(piece) > self.tokens.shape[1] or not fits.any():
                    continue
                known = int(n < len(rows.chances))
                score = gained[:, n] + weight(rows.add(piece, values[choice], known))
                if known:
                    score += weight(rows.chances[n][:, place])
                if gap.once:
                    fits &= ~self._occurs(rows, pieces, is_left)
                if self.rules is not None:
                    texts, is_given = self._shown(rows, fits)
                    is_given[:, texts.shape[1] - len(piece) :] = True
                    fits[fits.clone()] = self.rules.go_on(texts, is_given)
                scores[fits, place, n] = score[fits]
        # by the length of the gap
        behind = self.ends[:, None] - start + lengths
        is_short = behind < can.shape[1]
        found = scores.gather(2, (behind * is_short)[:, None].expand(-1, len(choices), -1))
        found = found.masked_fill(~is_short[:, None], -torch.inf)
        log_w = self.log_w[:, None] + found.flatten(1)
        self.candidates = log_w.view(len(self.weights.log_w), -1)
        of_each = self.lengths.repeat_interleave(found[0].numel(), 0)
        of_each[:, index] = lengths.repeat(len(self.tokens) * len(choices))
        shares = self._shares(log_w, of_each)
        picked = []
        kept = []
        for b, of_sample in enumerate(self.candidates):
            chosen, new = self.weights.chosen(b, of_sample, self.noise.particles)
            picked.append(chosen + b * len(of_sample))
            kept.append(new)
        order = torch.cat(picked)
        parents = order // found[0].numel()
        self._take(parents)
        # first places exclude each other, so their probabilities add up
        self.log_w[:] = torch.cat(kept) + (math.log(found[0].numel()) if gap.once else 0.0)
        self.lengths[:, index] = of_each[order, index]
        self.order[:, index + 1] = torch.tensor(choices)[order % found[0].numel() // span]
        self.ends = self.ends + self.lengths[:, index]
        self._append({choice: one[parents] for choice, one in values.items()})
        return shares

    def _occurs(self, rows: Pieces, words: Sequence[Tensor], is_left: Tensor) -> Tensor:
        """Whether a word that is left ends in the gap or in the piece, but before its end, [B].

        A longer word that goes on there is another word.
        """
        found = torch.zeros(len(is_left), dtype=torch.bool)
        for word, left in zip(words, is_left.T, strict=True):
            start = max(0, int(self.ends.min()) - len(word) + 1)
            text = rows.tokens[:, start : rows.at, 0].cpu()
            if text.shape[1] < len(word):
                continue
            at = (text.unfold(1, len(word), 1) == word).all(-1)[:, :-1] & left[:, None]
            if self.plan.begins is not None:
                at &= self.plan.begins[text[:, len(word) :]]
            ends = start + len(word) + torch.arange(at.shape[1])
            found |= (at & (ends > self.ends[:, None])).any(1)
        return found

    def _shown(self, rows: Pieces, own: Tensor) -> tuple[Tensor, Tensor]:
        """Texts [n, t] so far of the rows `own` [B], without hidden context, on the CPU, and which
        of their tokens are given.
        """
        shown = slice(self.plan.lead, rows.at)
        return rows.tokens[:, shown, 0].cpu()[own], self._given()[:, shown][own]

    def _draw(
        self, rows: Pieces, gap: Gap, numbers: tuple[Tensor, Gumbel], *, may_end: bool = False
    ) -> Tensor:
        """Fill a gap at its greatest length: log-weights [B, n + 1] at each place from `rows.at`.

        `numbers` are noise [B, most, d] and Gumbel numbers. Where the length is fixed, rows may be
        resampled after every draw. It `may_end` once all texts are over by a rule.
        """
        noise, gumbel = numbers
        every = torch.arange(len(self.tokens), device=noise.device)
        ends = self.ends.to(noise.device)
        is_fixed = gap.least == gap.most
        rules = self.rules if may_end else None
        gained = [torch.zeros(len(every), dtype=torch.float64)]
        most = min(self.tokens.shape[1], int(self.ends.max()) + gap.most)
        for place in range(rows.at, most):
            drawn = place - self.ends
            # the texts that are longer wait for the others, and so do those whose gap is full
            is_open = (drawn >= 0) & (drawn < gap.most)
            if rules is not None and (place - most) % EVERY == 0:
                texts = self._shown(rows, torch.ones_like(is_open))
                if rules.are_over(*texts).all():
                    break
            begins = None if gap.begins is None or (drawn != 0).all() else (drawn == 0, gap.begins)
            mask = self._mask(rows, is_open, begins)
            n = (place - ends).clamp(0, gap.most - 1)
            waits = None if is_open.all() else (place < ends) | (place >= ends + gap.most)
            here = None if mask is None else mask.to(noise.device)
            gain = weight(rows.draw(gumbel.at(every, n)[:, 0], noise[every, n], here, waits))
            # up to rounding it is 0 where all tokens may come
            is_weighed = torch.zeros_like(is_open) if mask is None else is_open & ~mask.all(-1)
            gain = torch.where(is_weighed, gain, 0.0)
            if is_fixed and is_weighed.any():
                self.log_w.add_(gain)
                if self._even_out(rows, is_open, is_weighed):
                    ends = self.ends.to(noise.device)
                gain = torch.zeros_like(gain)
            gained.append(gained[-1] + gain)
            if waits is None:
                self.progress.advance()
        self.tokens = rows.tokens[..., 0].clone()
        self.values = rows.values.clone()
        return torch.stack(gained, 1)

    def _mask(
        self, rows: Pieces, is_open: Tensor, begins: tuple[Tensor, Tensor] | None
    ) -> Tensor | None:
        """The tokens that may be drawn next, [V] or [B, V]; `begins` are of some rows [B]."""
        mask = self.allowed
        if mask is not None and self.plan.end is not None:
            # tokens after the end belong to another document, which is not shown
            drawn = rows.tokens[:, len(self.pieces[0]) : rows.at, 0]
            mask = mask | (drawn == self.plan.end).any(1, keepdim=True).cpu()
        if self.rules is not None:
            found = self.rules.mask(*self._shown(rows, is_open))
            every = found.new_ones(len(is_open), found.shape[1])
            every[is_open] = found
            mask = every if mask is None else mask & every
        if begins is not None:
            is_first, tokens = begins
            found = tokens | ~is_first[:, None]
            mask = found if mask is None else mask & found
        return mask

    def _even_out(self, rows: Pieces, is_open: Tensor, is_weighed: Tensor) -> bool:
        """Resample the open rows of each sample with new weights where they are uneven.

        Whether any row has changed.
        """
        order = torch.arange(len(is_open))
        sample = order // self.noise.particles
        for b in sample[is_weighed].unique().tolist():
            mine = (is_open & (sample == b)).nonzero()[:, 0]
            chosen, kept = self.weights.chosen(b, self.log_w[mine], len(mine))
            order[mine] = mine[chosen]
            self.log_w[mine] = kept
        if (order == torch.arange(len(order))).all():
            return False
        rows.take(order.to(rows.values.device))
        self.lengths, self.order = self.lengths[order], self.order[order]
        self.ends = self.ends[order]
        return True

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
        rows = self._rows()
        if rows.adjust is not None and not any(isinstance(x, Enough) for x in self.plan.rules):
            # only before given text, and for more of it, must a document go on
            rows.adjust = copy(rows.adjust)
            rows.adjust.banned = None
        rest = Gap(most=num_tokens, least=num_tokens, begins=self.plan.begins)
        # the blocks above read the whole text
        self._draw(rows, rest, numbers, may_end=self.model.num_blocks == 1)
