"""A plan becomes tokens, one window of noise after the other (docs/math.md, 7 and 9).

A window is a text of at most the trained context. When it is full, its last half (in whole
positions) becomes the prompt of the next one; everything before is forgotten.
"""

from collections.abc import Generator, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from tarflowlm.baseline import TokenLM
from tarflowlm.data.windows import spans
from tarflowlm.errors import SILENT, Progress
from tarflowlm.flow.numerics import standard_normal_log_prob
from tarflowlm.generation.gaps import GapFilter
from tarflowlm.generation.inversion import Returning, draws_last, stack_inversion
from tarflowlm.generation.particles import UpperBlocks, Weights, particle_filter
from tarflowlm.generation.plan import Plan, Way
from tarflowlm.generation.rows import LatentPositions, TokenPositions
from tarflowlm.generation.sampling import BLANK, Generation, Meter, Noise, Work, num_leading
from tarflowlm.model import LanguageModel, TarFlowLM, as_flow
from tarflowlm.processes import keep_freed_memory, threads_for

R = TypeVar("R")
Parts = Generator[Tensor, None, Generation]
"""Writes a text: yields its next tokens [num, n], each once, and returns the whole."""


def write(
    model: LanguageModel,
    plans: Sequence[Plan],
    generators: Sequence[torch.Generator],
    progress: Progress = SILENT,
    every: int = 1,
) -> Parts:
    """Write a batch of texts, with a plan and a generator for each; all plans have one `together`.

    The next tokens [num, n] of all samples are yielded as they become final, int64 on the CPU,
    given tokens included: at least `every` of them, except for given tokens at the start and the
    end of a window. With particles, and where block 1 is inverted by sweeps, a text comes at the
    end of its window. The generator returns the `Generation`; to stop a text, close it.

    Samples of one particle can end: after the token `end` of the plan, every token is `end`. Once a
    quarter of the samples have ended, block 1 leaves them out.
    """
    keep_freed_memory()
    steps = _write(model, plans, generators, progress, every)
    while True:
        # between two parts, the reader has its own settings of PyTorch
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
    # tokens that are given at the start of all samples are known before these are written
    shown = num_leading((tokens != BLANK).all(0))
    if shown:
        yield tokens[:, :shown].clone()
    # a text of one window needs no prompt in it
    given = int((tokens != BLANK).sum(1).min()) if config.context < T else 0
    bounds = spans(T, config.context, patch=config.patch, given=given)
    positions = sum(-(-(end - start) // config.patch) for start, end in bounds)
    # several particles are final only at the end of the text
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
        # every further window has a prompt of whole positions
        after: Way = "inversion" if config.continues_exactly else "filter"
        window = replace(window, plan=replace(plan, way=after))
    if len(windows) == 1 and bounds[0] == (0, T):
        return windows[0]
    return Generation(
        tokens.to(windows[0].tokens.device),
        # no evidence if part of the prompt is in no window
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
    """The given tokens, BLANK elsewhere, [num, T] on the CPU."""
    progress: Progress
    every: int
    """Fewest tokens that are yielded at once, except at the end."""
    ended: Tensor | None
    """The samples that have ended, [num]."""
    shown: int = 0
    """Number of tokens that have been yielded."""
    tokens: Tensor = field(init=False)
    """The tokens that have been yielded, then the given ones, with BLANK elsewhere."""

    def write(self) -> Parts:
        """Tokens for the blanks of `given`."""
        num_tokens = self.given.shape[1]
        self.tokens = self.given.clone()
        whole = F.pad(self.given, (0, -num_tokens % self.model.config.patch), value=BLANK)
        if isinstance(self.model, TokenLM):
            result = yield from self._from_baseline(self.model, whole)
        elif self.plan.way == "inversion":
            result = yield from self._inverted(as_flow(self.model), whole)
        else:
            result = yield from self._completed(as_flow(self.model), whole)
        if self.shown < num_tokens:
            yield self._next(result.tokens[:, self.shown :])
        # samples that have ended have no latents
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
        returning = Returning(steps)
        for values in returning:
            if values.shape[1] * patch >= self.shown + self.every:
                first = self.shown // patch
                tokens = values[:, first:].flatten(1)
                if isinstance(self.model, TarFlowLM):
                    z = self.model.prior.patch.inverse(values[:, first:])
                    tokens = self.model.codebook.decode(z)
                yield self._next(tokens[:, self.shown - first * patch :])
        return returning.value

    def _inverted(self, flow: TarFlowLM, given: Tensor) -> Parts:
        """Noise inverted block by block, after the known states of a prompt."""
        num_tokens = given.shape[1]
        num = num_leading((given != BLANK).all(0))
        noise = self.noise.normal(num_tokens, flow.config.latent_dim)
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
        draws = draws_last(flow, self.plan.decoder)
        steps = stack_inversion(
            flow,
            noise,
            decoder=self.plan.decoder,
            adjust=self.plan.adjust,
            known=known,
            uniform=self.noise.draws(num_tokens) if draws else None,
            ended=self.ended,
            progress=self.progress,
        )
        states, work = yield from self._read(steps)
        tokens = flow.codebook.decode(states[-1])
        latents = tuple(states[-1:] if draws else states)
        return Generation(tokens, evidence, tuple(work), latents=latents)

    def _completed(self, flow: TarFlowLM, given: Tensor) -> Parts:
        """A particle filter through block 1 (docs/math.md, section 9)."""
        num_tokens = given.shape[1]
        spread = given.repeat_interleave(self.plan.particles, dim=0)
        is_known = spread != BLANK
        draws = draws_last(flow, self.plan.decoder)
        adjust = self.plan.adjust
        source = UpperBlocks(self.noise, is_known, self.plan.decoder, draws, adjust, self.progress)
        eps = self.noise.normal(num_tokens, flow.config.latent_dim)
        known = flow.codebook.encode(spread.clamp_min(0).to(eps.device), eps)
        uniform = self.noise.draws(num_tokens) if draws and source.single else None
        rows = LatentPositions(flow, source.draw, known, is_known, adjust, uniform)
        rows.ended = self.ended
        steps = particle_filter(rows, self.noise, source.redraw, self.progress)
        weights = yield from self._read(steps)
        weights.add(source.log_factor(flow.prior.patch.inverse(rows.noise)))
        z = flow.prior.patch.inverse(rows.values)[weights.pick()]
        own = Work("steps" if uniform is None else "draw", rows.num_positions)
        tokens = flow.codebook.decode(z)
        return Generation(tokens, weights.evidence(), (*source.work, own), latents=(z,))

    def _from_baseline(self, model: TokenLM, given: Tensor) -> Parts:
        num_tokens = given.shape[1]
        spread = given.repeat_interleave(self.plan.particles, dim=0)
        uniform = self.noise.uniform(num_tokens)
        rows = TokenPositions(model, uniform, spread, spread != BLANK, self.plan.adjust)
        rows.ended = self.ended

        def redraw(samples: list[int], own: Tensor, parents: Tensor, at: int) -> Tensor:
            return self.noise.of(samples).uniform(num_tokens)

        steps = particle_filter(rows, self.noise, redraw, self.progress)
        weights = yield from self._read(steps)
        found = rows.values.flatten(1)[weights.pick()]
        return Generation(found, weights.evidence() if (given != BLANK).any() else None)
