"""TarFlowLM: a Gaussian codebook and a prior of autoregressive flows, trained by the ELBO.

`LanguageModel` is the interface that it shares with the discrete baseline.
"""

from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Generator, Tensor, nn

from tarflowlm.building import build_block
from tarflowlm.errors import UserError
from tarflowlm.flow import full_precision
from tarflowlm.flow.codebook import Codebook
from tarflowlm.flow.fills import FillsIn
from tarflowlm.flow.mixd import MixDCoupling
from tarflowlm.flow.numerics import log_standard_normal
from tarflowlm.flow.stack import FlowBlock, Prior
from tarflowlm.model_config import FlowConfig, LanguageModelConfig, MixD
from tarflowlm.schema import check_integers, check_type


class LanguageModel(nn.Module):
    """A model p(x) of token sequences x [B, T], exact or through a bound; P must divide T.

    It is trained and scored by `draw_noise` and `bound`.
    """

    config: LanguageModelConfig
    is_exact: ClassVar[bool]
    """True: `bound` is -log p(x) itself. False: it is a random upper bound."""

    def __init__(self, config: LanguageModelConfig) -> None:
        super().__init__()
        if config.vocab_size < 1:
            raise UserError("model.vocab_size 0: set it to the tokenizer's number of symbols")
        self.config = config

    @property
    def num_blocks(self) -> int:
        """Flow blocks built so far."""
        return 1

    @property
    def num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters())

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def forward(self, tokens: Int[Tensor, "B T"]) -> Float[Tensor, " B"]:
        """`bound` with fresh noise."""
        check_tokens(self, tokens)
        return self.bound(tokens, self.draw_noise(tokens))

    @abstractmethod
    def draw_noise(
        self, tokens: Int[Tensor, "B T"], generator: Generator | None = None
    ) -> Float[Tensor, "B T d"]:
        """Noise eps ~ N(0, I) for a posterior sample mu_x + sigma_x eps; d = 0 for exact models."""

    @abstractmethod
    def bound(
        self,
        tokens: Int[Tensor, "B T"],
        noise: Float[Tensor, "B T d"],
        *,
        per_token: bool = False,
        frozen: int = 0,
    ) -> Float[Tensor, "B ..."]:
        """-log p(x), or one sample of an upper bound on it, in nats: [B], or its parts [B, T].

        `per_token` asks for the parts; the tokens of a position share its part equally. The
        codebook and the first `frozen` blocks get no gradient if `frozen` is above 0.
        """

    def train_only(self, block: int) -> None:
        """Make only block `block` (0-based) trainable; 0 leaves all trainable."""
        if block > 0:
            self.requires_grad_(False)
            as_flow(self).prior.block(block).requires_grad_(True)
        for parameter in self.parameters():
            # parameters without elements, as in a head of one group, would never get a gradient
            if not parameter.numel():
                parameter.requires_grad_(False)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """A context in which PyTorch's global CPU generator starts from `seed`."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


def check_model(model: LanguageModel) -> None:
    """UserError unless `model` is a model in float32 or wider."""
    check_type(model, "model", LanguageModel, "pass lm.model, where lm = tarflowlm.load(...)")
    dtype = next(model.parameters()).dtype
    if dtype not in (torch.float32, torch.float64):
        raise UserError(f"model in {dtype}: densities need float32 or wider, take model.float()")


def check_tokens(
    model: LanguageModel, tokens: Tensor, *, name: str = "tokens", shape: str = "[B, T]"
) -> None:
    """UserError unless `tokens` are texts of the model: integers below V of this `shape`.

    [B, T] holds at most a context of tokens; one text [T] may have any length. Values on an
    accelerator are not checked: the host would wait for them.
    """
    check_model(model)
    check_integers(tokens, name, shape)
    size = f"{name} of shape {list(tokens.shape)}"
    if not tokens.numel():
        raise UserError(f"{size}: give at least one token")
    context = model.config.context
    if shape != "[T]" and tokens.shape[1] > context:
        raise UserError(f"{size} exceed the context of {context}: use tarflowlm.score")
    last = model.config.vocab_size - 1
    # an accelerator would have to be waited for
    if tokens.device.type == "cpu" and (wrong := tokens[(tokens < 0) | (tokens > last)]).numel():
        raise UserError(f"{name} hold {wrong[0].item()}: give tokens of 0 to {last}")


@dataclass(frozen=True)
class ElboTerms:
    """The terms of one sample of the ELBO, in nats (docs/math.md, eqs. 3 and 11).

        log p(x) >= E[ reconstruction - log_q + base + sum_l log_dets[l] ] = E[ -nelbo ]

    Each is [B], of texts, or [B, T], of tokens.
    """

    reconstruction: Tensor
    """log p(x | z); near zero where the codebook is well separated."""
    log_q: Tensor
    """log q(z | x)."""
    base: Tensor
    """log N(u; 0, I)."""
    log_dets: tuple[Tensor, ...]
    """log|det J_l| of every block, block 1 first."""

    def of_texts(self) -> "ElboTerms":
        """The terms [B] of texts, each the sum over its tokens."""
        log_dets = tuple(log_det.sum(-1) for log_det in self.log_dets)
        reconstruction, log_q, base = self.reconstruction, self.log_q, self.base
        return ElboTerms(reconstruction.sum(-1), log_q.sum(-1), base.sum(-1), log_dets)

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
    """

    is_exact = False
    config: FlowConfig

    def __init__(self, config: FlowConfig, *, means: Tensor | None = None) -> None:
        """`means` [V, d] spare the search for well separated ones if weights are loaded later."""
        check_type(config, "config", FlowConfig, "give a FlowConfig")
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

    def append_block(self) -> FlowBlock:
        """Build the next block. A block with `certainty` below it then only fills in (eq. 9a)."""
        config, index = self.config, self.num_blocks
        block = build_block(config, index, self.codebook)
        below = config.blocks[index - 1] if index else None
        if isinstance(below, MixD) and below.certainty:
            filling = self.prior.block(index - 1)
            assert isinstance(filling.coupling, MixDCoupling)
            filling.coupling = FillsIn(filling.coupling, below.certainty)
        self.prior.blocks.append(block.to(self.codebook.mean.device))
        return block

    def draws_tokens(self, index: int) -> bool:
        """Whether block `index` draws tokens from weights, from left to right."""
        order, coupling = self.prior.block(index).order, self.prior.block(index).coupling
        return type(coupling) is MixDCoupling and not (order.reverse or order.mixes)

    @property
    def is_single_mixd(self) -> bool:
        """Whether the model is one block that draws tokens."""
        return (
            self.num_blocks == 1
            and self.draws_tokens(0)
            and self.config.blocks[0].components_are_tokens
        )

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

    def terms(
        self, tokens: Int[Tensor, "B T"], noise: Float[Tensor, "B T d"]
    ) -> tuple[ElboTerms, list[Tensor]]:
        """One sample of the ELBO by token [B, T], and the states h^(0), ..., h^(L) [B, T, d].

        The tokens of a position share its log-determinants equally.
        """
        with full_precision(noise):
            z = self.codebook.encode(tokens, noise)
            reconstruction = self.codebook.log_likelihood(tokens, z)
        states, log_dets = self.prior.states(z)
        terms = ElboTerms(
            reconstruction=reconstruction,
            log_q=self.codebook.log_q(tokens, noise),
            base=log_standard_normal(states[-1]).sum(-1),
            log_dets=tuple(self._by_token(log_det) for log_det in log_dets),
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
        gives both sums. Such a block is the first, which runs from left to right.
        """
        block = self.prior.block(0)
        tied = block.coupling
        if (
            self.num_blocks == 1
            and isinstance(tied, MixDCoupling)
            and tied.uses_encoder_codebook
            and not frozen
        ):
            with full_precision(noise):
                z = self.prior.patch(self.codebook.encode(tokens, noise))
            nats = -self._by_token(tied.token_log_prob(z, block.features(z), relative=True).sum(-1))
            return nats if per_token else nats.sum(-1)
        with torch.set_grad_enabled(torch.is_grad_enabled() and frozen == 0), full_precision(noise):
            z = self.codebook.encode(tokens, noise)
            log_normaliser = self.codebook.log_normaliser(z)
        nats = log_normaliser - self._by_token(self.prior.log_prob_by_position(z, frozen=frozen))
        return nats if per_token else nats.sum(-1)

    def _by_token(self, x: Float[Tensor, "B N"]) -> Float[Tensor, "B T"]:
        """The value of each position, in equal parts for its tokens."""
        patch = self.config.patch
        return x if patch == 1 else x.repeat_interleave(patch, dim=1) / patch


def as_flow(
    model: LanguageModel, refusal: str = "the discrete baseline has no latents: give a TarFlowLM"
) -> TarFlowLM:
    """`model`, narrowed to TarFlowLM. UserError `refusal` for the baseline."""
    check_model(model)
    if not isinstance(model, TarFlowLM):
        raise UserError(refusal)
    return model
