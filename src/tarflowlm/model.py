"""TarFlowLM: a Gaussian codebook and a prior of autoregressive flows, trained by the ELBO."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Generator, Tensor, nn

from tarflowlm.errors import UserError
from tarflowlm.flow import full_precision
from tarflowlm.flow.codebook import Codebook
from tarflowlm.flow.couplings import coupling_class
from tarflowlm.flow.mixd import MixDCoupling
from tarflowlm.flow.numerics import standard_normal_log_prob
from tarflowlm.flow.plan import BlockPlan
from tarflowlm.flow.stack import FlowBlock, Prior
from tarflowlm.language_model import LanguageModel, check_model
from tarflowlm.model_config import FlowConfig


@dataclass(frozen=True)
class ElboTerms:
    """The terms of one sample of the ELBO, each [B], in nats (docs/math.md, eqs. 3 and 11).

    log p(x) >= E[ reconstruction - log_q + base + sum_l log_dets[l] ] = E[ -nelbo ]
    """

    reconstruction: Tensor
    """log p(x | z); near zero where the codebook is well separated."""
    log_q: Tensor
    """log q(z | x)."""
    base: Tensor
    """log N(u; 0, I)."""
    log_dets: tuple[Tensor, ...]
    """log|det J_l| of every block, block 1 first."""

    @property
    def log_prior(self) -> Tensor:
        """log p(z) = base + sum_l log_dets[l] (docs/math.md, eq. 4)."""
        return self.base + sum(self.log_dets, start=torch.zeros_like(self.base))

    @property
    def nelbo(self) -> Tensor:
        """The negative ELBO; in expectation an upper bound on -log p(x)."""
        return -(self.reconstruction - self.log_q + self.log_prior)


class TarFlowLM(LanguageModel):
    """A language model in continuous space (docs/math.md).

    `codebook` is q(z|x) and p(x|z), `prior` is p(z). Initial weights come from PyTorch's global
    generator.

    Example:
        >>> model = TarFlowLM(FlowConfig(vocab_size=27, context=8))
        >>> tokens = torch.randint(27, (2, 8))
        >>> model(tokens).shape  # a bound on -log p(x) of every text, in nats
        torch.Size([2])
        >>> u, log_det = model.prior(model.codebook.encode(tokens, model.draw_noise(tokens)))
        >>> u.shape
        torch.Size([2, 8, 8])
    """

    is_exact = False
    config: FlowConfig

    def __init__(self, config: FlowConfig, *, means: Tensor | None = None) -> None:
        """`means` [V, d] spare the search for well separated ones where weights are loaded."""
        super().__init__(config)
        self.codebook = Codebook(
            config.vocab_size, config.latent_dim, separation=config.separation, mean=means
        )
        self.prior = Prior(config.patch, ())
        for _ in config.blocks:
            self.append_block()

    @property
    def num_blocks(self) -> int:
        return len(self.prior.blocks)

    @property
    def conditioner(self) -> FlowBlock:
        return self.prior.block(0)

    def append_block(self) -> FlowBlock:
        """Build the next block; one below it with `certainty` then only fills in (eq. 9a)."""
        plan = BlockPlan(self.config, self.num_blocks, self.codebook)
        block = FlowBlock(
            trunk=self.config.trunk,
            num_layers=plan.block.layers,
            order=plan.order,
            coupling=coupling_class(plan.block.coupling).build(plan),
            codebook=plan.token_reader,
        )
        if plan.index > 0:
            below = self.prior.block(plan.index - 1)
            if isinstance(below.coupling, MixDCoupling):
                below.coupling.certainty = self.config.blocks[plan.index - 1].certainty
        self.prior.blocks.append(block.to(self.codebook.mean.device))
        return block

    def draw_noise(
        self, tokens: Int[Tensor, "B T"], generator: Generator | None = None
    ) -> Float[Tensor, "B T d"]:
        mean = self.codebook.mean
        return torch.randn(
            *tokens.shape,
            self.config.latent_dim,
            generator=generator,
            dtype=mean.dtype,
            device=mean.device if generator is None else generator.device,
        ).to(mean.device)

    def elbo(
        self, tokens: Int[Tensor, "B T"], noise: Float[Tensor, "B T d"]
    ) -> tuple[ElboTerms, list[Tensor]]:
        """One sample of the ELBO in its terms, and the states h^(0), ..., h^(L) [B, T, d]."""
        with full_precision(noise):
            z = self.codebook.encode(tokens, noise)
            reconstruction = self.codebook.log_likelihood(tokens, z).sum(-1)
        states, log_dets = self.prior.states(z)
        terms = ElboTerms(
            reconstruction=reconstruction,
            log_q=self.codebook.log_q(tokens, noise).sum(-1),
            base=standard_normal_log_prob(states[-1]),
            log_dets=tuple(log_det.sum(-1) for log_det in log_dets),
        )
        return terms, states

    def bound(
        self,
        tokens: Int[Tensor, "B T"],
        noise: Float[Tensor, "B T d"],
        *,
        per_token: bool = False,
        frozen: int = 0,
    ) -> Float[Tensor, "B ..."]:
        """One sample of the negative ELBO, in nats (docs/math.md, eq. 11a).

        If a single block is a mixture of the codebook's components (eq. 12), one pass over these
        gives both sums.
        """
        block = self.prior.block(0)
        tied = block.coupling
        if self.num_blocks == 1 and isinstance(tied, MixDCoupling) and tied.is_tied and not frozen:
            with full_precision(noise):
                z = self.prior.patch(self.codebook.encode(tokens, noise))
            return -self._summed([tied.log_prob(z, block.features(z), relative=True)], per_token)
        with torch.set_grad_enabled(torch.is_grad_enabled() and frozen == 0), full_precision(noise):
            z = self.codebook.encode(tokens, noise)
            log_normaliser = self.codebook.log_normaliser(z)
        log_p = self._summed(self.prior.log_prob_parts(z, frozen=frozen), per_token)
        return (log_normaliser if per_token else log_normaliser.sum(-1)) - log_p

    def _summed(self, parts: list[Tensor], per_token: bool) -> Tensor:
        """The sum of parts [B, N]: over positions [B], or shared out among tokens [B, T]."""
        if not per_token:
            parts = [part.sum(-1) for part in parts]
        total = sum(parts[1:], start=parts[0])
        patch = self.config.patch
        return total.repeat_interleave(patch, dim=1) / patch if per_token else total

    def blocks_from(self, first: int) -> Iterable[nn.Module]:
        return self.prior.blocks[first:] if first else (self,)


def as_flow(
    model: LanguageModel, refusal: str = "the discrete baseline has no latents: give a TarFlowLM"
) -> TarFlowLM:
    """`model`, narrowed to TarFlowLM. UserError `refusal` for the baseline."""
    check_model(model)
    if not isinstance(model, TarFlowLM):
        raise UserError(refusal)
    return model
