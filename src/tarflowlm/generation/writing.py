"""One window of text from either model: freely, or around given tokens (docs/math.md, sections 7 and 9)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tarflowlm.baseline import TokenLM
from tarflowlm.config import Decoder, Decoding
from tarflowlm.flow.couplings import AdjustWeights
from tarflowlm.generation.choice import TokenChoice, check_discarded
from tarflowlm.generation.inversion import Decoders, Follow, Inverted, Tick, invert_stack, per_block
from tarflowlm.generation.particles import LatentSource, UniformSource, Weights, particle_filter, resample
from tarflowlm.generation.passage import LatentPassage, Passage, TokenPassage
from tarflowlm.generation.sampling import BLANK, draw_tokens, row_normal
from tarflowlm.generation.telling import Telling
from tarflowlm.language_model import LanguageModel
from tarflowlm.model import TarFlowLM, as_flow


@dataclass(frozen=True)
class Generation:
    """Samples and, on request, the tokens and latents after every pass."""

    tokens: Tensor
    """[B, T]."""
    passes: tuple[Tensor, ...] = ()
    """The L + 1 `states` decoded to tokens, each [B, T]: coarse to fine. The last is `tokens`, however they were
    decoded. Only on request, never for the baseline."""
    states: tuple[Tensor, ...] = ()
    """h^(L) = u, ..., h^(0) = z, each [B, T, d]. Empty where `passes` is."""
    sweeps: tuple[int, ...] = ()
    """Passes over positions that each block took, block L first; N for a block inverted sequentially."""
    decoders: tuple[Decoder, ...] = ()
    """How each block was inverted, block L first; pass it as `decoder` to repeat the choice."""
    log_evidence: Tensor | None = None
    """With given tokens: an estimate of log p(given tokens), [B], in nats; its exponential is unbiased."""
    ess: Tensor | None = None
    """With given tokens: the effective sample size of the particles at the end, [B]."""
    pareto_k: Tensor | None = None
    """With given tokens: the tail index of those particles' weights, [B]; above 0.7 the evidence is unreliable. NaN
    for fewer than 25 particles."""
    draws: Tensor | None = None
    """With given tokens: how often the particles of each sample were resampled, [B]."""


@dataclass(frozen=True)
class Request:
    """How to write; `generate` says what it means."""

    generators: list[torch.Generator]
    """One per sample."""
    particles: int
    adjust: AdjustWeights | None
    decoding: Decoding
    decoder: Decoders
    passes: bool
    tick: Tick | None
    tell: Telling | None = None

    @property
    def tell_early(self) -> Telling | None:
        """`tell`, if tokens are final before all are: one particle, and no draws from p(x|z), which come last."""
        return self.tell if self.particles == 1 and self.decoding == "mode" else None


def write_window(model: LanguageModel, given: Tensor, num_tokens: int, request: Request) -> Generation:
    """`num_tokens` tokens from given ones [num, whole patches], BLANK elsewhere; within the context."""
    if isinstance(model, TokenLM):
        result = _from_baseline(model, given, num_tokens, request)
    else:
        result = _from_flow(as_flow(model), given, num_tokens, request)
    if request.tell is not None:
        request.tell(num_tokens, lambda span: result.tokens[:, span])
    return result


def _from_flow(flow: TarFlowLM, given: Tensor, num_tokens: int, request: Request) -> Generation:
    adjust, tell = request.adjust, request.tell_early
    if (given == BLANK).all() and (adjust is None or flow.config.has_token_weights):
        noise = row_normal(request.generators, given.shape[1], flow.config.latent_dim).to(flow.codebook.mean)
        states, work = invert_stack(
            flow,
            noise,
            decoder=request.decoder,
            adjust=adjust,
            tick=request.tick,
            follow=_follow(flow, tell),
        )
        tokens = _decoded(flow, states[-1], request.decoding, request.generators)
        return _generation(flow, tokens[:, :num_tokens], states, work, request.passes)
    return _completed(flow, given, num_tokens, request)


def _follow(model: TarFlowLM, tell: Telling | None) -> Follow | None:
    """Tells the tokens of the final positions of block 1, if it writes them in their order."""
    if tell is None or not model.prior.block(0).keeps_order:
        return None
    return lambda h, final: tell(final * model.config.patch, _decoding(model, h))


def _decoding(model: TarFlowLM, h: Tensor) -> Callable[[slice], Tensor]:
    """The tokens of a span, most probable ones, from latents h [B, N, C]."""
    return lambda span: model.codebook.decode(model.prior.patch.inverse(h)[:, span])


def _telling(request: Request, passage: Passage, patch: int, tokens: Callable[[slice], Tensor]) -> Tick | None:
    """`tick`, which tells the tokens that `passage` has completed as well."""
    tick, tell = request.tick, request.tell_early
    if tell is None:
        return tick

    def both() -> None:
        if tick is not None:
            tick()
        tell(passage.at * patch, tokens)

    return both


def _decoded(model: TarFlowLM, z: Tensor, decoding: Decoding, generators: list[torch.Generator]) -> Tensor:
    """The tokens [B, T] of latents z [B, T, d]."""
    return model.codebook.decode(z) if decoding == "mode" else draw_tokens(model.codebook, z, generators)


def _generation(
    model: TarFlowLM, tokens: Tensor, states: Sequence[Tensor], work: list[Inverted], passes: bool, **weights: Tensor
) -> Generation:
    shown = tuple(h[:, : tokens.shape[1]] for h in states) if passes else ()
    return Generation(
        tokens=tokens,
        passes=(*(model.codebook.decode(h) for h in shown[:-1]), tokens) if passes else (),
        states=shown,
        sweeps=tuple(w.passes for w in work),
        decoders=tuple(w.decoder for w in work),
        **weights,
    )


def _completed(model: TarFlowLM, given: Tensor, num_tokens: int, request: Request) -> Generation:
    """Samples with some tokens given or chosen, by a particle filter through block 1 (docs/math.md, section 9)."""
    book, num, generators, tick = model.codebook, len(given), request.generators, request.tick
    adjust, decoding = request.adjust, request.decoding
    # without given tokens there is nothing to weigh
    particles = 1 if (given == BLANK).all() else request.particles
    spread = given.repeat_interleave(particles, dim=0)
    is_known = spread != BLANK
    *upper, _ = per_block(request.decoder, model.num_blocks)
    source = LatentSource(model, generators, particles, is_known, (*upper, "steps"), tick)
    eps = row_normal(generators, *source.shape).flatten(0, 1).to(book.mean)
    known = book.encode(spread.clamp_min(0).to(book.mean.device), eps)
    choice = None
    if adjust is not None and not model.config.has_token_weights:
        check_discarded(model, source.draw, source.log_p)
        choice, adjust = TokenChoice(model, adjust, generators, particles, given.shape[1]), None
    passage = LatentPassage(model, source.draw, known, is_known, adjust, choice)
    weights = Weights.uniform(num, particles)
    weights.add(passage.prefill())
    if tick is not None:
        for _ in range(passage.at):
            tick()
    work = [*source.work]
    ready = _decoding(model, passage.values) if choice is None else lambda span: passage.tokens.flatten(1)[:, span]
    particle_filter(passage, weights, generators, source, _telling(request, passage, model.config.patch, ready))
    weights.add(source.log_factor(model.prior.patch.inverse(passage.noise)))
    chosen = _chosen(weights, generators)
    z = model.prior.patch.inverse(passage.values)[chosen]
    if choice is None:
        tokens = _decoded(model, z, decoding, generators)
    else:
        tokens = passage.tokens.flatten(1)[chosen.to(z.device)]
    tokens = torch.where(given == BLANK, tokens.cpu(), given).to(z.device)
    # the states of these latents, not the draws from above: the given tokens have changed their noise
    states = model.prior.states(z)[0][::-1] if request.passes else ()
    if len(work) < model.num_blocks:
        work.append(Inverted(passage.values, "steps", passage.num_positions))
    summary = {} if (given == BLANK).all() else _summary(weights)
    return _generation(model, tokens[:, :num_tokens], states, work, request.passes, **summary)


def _from_baseline(model: TokenLM, given: Tensor, num_tokens: int, request: Request) -> Generation:
    particles, generators = request.particles, request.generators
    source = UniformSource(generators, particles, given.shape[1])
    spread = given.repeat_interleave(particles, dim=0)
    passage = TokenPassage(model, source.uniform, spread, spread != BLANK, request.adjust)
    weights = Weights.uniform(len(given), particles)
    tick = _telling(request, passage, model.config.patch, lambda span: passage.values.flatten(1)[:, span])
    particle_filter(passage, weights, generators, source, tick)
    tokens = passage.values.flatten(1)[_chosen(weights, generators)][:, :num_tokens]
    if (given == BLANK).all():
        return Generation(tokens)
    return Generation(tokens, **_summary(weights))  # type: ignore[arg-type]


def _chosen(weights: Weights, generators: list[torch.Generator]) -> Tensor:
    """One particle per sample, drawn by weight: row indices [num]."""
    picks = [resample(log_w, 1, g) for log_w, g in zip(weights.log_w, generators, strict=True)]
    return torch.cat(picks) + torch.arange(len(picks)) * weights.log_w.shape[1]


def _summary(weights: Weights) -> dict[str, Tensor]:
    return {
        "log_evidence": weights.total(),
        "ess": weights.effective(),
        "pareto_k": weights.pareto_k(),
        "draws": weights.draws,
    }
