"""Text from either model, freely or around given tokens, in windows (docs/math.md, sections 7 and
9).

A window is a text of at most the trained context. When it is full, its last half (in whole
positions) becomes the prompt of the next one; everything before is forgotten.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tarflowlm.baseline import TokenLM
from tarflowlm.config import Decoder, Decoding
from tarflowlm.flow.couplings import AdjustWeights
from tarflowlm.flow.numerics import standard_normal_log_prob
from tarflowlm.generation.conditioned import Conditioned, ConditionedLatents, ConditionedTokens
from tarflowlm.generation.inversion import Decoders, invert_stack, per_block
from tarflowlm.generation.particles import (
    LatentSource,
    UniformSource,
    Weights,
    particle_filter,
    resample,
)
from tarflowlm.generation.sampling import BLANK, draw_tokens, row_normal
from tarflowlm.language_model import LanguageModel
from tarflowlm.model import TarFlowLM, as_flow
from tarflowlm.model_config import LanguageModelConfig
from tarflowlm.progress import SILENT, Progress


@dataclass(frozen=True)
class Watch:
    """Callbacks of `generate`. An exception that one of them raises ends the generation."""

    progress: Progress = SILENT
    """Advances once per position and block: `num_positions` times in all. Only `advance` is
    called.
    """
    on_tokens: Callable[[Tensor], bool | None] | None = None
    """Called with the next final tokens [num, n] of all samples, on the CPU, in order and each
    once; given tokens are among them. If it returns True, the text ends with the window that is
    being written.
    """


class TokenStream:
    """Passes the tokens of a text on to `Watch.on_tokens` as they become final."""

    def __init__(self, watch: Watch, given: Tensor) -> None:
        """`given` [num, T] holds the given tokens, BLANK elsewhere; those that begin all texts are
        sent at once.
        """
        self.on_tokens, self.given = watch.on_tokens, given
        self.start = self.sent = 0
        """The first token of the present window, and the first that has not been sent."""
        self.has_ended = False
        self.send(int((given != BLANK).all(0).long().cumprod(0).sum()), lambda span: given[:, span])

    def send(self, final: int, tokens: Callable[[slice], Tensor]) -> None:
        """The first `final` tokens of the window are final; `tokens(span)` are those of a span of
        the window.
        """
        end = min(self.start + final, self.given.shape[1])
        if self.on_tokens is None or end <= self.sent:
            return
        found, given = (
            tokens(slice(self.sent - self.start, end - self.start)).cpu(),
            self.given[:, self.sent : end],
        )
        self.sent = end
        self.has_ended |= bool(self.on_tokens(torch.where(given == BLANK, found, given)))


Span = Callable[[slice], Tensor]
"""Returns the tokens [B, n] of a span of the window."""


@dataclass(frozen=True)
class Generation:
    """Samples, and how they came about."""

    tokens: Tensor  # [B, T].
    sweeps: tuple[int, ...] = ()
    """Passes of the Transformer in each block, block L first: N of them by steps. Empty for the
    baseline.
    """
    decoders: tuple[Decoder, ...] = ()
    """Decoder of each block, block L first; pass it as `decoder` to repeat the choice."""
    log_evidence: Tensor | None = None
    """With given tokens: an estimate of log p(given tokens), [B], in nats; its exponential is
    unbiased.
    """
    ess: Tensor | None = (
        None  # With given tokens: the effective sample size of the particles at the end, [B].
    )
    pareto_k: Tensor | None = None
    """With given tokens: the tail index of their weights, [B], above 0.7 if these are unreliable;
    NaN if R < 25.
    """
    draws: Tensor | None = (
        None  # With given tokens: how often the particles of each sample were resampled, [B].
    )
    _latents: tuple[Tensor, ...] = field(default=(), repr=False)
    """The states that the inversion gave, padded to whole patches; with given tokens z alone."""
    _flow: TarFlowLM | None = field(default=None, repr=False)  # The model of `states` and `passes`.

    @cached_property
    def states(self) -> tuple[Tensor, ...]:
        """h^(L) = u, ..., h^(0) = z, each [B, T, d]. Empty for the baseline and for texts beyond
        the context.
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
        """The `states` decoded, each [B, T]: coarse to fine. The last is `tokens`, however they
        were decoded.
        """
        if self._flow is None:
            return ()
        return (*(self._flow.codebook.decode(h) for h in self.states[:-1]), self.tokens)


@dataclass(frozen=True)
class Sampler:
    """Writes windows of text; `generate` describes the settings."""

    model: LanguageModel
    generators: list[torch.Generator]
    """One per sample."""
    particles: int
    adjust: AdjustWeights | None
    decoding: Decoding
    decoder: Decoders
    progress: Progress
    stream: TokenStream

    def write(self, given: Tensor) -> Generation:
        """Tokens in place of the blanks of `given` [num, T], within the context."""
        num_tokens = given.shape[1]
        whole = F.pad(given, (0, -num_tokens % self.model.config.patch), value=BLANK)
        config, free = self.model.config, given == BLANK
        num_known = int((~free.any(0)).long().cumprod(0).sum()) if config.continues_exactly else 0
        is_free = bool(free[:, num_known - num_known % config.patch :].all())
        if isinstance(self.model, TokenLM):
            result = self._from_baseline(self.model, whole, num_tokens)
        else:
            result = (self._free if is_free else self._completed)(
                as_flow(self.model), whole, num_tokens
            )
        self.stream.send(num_tokens, lambda span: result.tokens[:, span])
        return result

    def _free(self, flow: TarFlowLM, given: Tensor, num_tokens: int) -> Generation:
        """Samples without given tokens, but for those at the start: noise, inverted block by
        block.
        """
        noise = row_normal(self.generators, given.shape[1], flow.config.latent_dim).to(
            flow.codebook.mean
        )
        known, settled = given[:, : int((given[0] != BLANK).sum())].to(noise.device), list[Tensor]()
        summary: dict[str, Tensor] = {}
        if n := known.shape[1]:
            with torch.no_grad():
                z, weights = (
                    flow.codebook.encode(known, noise[:, :n]),
                    Weights.uniform(len(given), 1),
                )
                settled, log_dets = flow.prior.states(z)
                log_p = standard_normal_log_prob(settled[-1]) + torch.cat(log_dets, -1).sum(-1)
                weights.add(log_p - flow.codebook.log_normaliser(z).sum(-1))
                summary = weights.summary()
            noise = torch.cat((settled[-1], noise[:, n:]), 1)

        def send(h: Tensor, final: int) -> None:
            self.stream.send(final * flow.config.patch, _decoded_spans(flow, h))

        on_final = send if self._streams_early and flow.prior.block(0).keeps_order else None
        how: Any = {"decoder": self.decoder, "adjust": self.adjust, "progress": self.progress}
        states, work = invert_stack(flow, noise, on_final=on_final, settled=settled, **how)
        tokens = torch.cat((known, self._decoded(flow, states[-1])[:, n:num_tokens]), 1)
        sweeps, decoders = tuple(w.passes for w in work), tuple(w.decoder for w in work)
        return Generation(tokens, sweeps, decoders, _latents=tuple(states), _flow=flow, **summary)

    def _completed(self, flow: TarFlowLM, given: Tensor, num_tokens: int) -> Generation:
        """Samples with some tokens given, by a particle filter through block 1 (docs/math.md,
        9).
        """
        prior, particles, spread = (
            flow.prior,
            self.particles,
            given.repeat_interleave(self.particles, dim=0),
        )
        upper = per_block(self.decoder, flow.num_blocks)[:-1]
        source = LatentSource(
            flow, self.generators, particles, spread != BLANK, (*upper, "steps"), self.progress
        )
        eps = row_normal(self.generators, *source.shape).flatten(0, 1).to(flow.codebook.mean)
        known = flow.codebook.encode(spread.clamp_min(0).to(eps.device), eps)
        latents = ConditionedLatents(flow, source.draw, known, spread != BLANK, self.adjust)
        weights = Weights.uniform(len(given), particles)
        weights.add(latents.prefill())
        self.progress.advance(latents.at)
        step = self._on_step(latents, _decoded_spans(flow, latents.values))
        particle_filter(latents, weights, self.generators, source, step)
        weights.add(source.log_factor(prior.patch.inverse(latents.noise)))
        rows = self._draw_particles(weights)
        z = prior.patch.inverse(latents.values)[rows]
        tokens = torch.where(given == BLANK, self._decoded(flow, z).cpu(), given).to(z.device)
        sweeps = (*(w.passes for w in source.work), latents.num_positions)
        decoders: tuple[Decoder, ...] = (*(w.decoder for w in source.work), "steps")
        return Generation(
            tokens[:, :num_tokens], sweeps, decoders, _latents=(z,), _flow=flow, **weights.summary()
        )

    def _from_baseline(self, model: TokenLM, given: Tensor, num_tokens: int) -> Generation:
        source = UniformSource(self.generators, self.particles, given.shape[1])
        spread = given.repeat_interleave(self.particles, dim=0)
        tokens = ConditionedTokens(model, source.uniform, spread, spread != BLANK, self.adjust)
        weights = Weights.uniform(len(given), self.particles)
        step = self._on_step(tokens, lambda span: tokens.values.flatten(1)[:, span])
        particle_filter(tokens, weights, self.generators, source, step)
        found = tokens.values.flatten(1)[self._draw_particles(weights)][:, :num_tokens]
        return Generation(found, **(weights.summary() if (given != BLANK).any() else {}))  # type: ignore[arg-type]

    @property
    def _streams_early(self) -> bool:
        """Whether tokens are final one by one: with one particle and without draws from p(x|z),
        which come last.
        """
        return self.stream.on_tokens is not None and self.particles == 1 and self.decoding == "mode"

    def _on_step(self, conditioned: Conditioned, tokens: Span) -> Callable[[], None]:
        def advance() -> None:
            self.progress.advance()
            if self._streams_early:
                self.stream.send(conditioned.at * self.model.config.patch, tokens)

        return advance

    def _decoded(self, flow: TarFlowLM, z: Tensor) -> Tensor:
        """The tokens [B, T] of latents z [B, T, d]."""
        return (
            flow.codebook.decode(z)
            if self.decoding == "mode"
            else draw_tokens(flow.codebook, z, self.generators)
        )

    def _draw_particles(self, weights: Weights) -> Tensor:
        """One particle per sample: row indices [num]."""
        picks = [
            resample(log_w, 1, g) for log_w, g in zip(weights.log_w, self.generators, strict=True)
        ]
        return torch.cat(picks) + torch.arange(len(picks)) * weights.log_w.shape[1]


def _decoded_spans(flow: TarFlowLM, h: Tensor) -> Span:
    """The most probable tokens of latents h [B, N, C]."""
    return lambda span: flow.codebook.decode(flow.prior.patch.inverse(h)[:, span])


def spans(
    config: LanguageModelConfig, num_tokens: int, num_given: int = 0
) -> list[tuple[int, int]]:
    """(start, end) of every window, in tokens, for a text of `num_tokens` that begins with a prompt
    of `num_given`.

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
    """How often `generate` advances `Watch.progress`: over the positions of all windows and blocks
    (`spans`).
    """
    windows = spans(model.config, num_tokens, num_given)
    return sum(-(-(end - start) // model.config.patch) for start, end in windows) * model.num_blocks


def write_windows(sampler: Sampler, given: Tensor) -> Generation:
    """A text beyond the context that begins with a prompt: `given` [num, T], BLANK after it."""
    tokens, windows, end = given.clone(), list[Generation](), 0
    # with prompts of different lengths, the windows of the shortest
    bounds = spans(sampler.model.config, given.shape[1], int((given != BLANK).sum(1).min()))
    for start, end in bounds:
        sampler.stream.start = start
        windows.append(sampler.write(tokens[:, start:end]))
        tokens[:, start:end] = windows[-1].tokens.cpu()
        if sampler.stream.has_ended:
            break
    first = windows[0]
    if bounds[0][0] > 0:  # part of the prompt is in no window
        first = replace(first, log_evidence=None, ess=None, pareto_k=None, draws=None)
    sweeps = tuple(map(sum, zip(*(window.sweeps for window in windows), strict=True)))
    return replace(
        first,
        tokens=tokens[:, :end].to(first.tokens.device),
        sweeps=sweeps,
        _flow=None,
        _latents=(),
    )
