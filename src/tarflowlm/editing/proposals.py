"""Candidates for a span of a text, and their weights (docs/math.md, section 10, eq. 24).

Shape legend: T tokens, P patch, d channels per token, N = T / P positions, C = P d, R candidates.
"""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tarflowlm.editing.states import Encoded, inverted_below
from tarflowlm.editing.words import Span
from tarflowlm.errors import UserError
from tarflowlm.flow.couplings import AdjustWeights
from tarflowlm.flow.numerics import standard_normal_log_prob
from tarflowlm.generation.conditioned import ConditionedLatents
from tarflowlm.generation.sampling import adjust_weights
from tarflowlm.model import TarFlowLM


@torch.no_grad()
def propose(
    model: TarFlowLM,
    text: Encoded,
    span: Span,
    *,
    candidates: int,
    temperature: float = 1.0,
    generator: torch.Generator,
) -> tuple[Float[Tensor, "R T d"], Int[Tensor, "R T"], Float[Tensor, " R"]]:
    """R candidates for a span of the text [1, T]: latents, tokens, and log-weights in float64 on the CPU, in nats.

    The noise of the span is standard normal, so that a candidate has the density prod_t p(z_t | z_<t) of block 1.
    Its weight is p(z) over that: the densities of block 1 behind the span, times p_{>1}(h) / N(h; 0, I) for the noise
    h = h^(1) of the whole text. At another temperature h keeps the noise that was drawn in the span.
    """
    start, stop = span
    patch, prior = model.config.patch, model.prior
    known, before = prior.patch(text.states[0])[0], prior.patch(text.states[1])[0]
    first, end = start // patch, -(-stop // patch)
    R, (T, d) = candidates, text.states[0].shape[1:]
    noise = torch.randn(R, T, d, generator=generator, device=generator.device).to(known)
    is_known = torch.ones(R, T, dtype=torch.bool)
    is_known[:, start:stop] = False
    passage = ConditionedLatents(
        model, noise, text.states[0].expand(R, -1, -1), is_known, _adjustment(model, temperature)
    )
    passage.settle(known, first)
    passage.noise[:, :first] = before[:, :first]
    log_w = noise.new_zeros(R)
    while passage.at < end:
        log_p = passage.step()
        log_w = log_w if log_p is None else log_w + log_p
    if end < passage.num_positions:
        behind = known[:, end:].expand(R, -1, -1)
        features = passage.block.features_of(
            passage.cache, torch.cat((passage.values[:, end - 1 : end], behind[:, :-1]), 1), first=False
        )
        passage.noise[:, end:], log_det = passage.block.coupling(behind, features)
        passage.values[:, end:] = behind
        log_w = log_w + log_det.sum(-1) + standard_normal_log_prob(passage.noise[:, end:])
    z, h = prior.patch.inverse(passage.values), prior.patch.inverse(passage.noise)
    if model.num_blocks > 1:
        log_w = log_w + prior.log_prob(h, above=1) - standard_normal_log_prob(passage.noise)
    tokens = torch.where(is_known.to(z.device), text.tokens, model.codebook.decode(z))
    return z, tokens, log_w.double().cpu().nan_to_num(nan=-torch.inf)


@torch.no_grad()
def propose_state(
    model: TarFlowLM,
    text: Encoded,
    span: Span,
    *,
    level: int,
    candidates: int,
    generator: torch.Generator,
) -> tuple[Float[Tensor, "R T d"], Int[Tensor, "R T"], Float[Tensor, " R"]]:
    """R candidates for state l = `level` at a span of whole positions of the text [1, T]: as `propose`.

    They come from block l + 1, given the positions before the span in its order, with standard normal noise; so they
    have the density prod_n p(h_n | h_<n) of that block. The weight of one is p_{>l}(h) over that, for h^(l) as it was
    elsewhere. The blocks below are then inverted, in which tokens beside the span may change, too.
    """
    prior, block, patch = model.prior, model.prior.block(level), model.config.patch
    known, before = (block.order(prior.patch(text.states[i])[0])[0] for i in (level, level + 1))
    R, N = candidates, known.shape[1]
    first, end = span[0] // patch, -(-span[1] // patch)
    if block.order.reverse:
        first, end = N - end, N - first
    h, u = known.repeat(R, 1, 1), before.repeat(R, 1, 1)
    u[:, first:end] = torch.randn(R, end - first, h.shape[2], generator=generator, device=generator.device).to(u)
    cache = block.allocate_cache(R, N)
    if first:
        # what is before the span is the same for all
        one = block.allocate_cache(1, first)
        block.features_of(one, known[:, : first - 1], first=True)
        cache.copy(one)
    for n in range(first, end):
        h[:, n] = block.invert_position(u[:, n], cache, h[:, n - 1] if n else None)
    log_w = h.new_zeros(R)
    if end < N:
        features = block.features_of(cache, h[:, end - 1 : -1], first=False)
        u[:, end:], log_det = block.coupling(h[:, end:], features)
        log_w = log_det.sum(-1) + standard_normal_log_prob(u[:, end:])
    if level + 1 < model.num_blocks:
        noise = prior.patch.inverse(block.order.inverse(u))
        log_w = log_w + prior.log_prob(noise, above=level + 1) - standard_normal_log_prob(u)
    state = prior.patch.inverse(block.order.inverse(h))
    z = inverted_below(model, text.repeated(R), level, state, "auto")[-1]
    return z, model.codebook.decode(z), log_w.double().cpu().nan_to_num(nan=-torch.inf)


@torch.no_grad()
def informative_level(model: TarFlowLM, text: Encoded) -> int:
    """The state l whose block l + 1 knows most about the texts; 0 where block 1 has weights of tokens.

    What it knows is the gain in log-density over noise, log |det| + log N(h^(l+1)) - log N(h^(l)), for block 1 over
    tokens of equal probability in place of log N(z).
    """
    if model.config.has_token_weights:
        return 0
    states, log_dets = model.prior.states(text.states[0])
    log_p = [standard_normal_log_prob(h) for h in states]
    book = model.codebook
    log_p[0] = (book.log_normaliser(states[0]) - math.log(book.vocab_size)).sum(1)
    gains = [log_dets[i].sum(-1) + log_p[i + 1] - log_p[i] for i in range(model.num_blocks)]
    return int(torch.stack(gains).mean(1).argmax())


def _adjustment(model: TarFlowLM, temperature: float) -> AdjustWeights | None:
    adjust = adjust_weights(temperature)
    if adjust is not None and not model.config.has_token_weights:
        raise UserError(f"temperature {temperature}: block 1 of this model has no weights of tokens, take 1")
    return adjust
