"""TarFlowLM: a Gaussian codebook and a prior of stacked autoregressive flows, trained by the
ELBO.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Generator, Tensor, nn

from tarflowlm.checks import check_model
from tarflowlm.errors import UserError
from tarflowlm.flow import full_precision
from tarflowlm.flow.channelwise import AffineCoupling, Mix1Coupling
from tarflowlm.flow.codebook import Codebook, NoisyCodebook
from tarflowlm.flow.couplings import Coupling
from tarflowlm.flow.mixd import MixDCoupling
from tarflowlm.flow.numerics import standard_normal_log_prob
from tarflowlm.flow.stack import FlowBlock, Order, Prior
from tarflowlm.flow.transformer import KVCache
from tarflowlm.language_model import LanguageModel
from tarflowlm.model_config import COUPLINGS, FlowConfig


@dataclass(frozen=True)
class ElboTerms:
    """The terms of one sample of the ELBO, each [B], in nats (docs/math.md, eqs. 3 and 11).

    log p(x) >= E[ reconstruction - log_q + base + sum_l log_dets[l] ] = E[ -nelbo ]
    """

    reconstruction: Tensor  # log p(x | z); near zero where the codebook is well separated.
    log_q: Tensor  # log q(z | x).
    base: Tensor  # log N(u; 0, I).
    log_dets: tuple[Tensor, ...]  # log|det J_l| of every block, block 1 first.

    @property
    def log_prior(self) -> Tensor:
        """log p(z) = base + sum_l log_dets[l] (docs/math.md, eq. 4)."""
        return self.base + sum(self.log_dets, start=torch.zeros_like(self.base))

    @property
    def nelbo(self) -> Tensor:
        """The negative ELBO; in expectation an upper bound on -log p(x)."""
        return -(self.reconstruction - self.log_q + self.log_prior)


class TarFlowLM(LanguageModel):
    """A language model in continuous space: `codebook` is q(z|x) and p(x|z), `prior` is p(z)
    (docs/math.md).

    Initial weights come from PyTorch's global generator; construct it inside `seeded` to reproduce
    them.
    """

    is_exact = False
    config: FlowConfig

    def __init__(self, config: FlowConfig) -> None:
        super().__init__(config)
        self.codebook = Codebook(config.vocab_size, config.latent_dim, separation=config.separation)
        self.prior = Prior(config.patch, ())
        for _ in config.blocks:
            self.append_block()

    @property
    def num_blocks(self) -> int:
        return len(self.prior.blocks)

    def append_block(self) -> FlowBlock:
        config, index = self.config, self.num_blocks
        shape: dict[str, Any] = {"trunk": config.trunk, "num_layers": config.blocks[index].layers}
        shape |= {
            "channels": config.patch * config.latent_dim,
            "mix": index if config.mixes_channels else 0,
        }
        shape["codebook"] = (
            self._book(index)
            if config.reads_tokens and (index == 0 or config.fills(index))
            else None
        )
        block = FlowBlock(
            coupling=self._coupling(index), reverse=config.alternate and index % 2 == 1, **shape
        )
        if index and isinstance(below := self.couplings[-1], MixDCoupling):
            below.certainty = config.blocks[
                index - 1
            ].certainty  # as the last block it was the model of all tokens
        self.prior.blocks.append(block.to(self.codebook.mean.device))
        return block

    def _book(self, index: int) -> Codebook | NoisyCodebook:
        """The components of the latents that block `index` (0-based) sees."""
        return NoisyCodebook(self.codebook) if self.config.fills(index) else self.codebook

    def _coupling(self, index: int) -> Coupling:
        config, block, width = self.config, self.config.blocks[index], self.config.trunk.width
        channelwise: dict[str, Any] = {"width": width, "channels": config.patch * config.latent_dim}
        channelwise |= {"hidden": config.head_hidden, "features": config.head_features}
        channelwise["full"] = config.head == "full"
        mix, by_token = index if config.mixes_channels else 0, block.coupling == "token-affine"
        channelwise["autoregressive"] = block.sees_channels and (block.sees_tokens or not by_token)
        if not block.sees_tokens and not by_token:
            channelwise["tokens"] = (
                Order(channelwise["channels"], mix=mix).channels // config.latent_dim
            )
        if block.coupling in ("affine", "token-affine"):
            return AffineCoupling(
                group=1 if block.coupling == "affine" else config.latent_dim, **channelwise
            )
        if block.coupling == "mix1":
            mix1 = Mix1Coupling(
                components=block.components, spread=0.95 if index == 0 else 0.3, **channelwise
            )
            if index == 0 and block.components == config.vocab_size and block.start != "plain":
                mix1.start_from(self.codebook, evidence=0.1 if block.start == "flattened" else 1.0)
            return mix1
        if block.coupling == "mixd":
            shape: dict[str, Any] = {
                "width": width,
                "patch": config.patch,
                "latent_dim": config.latent_dim,
            }
            shape |= {
                "components": block.components,
                "tied": None if block.components else self._book(index),
            }
            mixd = MixDCoupling(in_patch=config.in_patch == "autoregressive", **shape)
            is_mixed = config.patch > 1 and config.mixes_channels  # tokens, then, not only channels
            if block.components == config.vocab_size and block.start != "plain" and not is_mixed:
                means = Order(config.latent_dim, mix=mix)(self.codebook.mean[None])[0][0]
                mixd.start_from(means, self.codebook.log_std)
            return mixd
        build = COUPLINGS[block.coupling].build
        assert build is not None
        coupling: Coupling = build(components=block.components, **channelwise)
        return coupling

    def draw_noise(
        self, tokens: Int[Tensor, "B T"], generator: Generator | None = None
    ) -> Float[Tensor, "B T d"]:
        """Noise eps ~ N(0, I) for one posterior sample, drawn on the generator's device (else on
        the model's).
        """
        mean, shape = self.codebook.mean, (*tokens.shape, self.config.latent_dim)
        where = generator.device if generator is not None else mean.device
        return torch.randn(shape, generator=generator, dtype=mean.dtype, device=where).to(
            mean.device
        )

    def elbo(
        self, tokens: Int[Tensor, "B T"], noise: Float[Tensor, "B T d"]
    ) -> tuple[ElboTerms, list[Tensor]]:
        """One sample of the ELBO in its terms (docs/math.md, eq. 11), and the states h^(0), ...,
        h^(L) [B, T, d].
        """
        with full_precision(noise):
            z = self.codebook.encode(tokens, noise)
            reconstruction = self.codebook.log_likelihood(tokens, z).sum(-1)
        states, log_dets = self.prior.states(z)
        log_q, base = (
            self.codebook.log_q(tokens, noise).sum(-1),
            standard_normal_log_prob(states[-1]),
        )
        return ElboTerms(
            reconstruction, log_q, base, tuple(log_det.sum(-1) for log_det in log_dets)
        ), states

    def bound(
        self,
        tokens: Int[Tensor, "B T"],
        noise: Float[Tensor, "B T d"],
        *,
        per_token: bool = False,
        frozen: int = 0,
    ) -> Float[Tensor, "B ..."]:
        """One sample of the negative ELBO in nats: the `nelbo` of `elbo`, in fewer steps
        (docs/math.md, eq. 11a).

        If a single block is a mixture of the codebook's components (eq. 12), one pass over these
        gives both sums. Arguments as in `LanguageModel.bound`.
        """
        relative = self.num_blocks == 1 and self.prior.block(0).coupling.is_tied and frozen == 0
        with torch.set_grad_enabled(torch.is_grad_enabled() and frozen == 0), full_precision(noise):
            z = self.codebook.encode(tokens, noise)
            log_normaliser = None if relative else self.codebook.log_normaliser(z)
        log_p = self.prior.log_prob(z, frozen=frozen, per_position=per_token, relative=relative)
        if per_token:
            log_p = log_p.repeat_interleave(self.config.patch, dim=1) / self.config.patch
        if log_normaliser is None:
            return -log_p
        return (log_normaliser if per_token else log_normaliser.sum(-1)) - log_p

    def allocate_cache(self, batch: int, num_positions: int) -> KVCache:
        return self.prior.block(0).allocate_cache(batch, num_positions)

    def features_at(
        self, cache: KVCache, previous: Tensor | None, batch: int
    ) -> Float[Tensor, "B D"]:
        """Features in block 1 of the next position, given the latents [B, C] before it (None at the
        start).
        """
        return self.prior.block(0).features_at(cache, previous, batch)

    def token_vectors(self) -> tuple[Float[Tensor, "V dim"], Float[Tensor, " V"] | None]:
        """The codebook: mu [V, d] and log sigma [V]."""
        return self.codebook.mean, self.codebook.log_std

    @property
    def couplings(self) -> list[Coupling]:
        """The couplings, block 1 first."""
        return [self.prior.block(index).coupling for index in range(self.num_blocks)]

    def blocks_from(self, first: int) -> Iterable[nn.Module]:
        """The blocks after the first `first`; the whole model, codebook included, for 0."""
        return self.prior.blocks[first:] if first else (self,)


NO_LATENTS = "this model is the discrete baseline, which has no latents: give a TarFlowLM"


def as_flow(model: LanguageModel, refusal: str = NO_LATENTS) -> TarFlowLM:
    """`model`, narrowed to TarFlowLM; UserError with the message `refusal` for the baseline, and
    for no model.
    """
    check_model(model)
    if not isinstance(model, TarFlowLM):
        raise UserError(refusal)
    return model
