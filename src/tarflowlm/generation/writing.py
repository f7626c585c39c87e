"""Text from either model, freely or around given tokens, in windows (docs/math.md, 7 and 9).

A window is a text of at most the trained context. When it is full, its last half (in whole
positions) becomes the prompt of the next one; everything before is forgotten.
"""

from collections.abc import Generator
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from tarflowlm.baseline import TokenLM
from tarflowlm.config import Decoder
from tarflowlm.data.windows import spans
from tarflowlm.flow.numerics import standard_normal_log_prob
from tarflowlm.generation.conditioned import ConditionedLatents, ConditionedTokens
from tarflowlm.generation.inversion import Kept, stack_inversion
from tarflowlm.generation.particles import Evidence, LatentSource, Weights, particle_filter
from tarflowlm.generation.sampling import BLANK, Samples, num_leading
from tarflowlm.model import LanguageModel, TarFlowLM, as_flow

R = TypeVar("R")


@dataclass(frozen=True)
class Filled:
    """How the gaps of a template were filled."""

    given: Tensor
    """Where the tokens are given ones, [num, T]."""
    ends: Tensor
    """Tokens up to the end of the template, [num]."""
    lengths: tuple[Tensor, ...]
    """For each gap of unknown length the probabilities [num, ...] of least to most tokens."""


@dataclass(frozen=True)
class Generation:
    """Samples, and how they came about."""

    tokens: Tensor
    """[num, T]."""
    evidence: Evidence | None = None
    """How well the samples agree with the given tokens; None without given tokens."""
    sweeps: tuple[int, ...] = ()
    """Passes of the Transformer in each block, L first; empty for the baseline."""
    decoders: tuple[Decoder, ...] = ()
    """Decoder of each block, L first; pass it as `decoder` to repeat the choice."""
    filled: Filled | None = None
    """How gaps of unknown length were filled; None without them or a constraint."""
    _latents: tuple[Tensor, ...] = field(default=(), repr=False)
    """The states that the inversion gave, in whole patches; z alone after a completion or draw."""
    _flow: TarFlowLM | None = field(default=None, repr=False)
    """The model of `states` and `passes`."""
    _first: int = field(default=0, repr=False)
    """The place of the first token among the states."""

    @cached_property
    def states(self) -> tuple[Tensor, ...]:
        """h^(L) = u, ..., h^(0) = z, each [num, T, d].

        Empty for the baseline and for texts beyond the context.
        """
        if self._flow is None:
            return ()
        states = self._latents
        if len(states) == 1:
            # not the noise drawn above: given tokens have changed it, or it was never inverted
            with torch.no_grad():
                states = tuple(self._flow.prior.states(states[0])[0][::-1])
        end = self._first + self.tokens.shape[1]
        return tuple(h[:, self._first : end] for h in states)

    @cached_property
    def passes(self) -> tuple[Tensor, ...]:
        """The `states` decoded, each [num, T], coarse to fine. The last is `tokens`."""
        if self._flow is None:
            return ()
        return (*(self._flow.codebook.decode(h) for h in self.states[:-1]), self.tokens)

    def behind(self, num: int) -> "Generation":
        """The samples without their first `num` tokens, which were context."""
        filled = self.filled
        if filled is not None:
            filled = Filled(filled.given[:, num:], filled.ends - num, filled.lengths)
        return replace(self, tokens=self.tokens[:, num:], evidence=None, filled=filled, _first=num)


Parts = Generator[Tensor, None, Generation]
"""Writes a text: yields its next tokens [num, n], each once, and returns the whole."""


def exact_prompt(model: LanguageModel, given: Tensor) -> int:
    """Tokens of a prompt `given` [num, T] whose states are known before what follows; else 0.

    The model is a stack without blocks from right to left, and the prompt has whole positions, the
    same number in all rows.
    """
    is_given = given != BLANK
    length = num_leading(is_given.all(0))
    is_prompt = length % model.config.patch == 0 and not is_given[:, length:].any()
    return length if is_prompt and model.config.continues_exactly else 0


@dataclass
class Window(Samples):
    """A text of at most the context, to be written."""

    decoders: tuple[Decoder, ...]
    """One per block, L first; none for the baseline."""
    given: Tensor
    """The given tokens, BLANK elsewhere, [num, T] on the CPU."""
    every: int
    """Fewest tokens that are yielded at once, except at the end."""
    end: int
    """A sample goes on as this token once it was drawn."""
    ended: Tensor | None
    """The samples of which it was drawn, [num]; None where they do not end."""
    shown: int = 0
    """The first so many tokens have been yielded."""
    tokens: Tensor = field(init=False)
    """The tokens that have been yielded, the given ones after them, and else BLANK."""

    def write(self) -> Parts:
        """Tokens for the blanks of `given`."""
        num_tokens = self.given.shape[1]
        self.tokens = self.given.clone()
        whole = F.pad(self.given, (0, -num_tokens % self.model.config.patch), value=BLANK)
        num_exact = exact_prompt(self.model, self.given)
        if isinstance(self.model, TokenLM):
            result = yield from self._from_baseline(self.model, whole)
        elif num_exact or (self.given == BLANK).all():
            result = yield from self._inverted(
                as_flow(self.model), whole[:, :num_exact], whole.shape[1]
            )
        else:
            result = yield from self._completed(as_flow(self.model), whole)
        if self.shown < num_tokens:
            yield self._next(result.tokens[:, self.shown :])
        flow = result._flow if self.ended is None else None
        return replace(result, tokens=self.tokens.to(result.tokens.device), _flow=flow)

    def _next(self, tokens: Tensor) -> Tensor:
        """The next tokens: `tokens` [num, n], or the given ones; behind an end all are ends."""
        found = self.tokens[:, self.shown : self.shown + tokens.shape[1]]
        is_blank = found == BLANK
        found[:] = torch.where(is_blank, tokens[:, : found.shape[1]].cpu(), found)
        if self.ended is not None:
            is_over = ((found == self.end) & is_blank).cumsum(1).bool() | self.ended[:, None]
            found.masked_fill_(is_over, self.end)
            self.ended |= is_over[:, -1]
        self.shown += found.shape[1]
        return found.clone()

    def _tokens(self, values: Tensor) -> Tensor:
        """The tokens [num, n P] of values [num, n, ...] of positions: latents, or tokens."""
        if isinstance(self.model, TokenLM):
            return values.flatten(1)
        flow = as_flow(self.model)
        return flow.codebook.decode(flow.prior.patch.inverse(values))

    def _read(self, steps: Generator[Tensor, None, R]) -> Generator[Tensor, None, R]:
        """Run `steps`, which yield the values of the first positions, as far as they are final."""
        patch = self.model.config.patch
        kept = Kept(steps)
        for values in kept:
            if values.shape[1] * patch >= self.shown + self.every:
                first = self.shown // patch
                yield self._next(self._tokens(values[:, first:])[:, self.shown - first * patch :])
        return kept.value

    def _inverted(self, flow: TarFlowLM, prompt: Tensor, num_tokens: int) -> Parts:
        """Noise inverted block by block, behind the known states of a prompt [num, n]."""
        one = replace(self, particles=1)
        noise = one.normal(num_tokens, flow.config.latent_dim)
        num = prompt.shape[1]
        known: list[Tensor] = []
        evidence = None
        if num:
            z = flow.codebook.encode(prompt.to(noise.device), noise[:, :num])
            known, log_dets = flow.prior.states(z)
            log_p = standard_normal_log_prob(known[-1]) + torch.cat(log_dets, -1).sum(-1)
            weights = Weights(one)
            weights.add(log_p - flow.codebook.log_normaliser(z).sum(-1))
            evidence = weights.evidence()
            noise = torch.cat((known[-1], noise[:, num:]), 1)
        steps = stack_inversion(
            flow,
            noise,
            decoder=self.decoders,
            adjust=self.adjust,
            known=known,
            uniform=one.draws(self.decoders[0], num_tokens),
            ended=self.ended,
            progress=self.progress,
        )
        states, work = yield from self._read(steps)
        return Generation(
            flow.codebook.decode(states[-1]),
            evidence,
            sweeps=tuple(w.passes for w in work),
            decoders=tuple(w.decoder for w in work),
            _latents=tuple(states[-1:] if self.decoders[0] == "draw" else states),
            _flow=flow,
        )

    def _completed(self, flow: TarFlowLM, given: Tensor) -> Parts:
        """A particle filter through block 1 (docs/math.md, section 9)."""
        spread = given.repeat_interleave(self.particles, dim=0)
        is_known = spread != BLANK
        source = LatentSource(self, is_known, self.decoders)
        eps = self.normal(given.shape[1], flow.config.latent_dim)
        known = flow.codebook.encode(spread.clamp_min(0).to(eps.device), eps)
        uniform = self.draws(self.decoders[0], given.shape[1]) if source.single else None
        latents = ConditionedLatents(flow, source.draw, known, is_known, self.adjust, uniform)
        latents.ended = self.ended
        weights = yield from self._read(particle_filter(latents, self, source.redraw))
        weights.add(source.log_factor(flow.prior.patch.inverse(latents.noise)))
        z = flow.prior.patch.inverse(latents.values)[weights.pick()]
        return Generation(
            flow.codebook.decode(z),
            weights.evidence(),
            sweeps=(*(w.passes for w in source.work), latents.num_positions),
            decoders=(*(w.decoder for w in source.work), "steps" if uniform is None else "draw"),
            _latents=(z,),
            _flow=flow,
        )

    def _from_baseline(self, model: TokenLM, given: Tensor) -> Parts:
        num_tokens = given.shape[1]
        spread = given.repeat_interleave(self.particles, dim=0)
        uniform = self.uniform(num_tokens)
        tokens = ConditionedTokens(model, uniform, spread, spread != BLANK, self.adjust)
        tokens.ended = self.ended

        def redraw(samples: list[int], own: Tensor, parents: Tensor, at: int) -> Tensor:
            generators = [self.generators[b] for b in samples]
            return replace(self, generators=generators).uniform(num_tokens)

        weights = yield from self._read(particle_filter(tokens, self, redraw))
        found = tokens.values.flatten(1)[weights.pick()]
        return Generation(found, weights.evidence() if (given != BLANK).any() else None)


def num_positions(model: LanguageModel, num_tokens: int, num_given: int = 0) -> int:
    """How often `generate` advances its progress: over the positions of all windows and blocks."""
    config = model.config
    windows = spans(num_tokens, config.context, patch=config.patch, given=num_given)
    return sum(-(-(end - start) // model.config.patch) for start, end in windows) * model.num_blocks


def write(text: Window) -> Parts:
    """A text of any length. Beyond the context it begins with a prompt, and is BLANK after it."""
    given = text.given
    num_tokens = given.shape[1]
    # what begins all samples is known before they are written
    shown = num_leading((given != BLANK).all(0))
    if shown:
        yield given[:, :shown].clone()
    if num_tokens <= text.model.config.context:
        return (yield from replace(text, shown=shown).write())
    tokens = given.clone()
    windows: list[Generation] = []
    # with prompts of different lengths, the windows of the shortest
    config = text.model.config
    shortest = int((given != BLANK).sum(1).min())
    bounds = spans(num_tokens, config.context, patch=config.patch, given=shortest)
    for start, end in bounds:
        window = replace(text, given=tokens[:, start:end], shown=shown - start)
        windows.append((yield from window.write()))
        tokens[:, start:end] = windows[-1].tokens.cpu()
        shown = end
    first = windows[0]
    return Generation(
        tokens.to(first.tokens.device),
        # else part of the prompt is in no window
        evidence=first.evidence if bounds[0][0] == 0 else None,
        sweeps=tuple(map(sum, zip(*(window.sweeps for window in windows), strict=True))),
        decoders=first.decoders,
    )
