"""The evidence lower bound per sequence, and what it is made of. Everything in nats."""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tarflowlm.baseline import TokenLM
from tarflowlm.errors import UserError
from tarflowlm.flow.couplings import standard_normal_log_prob
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
    eps = posterior_noise(model, tokens, generator) if noise is None else noise
    with full_precision(eps):
        z = model.codebook.encode(tokens, eps)
        log_posterior = model.codebook.log_posterior(z)
    reconstruction = log_posterior.gather(-1, tokens[..., None]).squeeze(-1).sum(-1)
    states, log_dets = model.prior.states(z)
    return ElboTerms(
        reconstruction=reconstruction,
        log_q=model.codebook.log_q(tokens, eps).sum(-1),
        base=standard_normal_log_prob(states[-1]),
        log_dets=tuple(log_dets),
    )


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

    log p(x|z) - log q(z|x) = -log sum_j N_j(z) for every token, and the last block needs its density alone.
    The first `frozen` blocks, and with them the codebook, get no gradient.
    `equal_cotangents` promises a loss that weights all sequences alike, such as a mean (`Coupling.log_prob`).
    """
    if isinstance(model, TokenLM):
        return -model.log_prob(tokens)
    eps = posterior_noise(model, tokens, generator) if noise is None else noise
    with torch.set_grad_enabled(torch.is_grad_enabled() and frozen == 0), full_precision(eps):
        z = model.codebook.encode(tokens, eps)
        log_normaliser = model.codebook.log_normaliser(z).sum(-1)
    return log_normaliser - model.prior.log_prob(z, frozen=frozen, equal_cotangents=equal_cotangents)


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
    if samples < 1:
        raise UserError(f"samples {samples}: must be at least 1")
    if isinstance(model, TokenLM):
        return negative_bound(model, tokens)
    log_weights = [-negative_bound(model, tokens, generator=generator) for _ in range(samples)]
    return math.log(samples) - torch.stack(log_weights).logsumexp(0)
