"""One entry to sampling: free or with tokens given, TarFlowLM or baseline, every pass on request."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tarflowlm.baseline import TokenLM
from tarflowlm.choices import Decoder
from tarflowlm.errors import UserError
from tarflowlm.flow.couplings import AdjustWeights
from tarflowlm.generation.inversion import Decoders, Inverted, Tick, invert_stack
from tarflowlm.generation.particles import LatentSource, UniformSource, Weights, particle_filter, resample
from tarflowlm.generation.passage import LatentPassage, TokenPassage
from tarflowlm.generation.sampling import BLANK, adjust_weights, row_generators, row_normal
from tarflowlm.language_model import LanguageModel
from tarflowlm.model import TarFlowLM, as_flow


@dataclass(frozen=True)
class Generation:
    """Samples, and on request the tokens and latents after every pass.

    `tokens` [B, T]. `passes`: decoded tokens of the noise u = h^(L) and of every state down to h^(0) = z, L + 1
    tensors [B, T], coarse to fine; `states`: those states [B, T, d]. Empty for the baseline, which has one pass.
    """

    tokens: Tensor
    passes: tuple[Tensor, ...] = ()
    states: tuple[Tensor, ...] = ()
    sweeps: tuple[int, ...] = ()
    """Passes over positions that each block took, block L first; as many as positions where sequential."""
    decoders: tuple[Decoder, ...] = ()
    """How each block was inverted, block L first: `decoder=` of the next call, to choose the same."""
    log_evidence: Tensor | None = None
    """With given tokens: an estimate of log p(given) [B], nats, whose exponential is unbiased."""
    ess: Tensor | None = None
    """With given tokens: effective number of particles [B] in the end."""
    draws: Tensor | None = None
    """With given tokens: how often the particles of every sample were resampled, [B]."""


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
    return_passes: bool = False,
    decoder: Decoders = "sequential",
    tick: Tick | None = None,
) -> Generation:
    """`num` samples of `num_tokens` tokens, given ones included.

    Exact samples of the model at temperature 1 with nothing given. `temperature` is the power 1 / temperature on the
    mixture weights of block 1, or on the baseline's probabilities. The noise is not scaled: Phi(u) must stay uniform,
    or components would be chosen by their place on the axis. In a stack of affine blocks alone, which has no weights,
    it scales the standard deviation of the noise.

    `prompt` [n] comes first; `template` [n], or [num, n] for a template of its own for every sample, gives tokens
    anywhere, -1 (BLANK) where one is to be drawn, and what follows its end is drawn too. A prompt is exact for the
    baseline and for a single left-to-right block. Otherwise the rest is drawn without regard to what is given
    further right, or in the blocks above: an approximation that `particles` N > 1 corrects (`particles.py`), at N
    times the cost; it becomes exact as N grows. Changed weights (temperature and so on) apply to what is drawn, not
    to how given tokens are weighed.

    Row b draws its noise from a stream of its own, seeded from `generator`, so rows do not depend on `num`.
    `decoder`: sequential inverts every block position by position; parallel by sweeps, with the same result up to
    rounding; auto times both on the first positions of every block (`inversion.py`). Block 1 is sequential where
    tokens are given or weights changed. `tick` is called once per position and block (`num_ticks` says how often).

    Raises UserError for sizes that the model cannot generate and for given tokens it does not know.
    """
    given = _given(model, num, num_tokens, prompt, template, particles)
    adjust = adjust_weights(temperature, top_k, top_p)
    rows = row_generators(num, generator or torch.Generator().manual_seed(torch.seed()))
    if isinstance(model, TokenLM):
        return _from_baseline(model, given, num_tokens, particles, rows, adjust, tick)
    flow = as_flow(model)
    if (given == BLANK).all():
        scale = temperature if flow.config.is_affine else 1.0
        noise = row_normal(rows, given.shape[1], flow.config.latent_dim).to(flow.codebook.mean) * scale
        states, work = invert_stack(flow, noise, decoder=decoder, adjust=adjust, tick=tick)
        tokens = flow.codebook.decode(states[-1])
        return _generation(flow, tokens[:, :num_tokens], states, work, return_passes)
    return _completed(flow, given, num_tokens, particles, rows, adjust, decoder, return_passes, tick)


def _generation(
    model: TarFlowLM, tokens: Tensor, states: Sequence[Tensor], work: list[Inverted], passes: bool, **weights: Tensor
) -> Generation:
    shown = tuple(h[:, : tokens.shape[1]] for h in states) if passes else ()
    return Generation(
        tokens=tokens,
        passes=tuple(model.codebook.decode(h) for h in shown),
        states=shown,
        sweeps=tuple(w.passes for w in work),
        decoders=tuple(w.decoder for w in work),
        **weights,
    )


def _completed(
    model: TarFlowLM,
    given: Tensor,
    num_tokens: int,
    particles: int,
    generators: list[torch.Generator],
    adjust: AdjustWeights | None,
    decoder: Decoders,
    return_passes: bool,
    tick: Tick | None,
) -> Generation:
    """Some tokens given: block 1 meets the noise of the blocks above where nothing is."""
    book, num = model.codebook, len(given)
    spread = given.repeat_interleave(particles, dim=0)
    is_known = spread != BLANK
    source = LatentSource(model, generators, particles, is_known, decoder, tick)
    eps = row_normal(generators, *source.shape).flatten(0, 1).to(book.mean)
    known = book.encode(spread.clamp_min(0).to(book.mean.device), eps)
    passage = LatentPassage(model, source.draw, known, is_known, adjust)
    weights = Weights.uniform(num, particles)
    weights.add(passage.prefill())
    if tick is not None:
        for _ in range(passage.at):
            tick()
    particle_filter(passage, weights, generators, source, tick)
    weights.add(source.log_factor(model.prior.patch.inverse(passage.noise)))
    chosen = _chosen(weights, generators)
    z = model.prior.patch.inverse(passage.values)[chosen]
    tokens = torch.where(given == BLANK, book.decode(z).cpu(), given).to(z.device)
    # the states of these latents, and not the draws above: what is given has changed them
    states = model.prior.states(z)[0][::-1] if return_passes else ()
    work = [*source.work, Inverted(passage.values, "sequential", passage.num_positions)]
    return _generation(model, tokens[:, :num_tokens], states, work, return_passes, **_summary(weights))


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
    """The row of one particle of every sample, drawn by weight."""
    picks = [resample(log_w, 1, g) for log_w, g in zip(weights.log_w, generators, strict=True)]
    return torch.cat(picks) + torch.arange(len(picks)) * weights.log_w.shape[1]


def _summary(weights: Weights) -> dict[str, Tensor]:
    return {"log_evidence": weights.total(), "ess": weights.effective(), "draws": weights.draws}


def num_ticks(model: LanguageModel, num_tokens: int) -> int:
    """How often `generate` calls `tick`."""
    positions = -(-num_tokens // model.config.patch)
    return positions * model.num_blocks


def _given(
    model: LanguageModel, num: int, num_tokens: int, prompt: Tensor | None, template: Tensor | None, particles: int
) -> Tensor:
    """What is given of every sample: [num, T], a whole number of patches, on the CPU, BLANK elsewhere."""
    context, vocab_size, patch = model.config.context, model.config.vocab_size, model.config.patch
    for name, value, what in (("num", num, "sample"), ("length", num_tokens, "token"), ("particles", particles, "")):
        if value < 1:
            raise UserError(f"{name} {value}: " + (f"ask for at least 1 {what}" if what else "must be at least 1"))
    if num_tokens > context:
        raise UserError(f"length {num_tokens}: the model was trained on {context} tokens; ask for no more")
    given = torch.full((num, -(-num_tokens // patch) * patch), BLANK)
    if prompt is not None and template is not None:
        raise UserError("both a prompt and a template: put the prompt at the start of the template")
    if prompt is not None and len(prompt) >= num_tokens:
        raise UserError(
            f"the prompt has {len(prompt)} tokens, which leaves no room in {num_tokens}: "
            f"shorten it, or raise the length (at most {context})"
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
        raise UserError(f"the {name} {tokens.tolist()} has tokens outside of 0 to {vocab_size - 1}: encode it anew")
    given[:, : tokens.shape[-1]] = tokens.cpu()
    return given
