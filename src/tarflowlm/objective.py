"""The evidence lower bound per sequence, and what it is made of. Everything in nats."""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tarflowlm.baseline import TokenLM
from tarflowlm.errors import UserError
from tarflowlm.flow.numerics import standard_normal_log_prob
from tarflowlm.flow.precision import full_precision
from tarflowlm.model import TarFlowLM


@dataclass(frozen=True)
class ElboTerms:
    """One sample of the bound for every sequence of a batch (docs/math.md, eqs. 3 and 11); tensors [B], nats.

    log p(x) >= E[ reconstruction - log_q + base + sum_l log_dets[l] ] = E[ -nelbo ].
    """

    reconstruction: Tensor
    """log p(x | z): near zero where the codebook is well separated."""
    log_q: Tensor
    """log q(z | x)."""
    base: Tensor
    """log N(u; 0, I)."""
    log_dets: tuple[Tensor, ...]
    """log|det J| of every block, block 1 first."""

    @property
    def log_prior(self) -> Tensor:
        """log p(z) = base + sum of log-dets."""
        return self.base + sum(self.log_dets, start=torch.zeros_like(self.base))

    @property
    def nelbo(self) -> Tensor:
        """The negative bound: -log p(x) is at most this in expectation."""
        return -(self.reconstruction - self.log_q + self.log_prior)


def posterior_noise(
    model: TarFlowLM, tokens: Int[Tensor, "B T"], generator: torch.Generator | None
) -> Float[Tensor, "B T d"]:
    """The noise eps ~ N(0, I) of the reparametrised sample z = mu_x + sigma_x eps."""
    mean = model.codebook.mean
    where = generator.device if generator is not None else mean.device
    noise = torch.randn(*tokens.shape, mean.shape[1], generator=generator, dtype=mean.dtype, device=where)
    return noise.to(mean.device)


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
    return elbo_and_states(model, tokens, posterior_noise(model, tokens, generator) if noise is None else noise)[0]


def elbo_and_states(
    model: TarFlowLM, tokens: Int[Tensor, "B T"], noise: Float[Tensor, "B T d"]
) -> tuple[ElboTerms, list[Tensor]]:
    """The terms of `elbo`, and the states h^(0) = z, ..., h^(L) = u [B, T, d] that they are of."""
    with full_precision(noise):
        z = model.codebook.encode(tokens, noise)
        reconstruction = model.codebook.log_likelihood(tokens, z).sum(-1)
    states, log_dets = model.prior.states(z)
    terms = ElboTerms(
        reconstruction=reconstruction,
        log_q=model.codebook.log_q(tokens, noise).sum(-1),
        base=standard_normal_log_prob(states[-1]),
        log_dets=tuple(log_dets),
    )
    return terms, states


def negative_bound(
    model: TarFlowLM | TokenLM,
    tokens: Int[Tensor, "B T"],
    *,
    generator: torch.Generator | None = None,
    noise: Float[Tensor, "B T d"] | None = None,
    frozen: int = 0,
    equal_cotangents: bool = False,
) -> Float[Tensor, " B"]:
    """-log p(x) of the baseline, or one sample of its upper bound (the nelbo of `elbo`, by the shortest way).

    log p(x|z) - log q(z|x) = -log sum_j N_j(z) for every token, and the last block needs its density alone. Where
    that is a mixture of the same components (eq. 12), one sweep over the codebook gives both.
    The first `frozen` blocks, and with them the codebook, get no gradient.
    `equal_cotangents` promises a loss that weights all sequences alike, such as a mean (`Coupling.log_prob`).
    """
    if isinstance(model, TokenLM):
        return -model.log_prob(tokens)
    eps = posterior_noise(model, tokens, generator) if noise is None else noise
    with torch.set_grad_enabled(torch.is_grad_enabled() and frozen == 0), full_precision(eps):
        z = model.codebook.encode(tokens, eps)
        relative = model.prior.is_one_tied_mixture and frozen == 0
        log_normaliser = 0.0 if relative else model.codebook.log_normaliser(z).sum(-1)
    return log_normaliser - model.prior.log_prob(
        z, frozen=frozen, equal_cotangents=equal_cotangents, relative=relative
    )


def conditional_bound(
    model: TarFlowLM | TokenLM,
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
    if isinstance(model, TokenLM):
        return -model.token_log_prob(tokens)[:, given:].sum(-1)
    if given and model.num_blocks > 1:
        raise UserError(
            f"a flow of {model.num_blocks} blocks has no known bound on new tokens given earlier ones (only one of a "
            f"single block has): evaluate it in fresh contexts"
        )
    eps = posterior_noise(model, tokens, generator) if noise is None else noise
    bound = negative_bound(model, tokens, noise=eps)
    return bound - negative_bound(model, tokens[:, :given], noise=eps[:, :given]) if given else bound


def log_importance_weights(
    model: TarFlowLM | TokenLM,
    tokens: Int[Tensor, "B T"],
    *,
    samples: int,
    generator: torch.Generator | None = None,
    given: int = 0,
) -> Float[Tensor, "K B"]:
    """log p(x, z_k) / q(z_k | x) in nats for z_1, ..., z_K ~ q; of the tokens after the first `given`, given those.

    Their mean over k is the ELBO, the logarithm of the mean of their exponentials the importance-weighted bound. The
    baseline has one row, which is exact. Errors as `conditional_bound`.
    """
    if samples < 1:
        raise UserError(f"samples {samples}: must be at least 1")
    draws = 1 if isinstance(model, TokenLM) else samples
    return -torch.stack([conditional_bound(model, tokens, given, generator=generator) for _ in range(draws)])


def importance_weighted_bound(
    model: TarFlowLM | TokenLM,
    tokens: Int[Tensor, "B T"],
    *,
    samples: int,
    generator: torch.Generator | None = None,
) -> Float[Tensor, " B"]:
    """-log (1/K) sum_k p(x, z_k) / q(z_k | x), z_k ~ q, per sequence in nats (docs/math.md, eq. 13).

    An upper bound on -log p(x) in expectation that falls with K; K = 1 is the negative ELBO (Burda et al. 2016).
    """
    log_weights = log_importance_weights(model, tokens, samples=samples, generator=generator)
    return math.log(len(log_weights)) - log_weights.logsumexp(0)
