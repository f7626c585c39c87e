"""A plan becomes tokens, one window of noise after the other (docs/math.md, 7 and 9).

A window is a text of at most the trained context. When it is full, its last half, in whole
positions, becomes the prompt of the next one.
"""

from collections.abc import Generator, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from tarflowlm.data.windows import spans
from tarflowlm.errors import SILENT, Progress
from tarflowlm.flow.numerics import standard_normal_log_prob
from tarflowlm.generation.gaps import GapFilter
from tarflowlm.generation.inversion import Returning, draws_last, stack_inversion
from tarflowlm.generation.particles import Completed, UpperBlocks, Weights, particle_filter
from tarflowlm.generation.plan import Plan, Way
from tarflowlm.generation.rows import Drawn
from tarflowlm.generation.sampling import BLANK, Generation, Meter, Noise, Work, num_leading
from tarflowlm.model import LanguageModel, TarFlowLM
from tarflowlm.processes import threads_for

R = TypeVar("R")
Parts = Generator[Tensor, None, Generation]
"""Yields the next tokens [num, n] of a text, and returns the whole."""


def write(
    model: LanguageModel,
    plans: Sequence[Plan],
    generators: Sequence[torch.Generator],
    progress: Progress = SILENT,
    every: int = 1,
) -> Parts:
    """Write a batch of texts, with a plan and a generator for each; all plans have one `together`.

    The next tokens [num, n] of all samples are yielded as they become final, int64 on the CPU,
    given ones included: at least `every` of them, but for given ones at the start and for the end
    of a window. With particles, gaps, sweeps or inverted noise in block 1 a text comes at the end
    of its window. The generator returns the `Generation`; closing it stops.

    Samples of one particle can end: after the plan's token `end`, every token is `end`.
    """
    steps = _write(model, plans, generators, progress, every)
    while True:
        # between two parts the reader has settings of its own
        with torch.no_grad(), threads_for(len(plans) * plans[0].particles):
            try:
                part = next(steps)
            except StopIteration as end:
                result: Generation = end.value
                return result
        yield part


def _write(
    model: LanguageModel,
    plans: Sequence[Plan],
    generators: Sequence[torch.Generator],
    progress: Progress,
    every: int,
) -> Parts:
    plan = plans[0]
    num, T = len(plans), plan.num_tokens
    noise = Noise(model, generators, plan.particles)
    if plan.way == "gaps":
        result = GapFilter(plan, noise, Meter(progress, num * T, T)).write()
        yield result.tokens.cpu()
        return result
    config = model.config
    tokens = torch.stack([one.given for one in plans])
    shown = num_leading((tokens != BLANK).all(0))
    if shown:
        yield tokens[:, :shown].clone()
    given = int((tokens != BLANK).sum(1).min()) if config.context < T else 0
    bounds = spans(T, config.context, patch=config.patch, given=given)
    positions = sum(-(-(end - start) // config.patch) for start, end in bounds)
    can_end = plan.end is not None and plan.particles == 1
    window = Window(
        model=model,
        plan=plan,
        noise=noise,
        given=tokens,
        progress=Meter(progress, num * T, positions * model.num_blocks),
        every=every,
        ended=torch.zeros(num, dtype=torch.bool) if can_end else None,
    )
    windows: list[Generation] = []
    for start, end in bounds:
        part = replace(window, given=tokens[:, start:end], shown=shown - start)
        windows.append((yield from part.write()))
        tokens[:, start:end] = windows[-1].tokens.cpu()
        shown = end
        after: Way = "inversion" if config.continues_exactly else "filter"
        window = replace(window, plan=replace(plan, way=after, begins=None))
    if len(windows) == 1 and bounds[0] == (0, T):
        return windows[0]
    return Generation(
        tokens.to(windows[0].tokens.device),
        # none if part of the prompt is in no window
        evidence=windows[0].evidence if bounds[0][0] == 0 else None,
        work=tuple(
            Work(work[0].decoder, sum(one.passes for one in work))
            for work in zip(*(one.work for one in windows), strict=True)
        ),
    )


@dataclass
class Window:
    """A text of at most the context, to be written."""

    model: LanguageModel
    plan: Plan
    noise: Noise
    given: Tensor
    """Given tokens, and BLANK elsewhere, [num, T] on the CPU."""
    progress: Progress
    every: int
    """Fewest tokens at once."""
    ended: Tensor | None
    """Samples that ended, [num]."""
    shown: int = 0
    """Yielded tokens."""
    tokens: Tensor = field(init=False)
    """Yielded tokens, then given ones; BLANK elsewhere."""

    def write(self) -> Parts:
        """Tokens for the blanks of `given`."""
        num_tokens = self.given.shape[1]
        self.tokens = self.given.clone()
        whole = F.pad(self.given, (0, -num_tokens % self.model.config.patch), value=BLANK)
        flow = self.model if isinstance(self.model, TarFlowLM) else None
        inverts = self.plan.sampling.decoder == "sweeps"
        if flow is None or (flow.is_language_model and not inverts):
            result = yield from self._drawn(whole)
        elif self.plan.way == "inversion":
            result = yield from self._inverted(flow, whole)
        else:
            result = yield from self._completed(flow, whole)
        if self.shown < num_tokens:
            yield self._next(result.tokens[:, self.shown :])
        latents = result.latents if self.ended is None else ()
        return replace(result, tokens=self.tokens.to(result.tokens.device), latents=latents)

    def _next(self, tokens: Tensor) -> Tensor:
        """The next tokens: `tokens` [num, n], or the given ones. After an end, all are ends."""
        found = self.tokens[:, self.shown : self.shown + tokens.shape[1]]
        is_blank = found == BLANK
        found[:] = torch.where(is_blank, tokens[:, : found.shape[1]].cpu(), found)
        if self.ended is not None and self.plan.end is not None:
            is_over = ((found == self.plan.end) & is_blank).cumsum(1).bool() | self.ended[:, None]
            found.masked_fill_(is_over, self.plan.end)
            self.ended |= is_over[:, -1]
        self.shown += found.shape[1]
        return found.clone()

    def _read(self, steps: Generator[Tensor, None, R]) -> Generator[Tensor, None, R]:
        """Run `steps`, which yield final values of the first positions; yields their tokens."""
        patch = self.model.config.patch
        flow = self.model if isinstance(self.model, TarFlowLM) else None
        # few vectors at a time, for which a table of the codebook would take longest to make
        decode = None if flow is None else flow.codebook.finder()
        returning = Returning(steps)
        for values in returning:
            if values.shape[1] * patch >= self.shown + self.every:
                first = self.shown // patch
                tokens = values[:, first:].flatten(1)
                if flow is not None and decode is not None:
                    tokens = decode(flow.prior.patch.inverse(values[:, first:]))
                yield self._next(tokens[:, self.shown - first * patch :])
        return returning.value

    def _inverted(self, flow: TarFlowLM, given: Tensor) -> Parts:
        """Noise inverted block by block, after the states of a prompt."""
        num_tokens = given.shape[1]
        num = num_leading((given != BLANK).all(0))
        noise = self.noise.normal(num_tokens)
        known: list[Tensor] = []
        evidence = None
        if num:
            z = flow.codebook.encode(given[:, :num].to(noise.device), noise[:, :num])
            known, log_dets = flow.prior.states(z)
            log_p = standard_normal_log_prob(known[-1]) + torch.cat(log_dets, -1).sum(-1)
            weights = Weights(self.noise)
            weights.add(log_p - flow.codebook.log_normaliser(z).sum(-1))
            evidence = weights.evidence()
            noise = torch.cat((known[-1], noise[:, num:]), 1)
        decoder = self.plan.sampling.decoder
        gumbel = self.noise.draws(num_tokens) if draws_last(flow, decoder) else None
        steps = stack_inversion(
            flow,
            noise,
            decoder=decoder,
            adjust=self.plan.adjust,
            known=known,
            gumbel=gumbel,
            ended=self.ended,
            progress=self.progress,
        )
        states, work = yield from self._read(steps)
        tokens = flow.codebook.decode(states[-1])
        latents = tuple(states if gumbel is None else states[-1:])
        return Generation(tokens, evidence, tuple(work), latents=latents)

    def _completed(self, flow: TarFlowLM, given: Tensor) -> Parts:
        """A particle filter through block 1 (docs/math.md, 9)."""
        num_tokens = given.shape[1]
        spread = given.repeat_interleave(self.plan.particles, 0)
        is_known = spread != BLANK
        decoder, adjust = self.plan.sampling.decoder, self.plan.adjust
        draws = draws_last(flow, decoder)
        source = UpperBlocks(self.noise, is_known, decoder, draws, adjust, self.progress)
        eps = self.noise.normal(num_tokens)
        known = flow.codebook.encode(spread.clamp_min(0).to(eps.device), eps)
        gumbel = self.noise.draws(num_tokens) if draws and source.single else None
        rows = Completed(flow, source.draw, known, is_known, adjust, gumbel)
        rows.ended = self.ended
        steps = particle_filter(rows, self.noise, self.progress, source)
        weights = yield from self._read(steps)
        weights.add(source.log_factor(flow.prior.patch.inverse(rows.noise)))
        z = flow.prior.patch.inverse(rows.values)[weights.pick()]
        own = Work("steps" if gumbel is None else "draw", rows.passes)
        tokens = flow.codebook.decode(z)
        return Generation(tokens, weights.evidence(), (*source.work, own), latents=(z,))

    def _drawn(self, given: Tensor) -> Parts:
        """Tokens drawn from weights; given ones are kept."""
        plan = self.plan
        spread = given.repeat_interleave(plan.particles, 0)
        noise = self.noise.normal(given.shape[1])
        gumbel = self.noise.draws(given.shape[1])
        rows = Drawn(self.model, 0, noise, gumbel, spread, plan.adjust)
        rows.ended = self.ended
        rows.begins = plan.begins
        weights = yield from self._read(particle_filter(rows, self.noise, self.progress))
        evidence = weights.evidence() if (given != BLANK).any() else None
        found = rows.values[weights.pick(), : rows.num_positions]
        if not isinstance(self.model, TarFlowLM):
            return Generation(found.flatten(1), evidence)
        z = self.model.prior.patch.inverse(found)
        work = (Work("draw", rows.passes),)
        return Generation(self.model.codebook.decode(z), evidence, work, latents=(z,))
