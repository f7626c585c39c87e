"""Bounds on -log p(x), in nats: of texts, of continuations, and importance-weighted ones."""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tarflowlm import chunks
from tarflowlm.errors import UserError
from tarflowlm.model import ElboTerms, LanguageModel, as_flow, check_tokens
from tarflowlm.schema import Million, check_generator, check_type, checked


def elbo(
    model: LanguageModel,
    tokens: Int[Tensor, "B T"],
    *,
    generator: torch.Generator | None = None,
    noise: Float[Tensor, "B T d"] | None = None,
) -> ElboTerms:
    """One sample of the ELBO in its terms (docs/math.md, eq. 11).

    `noise` fixes the posterior sample, else `generator` draws it. UserError for the baseline.

    Example:
        >>> from tarflowlm import FlowConfig, TarFlowLM
        >>> from tarflowlm.model import seeded
        >>> with seeded(0):
        ...     model = TarFlowLM(FlowConfig(vocab_size=27, context=8))
        >>> tokens = torch.arange(8).view(1, 8)
        >>> terms = elbo(model, tokens, generator=torch.Generator().manual_seed(0))
        >>> terms.reconstruction.item() > -1e-6  # the codes are far apart
        True
        >>> round(terms.nelbo.item() / 8, 2), round(math.log(27), 2)  # a new model knows nothing
        (3.3, 3.3)
    """
    flow = as_flow(model, "elbo of the discrete baseline: model.log_prob(tokens) is exact")
    check_tokens(flow, tokens)
    check_generator(generator)
    drawn = flow.draw_noise(tokens, generator) if noise is None else noise
    check_type(drawn, "noise", Tensor, "give a tensor [B, T, d]")
    if drawn.dtype != flow.codebook.mean.dtype:
        raise UserError(f"noise of type {drawn.dtype}: give {flow.codebook.mean.dtype}")
    return flow.terms(tokens, drawn)[0].of_texts()


def conditional_bound(
    model: LanguageModel, tokens: Int[Tensor, "B T"], given: int, noise: Float[Tensor, "B T d"]
) -> Float[Tensor, " B"]:
    r"""-log p(x_> | x_<=) of the baseline, or one sample of an upper bound of a flow; in nats.

    x_<= are the first `given` tokens, x_> the others, z_<= and z_> their latents. A flow of one
    left-to-right block has a known p(z_> | z_<=) = p(z_<=, z_>) / p(z_<=), and by Jensen's
    inequality (docs/math.md, section 6)

        p~(x_> | x_<=) = E_{q(z_<= | x_<=)} int p(z_> | z_<=) p(x_> | z_>) dz_>
        -log p~(x_> | x_<=) <= E_q[ log q(z_> | x_>) - log p(x_> | z_>) - log p(z_> | z_<=) ]

    p~ sums to one over x_>, and samples after the prompt x_<= follow it. UserError for a flow of
    several blocks, and if `given` is outside 0 .. T - 1 or not a multiple of P.
    """
    T, patch = tokens.shape[1], model.config.patch
    if not 0 <= given < T or given % patch:
        raise UserError(f"given {given}: must be 0 .. {T - 1} and a multiple of the patch {patch}")
    if given == 0:
        return model.bound(tokens, noise)
    if model.num_blocks > 1:
        what = f"no bound is known for {model.num_blocks} blocks on tokens given earlier ones"
        raise UserError(f"{what}: evaluate them in fresh contexts")
    return model.bound(tokens, noise, per_token=True)[:, given:].sum(-1)


def log_importance_weights(
    model: LanguageModel,
    tokens: Int[Tensor, "B T"],
    *,
    samples: int,
    generator: torch.Generator | None = None,
    given: int = 0,
) -> Float[Tensor, "S B"]:
    """log p(x, z^r) / q(z^r | x) for S = `samples` draws z^r ~ q, in nats (docs/math.md, eq. 13).

    With `given` > 0 they are weights of the tokens after the first `given`, conditional on these
    (`conditional_bound`). The baseline gives one row, its exact log p(x).
    """
    samples = checked(samples, Million, "samples")
    rows = chunks.bound_rows(tokens.shape[1], tokens.device)
    bounds = []
    for _ in range(1 if model.is_exact else samples):
        # drawn for all rows at once, so that the numbers do not depend on the parts
        noise = model.draw_noise(tokens, generator)
        parts = zip(tokens.split(rows), noise.split(rows), strict=True)
        bounds.append(torch.cat([conditional_bound(model, x, given, eps) for x, eps in parts]))
    return -torch.stack(bounds)


def importance_weighted(log_weights: Float[Tensor, "S B"]) -> Float[Tensor, " B"]:
    """-log (1/S) sum_r omega_r from the log omega_r of `log_importance_weights`, in nats.

    In expectation an upper bound on -log p(x) that falls with S; S = 1 is the negative ELBO
    (docs/math.md, eq. 13; Burda et al. 2016).
    """
    return math.log(len(log_weights)) - log_weights.logsumexp(0)


def importance_weighted_bound(
    model: LanguageModel,
    tokens: Int[Tensor, "B T"],
    *,
    samples: int,
    generator: torch.Generator | None = None,
) -> Float[Tensor, " B"]:
    """The bound on -log p(x) from `samples` posterior samples, in nats (docs/math.md, eq. 13)."""
    check_tokens(model, tokens)
    check_generator(generator)
    log_weights = log_importance_weights(model, tokens, samples=samples, generator=generator)
    return importance_weighted(log_weights)
