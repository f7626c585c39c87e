"""Bounds on -log p(x): the ELBO, bounds on a continuation, and the importance-weighted bound. Everything in nats."""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tarflowlm.errors import UserError
from tarflowlm.language_model import LanguageModel
from tarflowlm.model import ElboTerms, TarFlowLM


def elbo(
    model: TarFlowLM,
    tokens: Int[Tensor, "B T"],
    *,
    generator: torch.Generator | None = None,
    noise: Float[Tensor, "B T d"] | None = None,
) -> ElboTerms:
    """Eq. 11 of docs/math.md with all its parts, from one posterior sample per token.

    `noise` fixes the sample; without it, it is drawn with `generator`.
    """
    return model.elbo(tokens, model.draw_noise(tokens, generator) if noise is None else noise)[0]


def negative_bound(
    model: LanguageModel,
    tokens: Int[Tensor, "B T"],
    *,
    generator: torch.Generator | None = None,
    noise: Float[Tensor, "B T d"] | None = None,
    frozen: int = 0,
    equal_cotangents: bool = False,
) -> Float[Tensor, " B"]:
    """-log p(x) of the baseline, or one sample of its upper bound: the `nelbo` of `elbo`, without its parts.

    `frozen` and `equal_cotangents` are those of `LanguageModel.negative_bound`.
    """
    noise = model.draw_noise(tokens, generator) if noise is None else noise
    return model.negative_bound(tokens, noise, frozen=frozen, equal_cotangents=equal_cotangents)


def conditional_bound(
    model: LanguageModel,
    tokens: Int[Tensor, "B T"],
    given: int,
    *,
    generator: torch.Generator | None = None,
    noise: Float[Tensor, "B T d"] | None = None,
) -> Float[Tensor, " B"]:
    r"""-log p(y | c) of the baseline, or one sample of its upper bound; c the first `given` tokens, y the rest.

    With one left-to-right block, p(z_y | z_c) = p(z_c, z_y) / p(z_c) is known, and

        -log p(y | c) <= E_q[ log q(z_y | y) - log p(y | z_y) - log p(z_y | z_c) ],
        p(y | c) = E_{q(z_c | c)} int p(z_y | z_c) p(y | z_y) dz_y

    by Jensen's inequality. p(y | c) sums to one over y: it is what a sampler predicts after the prompt c, whose
    latents come from the encoder (docs/evaluation.md, with the proof). By causality one sample is a difference of two
    samples of `negative_bound` with the same noise. Between different noises, or with more blocks, that difference
    bounds nothing: blocks that run right to left let the latents of c depend on y.

    Raises UserError for a flow of several blocks, and where `given` is outside 0 .. T - 1 or cuts a patch.
    """
    T, patch = tokens.shape[1], model.config.patch
    if not 0 <= given < T or given % patch:
        raise UserError(f"given {given}: must be 0 .. {T - 1} and a multiple of the patch {patch}")
    return model.conditional_bound(tokens, given, model.draw_noise(tokens, generator) if noise is None else noise)


def log_importance_weights(
    model: LanguageModel,
    tokens: Int[Tensor, "B T"],
    *,
    samples: int,
    generator: torch.Generator | None = None,
    given: int = 0,
) -> Float[Tensor, "S B"]:
    """log p(x, z_s) / q(z_s | x) in nats for z_1, ..., z_S ~ q; of the tokens after the first `given`, given those.

    The baseline has one row, which is exact. Errors as `conditional_bound`.
    """
    if samples < 1:
        raise UserError(f"samples {samples}: must be at least 1")
    draws = 1 if model.is_exact else samples
    return -torch.stack([conditional_bound(model, tokens, given, generator=generator) for _ in range(draws)])


def importance_weighted(log_weights: Float[Tensor, "S B"]) -> Float[Tensor, " B"]:
    """-log (1/S) sum_s w_s from `log_importance_weights` (docs/math.md, eq. 13; Burda et al. 2016).

    An upper bound on -log p(x) in expectation that falls with S; S = 1 is the negative ELBO.
    """
    return math.log(len(log_weights)) - log_weights.logsumexp(0)


def importance_weighted_bound(
    model: LanguageModel,
    tokens: Int[Tensor, "B T"],
    *,
    samples: int,
    generator: torch.Generator | None = None,
) -> Float[Tensor, " B"]:
    """The importance-weighted bound per sequence, in nats, from `samples` posterior samples. Errors as above."""
    return importance_weighted(log_importance_weights(model, tokens, samples=samples, generator=generator))
