"""The common interface of the two models, TarFlowLM and the baseline."""

from abc import abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Generator, Tensor, nn

from tarflowlm.checks import check_integers, check_type
from tarflowlm.errors import UserError
from tarflowlm.flow.transformer import Conditioner
from tarflowlm.model_config import LanguageModelConfig


class LanguageModel(nn.Module):
    """A model p(x) of token sequences x [B, T], exact or through a bound; P must divide T.

    It is trained and scored by `draw_noise` and `bound`, and writes position by position through
    its `conditioner`.
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
    @abstractmethod
    def conditioner(self) -> Conditioner:
        """The Transformer next to the tokens, in block 1."""

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

        `per_token` asks for the parts; the tokens of a position share its part equally. With
        `frozen` > 0 so many blocks and the codebook get no gradient.
        """

    def blocks_from(self, first: int) -> Iterable[nn.Module]:
        """The modules that train when the first `first` blocks are frozen."""
        return (self,)

    def train_only(self, block: int) -> None:
        """Make only block `block` (0-based) trainable; 0 includes the codebook."""
        if block > 0:
            self.requires_grad_(False)
            next(iter(self.blocks_from(block))).requires_grad_(True)
        for parameter in self.parameters():
            # in a head with a single group: it would never get a gradient
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

    [B, T] holds at most a context of tokens; one text [T] may have any length. The host would wait
    for values on an accelerator: these are not checked.
    """
    check_model(model)
    check_integers(tokens, name, shape)
    size = f"{name} of shape {list(tokens.shape)}"
    if not tokens.numel():
        raise UserError(f"{size}: give at least one token")
    context = model.config.context
    if shape != "[T]" and tokens.shape[1] > context:
        raise UserError(f"{size} exceed the context of {context}: use tarflowlm.score")
    outside = (tokens < 0) | (tokens >= model.config.vocab_size)
    if tokens.device.type == "cpu" and outside.any():
        last = model.config.vocab_size - 1
        raise UserError(f"{name} hold {tokens[outside][0].item()}: give tokens of 0 to {last}")
