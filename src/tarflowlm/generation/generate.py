"""`generate`, the entry point of sampling: either model, with or without given tokens (docs/math.md, 7 and 9)."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tarflowlm.baseline import TokenLM
from tarflowlm.choices import Decoder, Decoding
from tarflowlm.device import keep_freed_memory
from tarflowlm.errors import UserError
from tarflowlm.flow.couplings import AdjustWeights
from tarflowlm.generation.choice import TokenChoice, check_choice, weighs_tokens
from tarflowlm.generation.drafted import (
    Round,
    Watch,
    invert_stack_with_drafts,
    invert_with_drafts,
    split_decoders,
)
from tarflowlm.generation.inversion import Decoders, Inverted, Tick
from tarflowlm.generation.particles import LatentSource, UniformSource, Weights, particle_filter, resample
from tarflowlm.generation.passage import LatentPassage, TokenPassage
from tarflowlm.generation.sampling import BLANK, adjust_weights, draw_tokens, row_generators, row_normal
from tarflowlm.generation.window import check_length, num_unseen, slide, spans
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
    rounds: tuple[Round, ...] = ()
    """The text after every round of the decoder "drafted". Only on request."""
    log_evidence: Tensor | None = None
    """With given tokens: an estimate of log p(given tokens), [B], in nats; its exponential is unbiased."""
    ess: Tensor | None = None
    """With given tokens: the effective sample size of the particles at the end, [B]."""
    pareto_k: Tensor | None = None
    """With given tokens: the tail index of those particles' weights, [B]; above 0.7 the evidence is unreliable. NaN
    for fewer than 25 particles."""
    draws: Tensor | None = None
    """With given tokens: how often the particles of each sample were resampled, [B]."""


@torch.no_grad()
def generate(
    model: LanguageModel,
    *,
    num_tokens: int,
    num: int = 1,
    prompt: Tensor | None = None,
    template: Tensor | None = None,
    particles: int = 1,
    generator: torch.Generator | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    decoding: Decoding = "mode",
    return_passes: bool = False,
    return_rounds: bool = False,
    decoder: Decoders = "sequential",
    tick: Tick | None = None,
) -> Generation:
    """Draw `num` samples of `num_tokens` tokens each, given tokens included (docs/math.md, sections 7 and 9).

    At temperature 1, without top-k, top-p or given tokens, the latents are exact samples. `decoding` makes them
    tokens: drawn takes one from p(x|z), which makes the tokens exact samples, too; mode takes the most probable one,
    which is the same where the codebook is sharp.

    `temperature` tau raises probabilities of tokens to the power 1 / tau, `top_k` and `top_p` truncate them: those of
    the baseline, or those of block 1 given everything before. A Mix-d block tied to the codebook has them as its
    weights; the noise is not scaled, since Phi(u) has to stay uniform. For Mix-1, or Mix-d with components of its
    own, they are estimated for all V tokens (`TokenChoice`): a token is chosen, whatever `decoding` says, together
    with latents of its own, and the noise that the blocks above drew for it is not used. UserError for this with more
    than 1,024 tokens, and for an affine block 1.

    `prompt` [tokens] comes first. `template` [tokens], or [num, tokens] with one template per sample, gives tokens
    anywhere: -1 (BLANK) marks a token to be drawn, and tokens after its end are drawn too. A prompt is exact for the
    baseline and, given its latents, for a single left-to-right block. Otherwise drawn tokens ignore the given tokens
    further right and the dependence that the blocks above describe. R = `particles` > 1 corrects this
    (`particles.py`) at R times the cost, and is exact in the limit of many. Temperature, top-k and top-p apply to
    drawn tokens, not to the weights of particles.

    `num_tokens` may exceed the trained context: the window then slides, and its last half, encoded anew, is the
    prompt of the next one (`window.py`). What holds for a prompt holds for every window: it is exact for the baseline
    and a single left-to-right block, and approximate in a stack, whose upper blocks draw the noise of a window
    without regard to the tokens kept. Of a prompt that fills the context the last half window counts; there is no
    evidence then, and else that of the prompt. Not with a template, passes or several particles.

    Row b has its own random stream, seeded from `generator`, so rows do not depend on `num`. `decoder`: sequential
    inverts every block position by position; parallel by sweeps, with the same result up to rounding
    (`inversion.py`); drafted lets block 1 verify what the model's draft guesses, with the same result again
    (`drafted.py`), and decodes the blocks above by auto; auto times the ways there are on the first positions of
    every block. Block 1 is swept only if no tokens are given and no probabilities adjusted. It is drafted also then,
    but not with particles, with tokens given further right, or where `TokenChoice` draws them.
    `tick` is called `num_ticks` times, once per position and block.

    UserError for sizes that the model cannot generate, for settings out of range and for unknown given tokens.
    """
    keep_freed_memory()
    given = _given(model, num, num_tokens, prompt, template, particles)
    check_length(model.config, num_tokens, template=template is not None, particles=particles, passes=return_passes)
    adjust = _adjustment(model, temperature, top_k, top_p)
    rows = row_generators(num, generator or torch.Generator().manual_seed(torch.seed()))
    if num_tokens <= model.config.context:
        return _within_context(
            model, given, num_tokens, particles, rows, adjust, decoding, decoder, return_passes, tick
        )
    windows: list[Generation] = []

    def write(window: Tensor, length: int) -> Tensor:
        # the first window tries the decoders, the others repeat its choice
        chosen = (windows[0].decoders or decoder) if windows else decoder
        windows.append(_within_context(model, window, length, 1, rows, adjust, decoding, chosen, False, tick))
        return windows[-1].tokens

    tokens = slide(model.config, given[:, :num_tokens], write)
    sweeps = tuple(sum(block) for block in zip(*(w.sweeps for w in windows), strict=True))
    found = replace(windows[0], tokens=tokens, sweeps=sweeps)
    seen = prompt is None or num_unseen(model.config, num_tokens, len(prompt)) == 0
    return found if seen else replace(found, log_evidence=None, ess=None, pareto_k=None, draws=None)


def _within_context(
    model: LanguageModel,
    given: Tensor,
    num_tokens: int,
    particles: int,
    rows: list[torch.Generator],
    adjust: AdjustWeights | None,
    decoding: Decoding,
    decoder: Decoders,
    return_passes: bool,
    tick: Tick | None,
) -> Generation:
    """`generate` for one window, from given tokens [num, whole patches]."""
    if isinstance(model, TokenLM):
        return _from_baseline(model, given, num_tokens, particles, rows, adjust, tick)
    flow = as_flow(model)
    rounds: list[Round] = []
    watch = rounds.append if return_rounds else None
    free = bool((given == BLANK).all())
    if free and (adjust is None or weighs_tokens(flow.prior.block(0).coupling)):
        noise = row_normal(rows, given.shape[1], flow.config.latent_dim).to(flow.codebook.mean)
        states, work = invert_stack_with_drafts(flow, noise, decoder=decoder, adjust=adjust, tick=tick, watch=watch)
        tokens = _decoded(flow, states[-1], decoding, rows)
        result = _generation(flow, tokens[:, :num_tokens], states, work, return_passes)
    else:
        particles = 1 if free else particles
        result = _completed(
            flow, given, num_tokens, particles, rows, adjust, decoding, decoder, return_passes, tick, watch
        )
    return replace(result, rounds=tuple(r.cut(num_tokens) for r in rounds))


def _adjustment(
    model: LanguageModel, temperature: float, top_k: int | None, top_p: float | None
) -> AdjustWeights | None:
    """`adjust_weights` for the tokens of this model. UserError where its block 1 does not allow for it."""
    adjust = adjust_weights(temperature, top_k, top_p)
    if top_k is not None and top_k >= model.config.vocab_size:
        adjust, top_k = adjust_weights(temperature, None, top_p), None
    if adjust is not None and not model.is_exact and not weighs_tokens(as_flow(model).prior.block(0).coupling):
        settings = [f"temperature {temperature}"] if temperature != 1.0 else []
        settings += [f"{name} {value}" for name, value in (("top-k", top_k), ("top-p", top_p)) if value is not None]
        check_choice(as_flow(model), ", ".join(settings))
    return adjust


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
        **weights,  # type: ignore[arg-type]
    )


def _completed(
    model: TarFlowLM,
    given: Tensor,
    num_tokens: int,
    particles: int,
    generators: list[torch.Generator],
    adjust: AdjustWeights | None,
    decoding: Decoding,
    decoder: Decoders,
    return_passes: bool,
    tick: Tick | None,
    watch: Watch | None,
) -> Generation:
    """Samples with some tokens given or chosen, by a particle filter through block 1 (docs/math.md, section 9)."""
    book, num = model.codebook, len(given)
    spread = given.repeat_interleave(particles, dim=0)
    is_known = spread != BLANK
    upper, first = split_decoders(model, decoder)
    source = LatentSource(model, generators, particles, is_known, (*upper, "sequential"), tick)
    eps = row_normal(generators, *source.shape).flatten(0, 1).to(book.mean)
    known = book.encode(spread.clamp_min(0).to(book.mean.device), eps)
    choice = None
    if adjust is not None and not weighs_tokens(model.prior.block(0).coupling):
        choice, adjust = TokenChoice(model, adjust, generators, particles, given.shape[1]), None
    passage = LatentPassage(model, source.draw, known, is_known, adjust, choice)
    weights = Weights.uniform(num, particles)
    weights.add(passage.prefill())
    if tick is not None:
        for _ in range(passage.at):
            tick()
    work = [*source.work]
    if first in ("drafted", "auto") and particles == 1 and model.draft is not None:
        work += _drafted_rest(model, passage, weights, first, tick, watch)
    particle_filter(passage, weights, generators, source, tick)
    weights.add(source.log_factor(model.prior.patch.inverse(passage.noise)))
    chosen = _chosen(weights, generators)
    z = model.prior.patch.inverse(passage.values)[chosen]
    if choice is None:
        tokens = _decoded(model, z, decoding, generators)
    else:
        tokens = passage.tokens.flatten(1)[chosen.to(z.device)]
    tokens = torch.where(given == BLANK, tokens.cpu(), given).to(z.device)
    # the states of these latents, not the draws from above: the given tokens have changed their noise
    states = model.prior.states(z)[0][::-1] if return_passes else ()
    if len(work) < model.num_blocks:
        work.append(Inverted(passage.values, "sequential", passage.num_positions))
    summary = {} if (given == BLANK).all() else _summary(weights)
    return _generation(model, tokens[:, :num_tokens], states, work, return_passes, **summary)


def _drafted_rest(
    model: TarFlowLM,
    passage: LatentPassage,
    weights: Weights,
    decoder: Decoder,
    tick: Tick | None,
    watch: Watch | None,
) -> list[Inverted]:
    """Complete `passage` by drafts where tokens are given at its start alone; how it was done, if it was.

    A row is a sample here, not a particle, so nothing depends on the positions that follow.
    """
    at = passage.at
    if passage.choice is not None or at == passage.num_positions or passage.is_known[:, at + 1 :].any():
        return []
    if passage.is_known[:, at].any():
        weights.add(passage.step())
        if tick is not None:
            tick()
    if passage.at == passage.num_positions:
        return []
    found = invert_with_drafts(
        model,
        passage.noise,
        decoder=decoder,
        adjust=passage.adjust,
        settled=passage.values,
        num_settled=passage.at,
        tick=tick,
        watch=watch,
    )
    passage.values, passage.at = found.h, passage.num_positions
    return [found]


def _from_baseline(
    model: TokenLM,
    given: Tensor,
    num_tokens: int,
    particles: int,
    generators: list[torch.Generator],
    adjust: AdjustWeights | None,
    tick: Tick | None,
) -> Generation:
    source = UniformSource(generators, particles, given.shape[1])
    spread = given.repeat_interleave(particles, dim=0)
    passage = TokenPassage(model, source.uniform, spread, spread != BLANK, adjust)
    weights = Weights.uniform(len(given), particles)
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


def num_ticks(model: LanguageModel, num_tokens: int, num_given: int = 0) -> int:
    """How often `generate` calls `tick` for `num_tokens` tokens: once per position and block of every window.

    `num_given` tokens of a prompt are among them; that matters only where they exceed the context.
    """
    windows = spans(model.config, num_tokens, num_given)
    return sum(-(-(end - start) // model.config.patch) for start, end in windows) * model.num_blocks


def _given(
    model: LanguageModel, num: int, num_tokens: int, prompt: Tensor | None, template: Tensor | None, particles: int
) -> Tensor:
    """The given tokens of every sample, BLANK elsewhere: [num, T] on the CPU, padded to whole patches."""
    context, vocab_size, patch = model.config.context, model.config.vocab_size, model.config.patch
    for name, value in (("num", num), ("length", num_tokens), ("particles", particles)):
        if value < 1:
            raise UserError(f"{name} {value}: must be at least 1")
    given = torch.full((num, -(-num_tokens // patch) * patch), BLANK)
    if prompt is not None and template is not None:
        raise UserError("both a prompt and a template: put the prompt at the start of the template")
    if prompt is not None and len(prompt) >= num_tokens:
        raise UserError(
            f"the prompt has {len(prompt)} tokens, which leaves no room in {num_tokens}: "
            f"shorten it, or raise the length"
        )
    tokens = prompt if template is None else template
    if tokens is None:
        return given
    if tokens.shape[-1] > num_tokens:
        raise UserError(
            f"the template has {tokens.shape[-1]} tokens, more than the length of {num_tokens}: "
            f"shorten it, or raise the length (at most {context})"
        )
    least = 0 if template is None else BLANK
    if ((tokens < least) | (tokens >= vocab_size)).any():
        name = "prompt" if template is None else "template"
        raise UserError(f"the {name} {tokens.tolist()} has tokens outside of 0 to {vocab_size - 1}: encode it again")
    given[:, : tokens.shape[-1]] = tokens.cpu()
    return given
