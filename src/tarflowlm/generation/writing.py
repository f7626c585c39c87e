"""Text from either model, freely or around given tokens, in windows (docs/math.md, 7 and 9).

A window is a text of at most the trained context. When it is full, its last half (in whole
positions) becomes the prompt of the next one; everything before is forgotten.
"""

from collections.abc import Callable, Generator
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tarflowlm.baseline import TokenLM
from tarflowlm.config import Decoder
from tarflowlm.flow.couplings import AdjustWeights
from tarflowlm.flow.numerics import standard_normal_log_prob
from tarflowlm.generation.conditioned import Conditioned, ConditionedLatents, ConditionedTokens
from tarflowlm.generation.inversion import Decoders, Kept, per_block, stack_inversion
from tarflowlm.generation.particles import (
    RESAMPLE_BELOW,
    Evidence,
    LatentSource,
    UniformSource,
    Weights,
    particle_filter,
    resample,
)
from tarflowlm.generation.sampling import BLANK, row_normal
from tarflowlm.language_model import LanguageModel
from tarflowlm.model import TarFlowLM, as_flow
from tarflowlm.model_config import LanguageModelConfig
from tarflowlm.progress import Progress


@dataclass(frozen=True)
class Generation:
    """Samples, and how they came about."""

    tokens: Tensor
    """[num, T]."""
    evidence: Evidence | None = None
    """How well the samples agree with the given tokens; None without given tokens."""
    sweeps: tuple[int, ...] = ()
    """Passes of the Transformer in each block, block L first: N of them by steps. Empty for the
    baseline.
    """
    decoders: tuple[Decoder, ...] = ()
    """Decoder of each block, block L first; pass it as `decoder` to repeat the choice."""
    _latents: tuple[Tensor, ...] = field(default=(), repr=False)
    """The states that the inversion gave, padded to whole patches; with given tokens z alone."""
    _flow: TarFlowLM | None = field(default=None, repr=False)
    """The model of `states` and `passes`."""

    @cached_property
    def states(self) -> tuple[Tensor, ...]:
        """h^(L) = u, ..., h^(0) = z, each [num, T, d].

        Empty for the baseline and for texts beyond the context.
        """
        if self._flow is None:
            return ()
        states = self._latents
        if len(states) == 1:
            # the states of z, not the noise drawn above: the given tokens have changed it
            with torch.no_grad():
                states = tuple(self._flow.prior.states(states[0])[0][::-1])
        return tuple(h[:, : self.tokens.shape[1]] for h in states)

    @cached_property
    def passes(self) -> tuple[Tensor, ...]:
        """The `states` decoded, each [num, T], coarse to fine. The last is `tokens`."""
        if self._flow is None:
            return ()
        return (*(self._flow.codebook.decode(h) for h in self.states[:-1]), self.tokens)


class Final(NamedTuple):
    """How far a text is final."""

    end: int
    """The first so many tokens of the text will not change."""
    read: Callable[[int, int], Tensor]
    """The tokens [num, n] from one place of the text to another, within the present window."""
    ends_window: bool = False


Steps = Generator[Final, None, Generation]
"""Writes a text: says again and again how far it is final, and returns it at the end."""

Case = Literal["baseline", "free", "continued", "completed"]


def case_of(model: LanguageModel, given: Tensor) -> Case:
    """The method that draws the blanks of `given` [num, T].

    baseline: token by token. free: nothing is given, so the noise is drawn and inverted. continued:
    in a stack without blocks from right to left, a prompt of whole positions, the same number in
    all rows, has known states, and only the noise behind it is drawn. completed: any other given
    tokens enter in block 1, whose particles they weight.
    """
    if isinstance(model, TokenLM):
        return "baseline"
    is_given = given != BLANK
    if not is_given.any():
        return "free"
    length = int(is_given.all(0).long().cumprod(0).sum())
    is_prompt = length % model.config.patch == 0 and not is_given[:, length:].any()
    return "continued" if is_prompt and model.config.continues_exactly else "completed"


@dataclass(frozen=True)
class Window:
    """A text of at most the context, to be written; `generate` describes the settings."""

    model: LanguageModel
    generators: list[torch.Generator]
    """One per sample."""
    particles: int
    adjust: AdjustWeights | None
    decoder: Decoders
    progress: Progress
    given: Tensor
    """The given tokens, BLANK elsewhere, [num, T] on the CPU."""
    start: int = 0
    """The place of the window's first token in the whole text."""
    resample_below: float = RESAMPLE_BELOW
    """The threshold of `particle_filter`."""

    @property
    def rows(self) -> int:
        """Rows that are computed at once."""
        return len(self.given) * self.particles

    def write(self) -> Steps:
        """Tokens for the blanks of `given`."""
        num_tokens = self.given.shape[1]
        whole = F.pad(self.given, (0, -num_tokens % self.model.config.patch), value=BLANK)
        match case_of(self.model, self.given):
            case "baseline":
                result = yield from self._from_baseline(whole)
            case "free":
                result = yield from self._free(whole)
            case "continued":
                result = yield from self._continued(whole)
            case "completed":
                result = yield from self._completed(whole)
        result = replace(result, tokens=result.tokens[:, :num_tokens])
        final = self._final(num_tokens, lambda span: result.tokens[:, span])
        yield final._replace(ends_window=True)
        return result

    def _final(self, num: int, tokens: Callable[[slice], Tensor]) -> Final:
        """The first `num` tokens of the window are final; `tokens` reads a span of the window."""

        def read(start: int, end: int) -> Tensor:
            return tokens(slice(start - self.start, end - self.start))

        return Final(self.start + num, read)

    def _free(self, given: Tensor) -> Steps:
        """Noise, inverted block by block."""
        flow = as_flow(self.model)
        noise = row_normal(self.generators, given.shape[1], flow.config.latent_dim)
        return (yield from self._inverted(flow, noise.to(flow.codebook.mean), []))

    def _continued(self, given: Tensor) -> Steps:
        """The states of the prompt, and the noise behind it inverted block by block."""
        flow = as_flow(self.model)
        noise = row_normal(self.generators, given.shape[1], flow.config.latent_dim)
        noise = noise.to(flow.codebook.mean)
        known = given[:, : int((given[0] != BLANK).sum())].to(noise.device)
        num = known.shape[1]
        z = flow.codebook.encode(known, noise[:, :num])
        settled, log_dets = flow.prior.states(z)
        log_p = standard_normal_log_prob(settled[-1]) + torch.cat(log_dets, -1).sum(-1)
        weights = Weights.uniform(len(given), 1)
        weights.add(log_p - flow.codebook.log_normaliser(z).sum(-1))
        noise = torch.cat((settled[-1], noise[:, num:]), 1)
        result = yield from self._inverted(flow, noise, settled)
        tokens = torch.cat((known, result.tokens[:, num:]), 1)
        return replace(result, tokens=tokens, evidence=weights.evidence())

    def _inverted(self, flow: TarFlowLM, noise: Tensor, settled: list[Tensor]) -> Steps:
        """The sample of `noise` [num, T, d]; `settled` as in `stack_inversion`."""
        steps = Kept(
            stack_inversion(
                flow,
                noise,
                decoder=self.decoder,
                adjust=self.adjust,
                settled=settled,
                progress=self.progress,
            )
        )
        for h, final in steps:
            yield self._final(final * flow.config.patch, _decoder(flow, h))
        states, work = steps.value
        return Generation(
            flow.codebook.decode(states[-1]),
            sweeps=tuple(w.passes for w in work),
            decoders=tuple(w.decoder for w in work),
            _latents=tuple(states),
            _flow=flow,
        )

    def _completed(self, given: Tensor) -> Steps:
        """A particle filter through block 1 (docs/math.md, section 9)."""
        flow = as_flow(self.model)
        spread = given.repeat_interleave(self.particles, dim=0)
        is_known = spread != BLANK
        decoder: tuple[Decoder, ...] = (*per_block(self.decoder, flow.num_blocks)[:-1], "steps")
        source = LatentSource(
            flow, self.generators, self.particles, is_known, decoder, self.progress
        )
        eps = row_normal(self.generators, *source.shape).flatten(0, 1).to(flow.codebook.mean)
        known = flow.codebook.encode(spread.clamp_min(0).to(eps.device), eps)
        latents = ConditionedLatents(flow, source.draw, known, is_known, self.adjust)
        weights = Weights.uniform(len(given), self.particles)
        weights.add(latents.prefill())
        self.progress.advance(latents.at)
        yield from self._filtered(latents, weights, source, _decoder(flow, latents.values))
        weights.add(source.log_factor(flow.prior.patch.inverse(latents.noise)))
        z = flow.prior.patch.inverse(latents.values)[self._draw_particles(weights)]
        tokens = torch.where(given == BLANK, flow.codebook.decode(z).cpu(), given)
        return Generation(
            tokens.to(z.device),
            evidence=weights.evidence(),
            sweeps=(*(w.passes for w in source.work), latents.num_positions),
            decoders=(*(w.decoder for w in source.work), "steps"),
            _latents=(z,),
            _flow=flow,
        )

    def _from_baseline(self, given: Tensor) -> Steps:
        assert isinstance(self.model, TokenLM)
        source = UniformSource(self.generators, self.particles, given.shape[1])
        spread = given.repeat_interleave(self.particles, dim=0)
        tokens = ConditionedTokens(self.model, source.uniform, spread, spread != BLANK, self.adjust)
        weights = Weights.uniform(len(given), self.particles)
        yield from self._filtered(
            tokens, weights, source, lambda span: tokens.values.flatten(1)[:, span]
        )
        found = tokens.values.flatten(1)[self._draw_particles(weights)]
        return Generation(found, evidence=weights.evidence() if (given != BLANK).any() else None)

    def _filtered(
        self,
        conditioned: Conditioned,
        weights: Weights,
        source: UniformSource | LatentSource,
        tokens: Callable[[slice], Tensor],
    ) -> Generator[Final, None, None]:
        """The particle filter; `tokens` reads a span of `conditioned`, final for one particle."""
        filtered = particle_filter(
            conditioned, weights, self.generators, source, self.resample_below
        )
        for _ in filtered:
            self.progress.advance()
            if self.particles == 1:
                yield self._final(conditioned.at * self.model.config.patch, tokens)

    def _draw_particles(self, weights: Weights) -> Tensor:
        """One particle per sample: row indices [num]."""
        picks = [
            resample(log_w, 1, g) for log_w, g in zip(weights.log_w, self.generators, strict=True)
        ]
        return torch.cat(picks) + torch.arange(len(picks)) * self.particles


def _decoder(flow: TarFlowLM, h: Tensor) -> Callable[[slice], Tensor]:
    """Reads the most probable tokens of latents h [B, N, C], whatever they are by then."""
    return lambda span: flow.codebook.decode(flow.prior.patch.inverse(h)[:, span])


def spans(
    config: LanguageModelConfig, num_tokens: int, num_given: int = 0
) -> list[tuple[int, int]]:
    """(start, end) of every window, in tokens, for a text of `num_tokens`, `num_given` of them a
    prompt.

    A prompt that leaves no room in a window enters the first one with its last half window.
    """
    kept = config.context // config.patch // 2 * config.patch
    start = num_given - kept if num_given >= config.context else 0
    found = [(start, min(start + config.context, num_tokens))]
    while found[-1][1] < num_tokens:
        start = found[-1][1] - kept
        found.append((start, min(start + config.context, num_tokens)))
    return found


def num_positions(model: LanguageModel, num_tokens: int, num_given: int = 0) -> int:
    """How often `generate` advances its progress: over the positions of all windows and blocks."""
    windows = spans(model.config, num_tokens, num_given)
    return sum(-(-(end - start) // model.config.patch) for start, end in windows) * model.num_blocks


def write(text: Window) -> Steps:
    """A text of any length. Beyond the context it begins with a prompt, and is BLANK after it."""
    given = text.given
    num_tokens = given.shape[1]
    if num_tokens <= text.model.config.context:
        return (yield from text.write())
    tokens = given.clone()
    windows: list[Generation] = []
    # with prompts of different lengths, the windows of the shortest
    bounds = spans(text.model.config, num_tokens, int((given != BLANK).sum(1).min()))
    for start, end in bounds:
        window = replace(text, given=tokens[:, start:end], start=start)
        windows.append((yield from window.write()))
        tokens[:, start:end] = windows[-1].tokens.cpu()
    first = windows[0]
    return Generation(
        tokens.to(first.tokens.device),
        # else part of the prompt is in no window
        evidence=first.evidence if bounds[0][0] == 0 else None,
        sweeps=tuple(map(sum, zip(*(window.sweeps for window in windows), strict=True))),
        decoders=first.decoders,
    )
