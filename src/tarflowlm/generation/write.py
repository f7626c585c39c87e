"""A plan becomes tokens, one window of noise after the other (docs/math.md, 7 and 9).

A window is a text of at most the trained context. When it is full, its last half, in whole
positions, becomes the prompt of the next one.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from tarflowlm.data.windows import spans
from tarflowlm.device import threads_for
from tarflowlm.errors import SILENT, Progress
from tarflowlm.flow.numerics import standard_normal_log_prob
from tarflowlm.generation.decoder import Drawing
from tarflowlm.generation.gaps import GapFilter
from tarflowlm.generation.inverse import begin, draws_last, invert_stack, settled_by
from tarflowlm.generation.inversion import Inversion
from tarflowlm.generation.particles import ParticleFilter, UpperBlocks, completing, is_rough
from tarflowlm.generation.plan import Plan
from tarflowlm.generation.sampling import (
    BLANK,
    Generation,
    Meter,
    Noise,
    Way,
    Work,
    num_leading,
)
from tarflowlm.model import LanguageModel, TarFlowLM


class Writer:
    """Writes a batch of texts, with a plan and a generator for each; all have one `batch_key`.

    Iterating yields the next tokens [num, n] of all samples as they become final, int64 on the CPU,
    given ones included: at least `every` of them, but for given ones at the start and for the end
    of a window. With particles, gaps, sweeps or inverted noise in block 1 a text comes at the end
    of its window. Then there is a `result`.

    Samples of one particle can end: after the plan's token `end`, every token is `end`.
    """

    result: Generation

    def __init__(
        self,
        model: LanguageModel,
        plans: Sequence[Plan],
        generators: Sequence[torch.Generator],
        progress: Progress = SILENT,
        every: int = 1,
    ) -> None:
        self.model = model
        self.plans = plans
        self.noise = Noise(model, generators, plans[0].particles)
        self.progress = progress
        self.every = every

    def __iter__(self) -> Iterator[Tensor]:
        plan = self.plans[0]
        num, T = len(self.plans), plan.num_tokens
        rows = num * plan.particles
        if plan.way == "gaps":
            with torch.no_grad(), threads_for(rows):
                gaps = GapFilter(plan, self.noise, Meter(self.progress, num * T, T))
                self.result = gaps.write()
            yield self.result.tokens.cpu()
            return
        config = self.model.config
        tokens = torch.stack([one.given for one in self.plans])
        shown = num_leading((tokens != BLANK).all(0))
        if shown:
            yield tokens[:, :shown].clone()
        given = int((tokens != BLANK).sum(1).min()) if config.context < T else 0
        bounds = spans(T, config.context, patch=config.patch, given=given)
        positions = sum(-(-(end - start) // config.patch) for start, end in bounds)
        meter = Meter(self.progress, num * T, positions * self.model.num_blocks)
        can_end = plan.end is not None and plan.particles == 1
        ended = torch.zeros(num, dtype=torch.bool) if can_end else None
        windows: list[Generation] = []
        for start, end in bounds:
            # between two parts the reader has settings of its own
            with torch.no_grad(), threads_for(rows):
                window = Window(self, plan, tokens[:, start:end], shown - start, meter, ended)
            while window.steps.rows.is_open:
                with torch.no_grad(), threads_for(rows):
                    window.steps.step()
                    part = window.ready()
                if part is not None:
                    yield part
            with torch.no_grad(), threads_for(rows):
                written = window.finish()
                part = window.show(written.tokens[:, window.shown :])
            if part.shape[1]:
                yield part
            tokens[:, start:end] = window.tokens
            windows.append(replace(written, tokens=window.tokens.to(written.tokens.device)))
            shown = end
            is_exact = config.continues_exactly
            plan = replace(plan, way="inversion" if is_exact else "filter", begins=None)
        self.result = windows[0]
        if len(windows) > 1 or bounds[0] != (0, T):
            self.result = Generation(
                tokens.to(windows[0].tokens.device),
                # none if part of the prompt is in no window
                evidence=windows[0].evidence if bounds[0][0] == 0 else None,
                work=tuple(
                    Work(work[0].decoder, sum(one.passes for one in work))
                    for work in zip(*(one.work for one in windows), strict=True)
                ),
            )


class DoublingWriter(Writer):
    """A writer of several particles, which yields whole texts.

    A sample whose choice among its particles is rough is written again with twice as many, and so
    on up to the most of its plan.
    """

    def __iter__(self) -> Iterator[Tensor]:
        for _ in super().__iter__():
            pass
        evidence = self.result.evidence
        for row, is_due in enumerate([] if evidence is None else is_rough(evidence).tolist()):
            plan = self.plans[row]
            if not is_due or plan.particles == plan.most_particles:
                continue
            twice = replace(plan, particles=min(2 * plan.particles, plan.most_particles))
            # a sample goes on with its own generator, so it does not depend on the others
            generators = self.noise.generators[row : row + 1]
            again = DoublingWriter(self.model, [twice], generators, Meter(self.progress, 0, 1))
            for _ in again:
                pass
            self.result = self.result.with_row(row, again.result)
        yield self.result.tokens.cpu()


def write(
    model: LanguageModel,
    plans: Sequence[Plan],
    generators: Sequence[torch.Generator],
    progress: Progress = SILENT,
) -> Generation:
    """What a `Writer` writes, all at once."""
    writer = Writer(model, plans, generators, progress, every=plans[0].num_tokens)
    for _ in writer:
        pass
    return writer.result


class Window:
    """A text of at most the context, as it is written."""

    steps: ParticleFilter
    """Block 1 or the baseline; the blocks above it are done."""

    def __init__(
        self,
        writer: Writer,
        plan: Plan,
        given: Tensor,
        shown: int,
        progress: Progress,
        ended: Tensor | None,
    ) -> None:
        """Tokens are given where `given` [num, T], on the CPU, is not BLANK; the first `shown` are
        yielded. Samples that have `ended` [num] need no more.
        """
        self.plan, self.noise, self.progress = plan, writer.noise, progress
        self.model, self.every = writer.model, writer.every
        self.shown, self.ended = shown, ended
        self.work: list[Work] = []
        """Of the blocks above block 1."""
        self.states: list[Tensor] = []
        """h^(L) = u, ..., h^(1), where they are the states of the text."""
        self.tokens = given.clone()
        """Yielded tokens, then given ones; BLANK elsewhere."""
        whole = F.pad(given, (0, -given.shape[1] % self.model.config.patch), value=BLANK)
        flow = self.flow = self.model if isinstance(self.model, TarFlowLM) else None
        # few vectors at a time, for which a table of the codebook would take longest to make
        self.decode = None if flow is None else flow.codebook.finder()
        inverts = plan.sampling.decoder == "sweeps"
        if flow is None or (flow.is_single_mixd and not inverts):
            self._draw(whole)
        elif plan.way == "inversion":
            self._invert(flow, whole)
        else:
            self._complete(flow, whole)

    def ready(self) -> Tensor | None:
        """The next tokens of samples of one particle, once they are `every` tokens."""
        rows, patch = self.steps.rows, self.model.config.patch
        if self.plan.particles > 1 or rows.at * patch < self.shown + self.every:
            return None
        first = self.shown // patch
        values = rows.values[:, first : rows.at]
        tokens = values.flatten(1)
        if self.flow is not None and self.decode is not None:
            tokens = self.decode(self.flow.prior.patch.inverse(values))
        return self.show(tokens[:, self.shown - first * patch :])

    def show(self, tokens: Tensor) -> Tensor:
        """The next tokens: `tokens` [num, n], or the given ones. After an end, all are ends."""
        found = self.tokens[:, self.shown : self.shown + tokens.shape[1]]
        is_blank = found == BLANK
        found[:] = torch.where(is_blank, tokens[:, : found.shape[1]].cpu(), found)
        if self.ended is not None and self.plan.end is not None and found.shape[1]:
            is_over = ((found == self.plan.end) & is_blank).cumsum(1).bool() | self.ended[:, None]
            found.masked_fill_(is_over, self.plan.end)
            self.ended |= is_over[:, -1]
        self.shown += found.shape[1]
        return found.clone()

    def finish(self) -> Generation:
        """What was written, at the end of the window."""
        rows, weights = self.steps.rows, self.steps.weights
        flow, upper = self.flow, self.steps.upper
        if flow is not None and upper is not None and isinstance(rows, Inversion):
            weights.add(upper.log_factor(flow.prior.patch.inverse(rows.noise)))
        # without given tokens nothing weighs the particles
        picked = rows.values if rows.is_known is None else rows.values[weights.pick()]
        evidence = weights.evidence() if self.is_weighed else None
        if flow is None:
            return Generation(picked.flatten(1), evidence)
        z = flow.prior.patch.inverse(flow.prior.block(0).order.inverse(picked))
        work = (*self.work, Work(self.way, rows.passes))
        latents = () if self.ended is not None else (*self.states, z)
        return Generation(flow.codebook.decode(z), evidence, work, latents=latents)

    def _draw(self, given: Tensor) -> None:
        """Draw tokens by their weights; given ones are kept."""
        spread = given.repeat_interleave(self.plan.particles, 0)
        noise = self.noise.normal(given.shape[1])
        gumbel = self.noise.draws(given.shape[1])
        rows = Drawing(self.model, 0, noise, gumbel, spread, self.plan.adjust)
        rows.begins, rows.progress = self.plan.begins, self.progress
        self._begin(rows, "draw", is_weighed=bool((given != BLANK).any()))

    def _invert(self, flow: TarFlowLM, given: Tensor) -> None:
        """Invert noise block by block, after the states of a prompt."""
        num = num_leading((given != BLANK).all(0))
        noise = self.noise.normal(given.shape[1])
        known: list[Tensor] = []
        log_p: Tensor | None = None
        if num:
            z = flow.codebook.encode(given[:, :num].to(noise.device), noise[:, :num])
            known, log_dets = flow.prior.states(z)
            log_p = standard_normal_log_prob(known[-1]) + torch.cat(log_dets, -1).sum(-1)
            log_p = log_p - flow.codebook.log_normaliser(z).sum(-1)
            noise = torch.cat((known[-1], noise[:, num:]), 1)
        decoder, adjust = self.plan.sampling.decoder, self.plan.adjust
        gumbel = self.noise.draws(given.shape[1]) if draws_last(flow, decoder) else None
        states, work = invert_stack(
            flow,
            noise,
            decoder=decoder,
            above=1,
            adjust=adjust,
            known=known,
            gumbel=gumbel,
            progress=self.progress,
        )
        h = flow.prior.patch(states[-1])
        drawn = gumbel if flow.num_blocks == 1 else None
        rows, way = begin(
            flow.prior.block(0),
            h,
            decoder=decoder,
            adjust=adjust,
            settled=settled_by(flow, 0, h, known),
            gumbel=drawn,
            progress=self.progress,
        )
        self._begin(rows, way, is_weighed=num > 0)
        self.steps.weights.add(log_p)
        self.work, self.states = work, states if gumbel is None else []

    def _complete(self, flow: TarFlowLM, given: Tensor) -> None:
        """A particle filter through block 1 (docs/math.md, 9)."""
        spread = given.repeat_interleave(self.plan.particles, 0)
        decoder, adjust = self.plan.sampling.decoder, self.plan.adjust
        draws = draws_last(flow, decoder)
        upper = UpperBlocks(self.noise, spread != BLANK, decoder, draws, adjust, self.progress)
        eps = self.noise.normal(given.shape[1])
        gumbel = self.noise.draws(given.shape[1]) if draws and upper.single else None
        rows = completing(flow, upper.draw, spread, eps, adjust, gumbel)
        rows.progress = self.progress
        self._begin(rows, "steps" if gumbel is None else "draw", upper=upper)
        self.work = upper.work

    def _begin(
        self,
        rows: Drawing | Inversion,
        way: Way,
        *,
        upper: UpperBlocks | None = None,
        is_weighed: bool = True,
    ) -> None:
        rows.ended = self.ended
        self.steps = ParticleFilter(rows, self.noise, upper)
        self.way, self.is_weighed = way, is_weighed
