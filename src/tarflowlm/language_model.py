"""One interface for the two models: what a caller may ask without knowing which of them it holds."""

from abc import abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import ClassVar, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from tarflowlm.errors import UserError
from tarflowlm.flow.transformer import KVCache, TransformerConfig

C = TypeVar("C", bound="LanguageModelConfig")


@dataclass(frozen=True, kw_only=True)
class LanguageModelConfig:
    """What the shapes of both models have in common."""

    family: ClassVar[str]
    """Kind of model, in config.json."""
    vocab_size: int = 0
    """Token types V; 0 takes it from the tokenizer."""
    context: int = 256
    """Tokens T per sequence, in training and at most in generation."""
    patch: int = 1
    """Tokens P per position; P divides the context."""
    trunk: TransformerConfig = field(default_factory=TransformerConfig)
    """The Transformer; blocks of a flow share its shape, not its weights."""

    def __post_init__(self) -> None:
        self.check_at_least("context", self.context, 2)
        self.check_at_least("patch", self.patch, 1)
        self.check_at_least("vocab_size", self.vocab_size, 0)
        if self.context % self.patch:
            raise UserError(
                f"patch {self.patch} does not divide context {self.context}: choose a patch that does, "
                f"or a context that is a multiple of {self.patch}"
            )

    @staticmethod
    def check_at_least(name: str, value: int, least: int) -> None:
        """UserError, naming the field, for a value that is too small."""
        if value < least:
            raise UserError(f"model.{name} {value}: must be at least {least}")

    @property
    def num_blocks(self) -> int:
        """Flow blocks L, each of which may have a training stage of its own; 1 for the baseline."""
        return 1

    def first_blocks(self: C, num_blocks: int) -> C:
        """The same model cut to its first blocks: what a progressive stage trains."""
        assert num_blocks >= self.num_blocks
        return self

    @abstractmethod
    def deepened(self: C, factor: int) -> C:
        """The same model with `factor` times the Transformer layers."""

    def describe(self, block: int) -> str:
        """What block `block` (0-based) is, in a word."""
        return "baseline"

    @abstractmethod
    def build(self) -> "LanguageModel":
        """A new model of this shape, with initial weights from PyTorch's global generator (see `seeded`)."""


class LanguageModel(nn.Module):
    """p(x) over token sequences x [B, T], known exactly or through a bound. All values are in nats."""

    config: LanguageModelConfig
    is_exact: ClassVar[bool]
    """Whether `negative_bound` is -log p(x) itself, and not a random upper bound."""

    @property
    def num_blocks(self) -> int:
        """Flow blocks that are there by now; a progressive run adds them one by one."""
        return 1

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @abstractmethod
    def draw_noise(
        self, tokens: Int[Tensor, "B T"], generator: torch.Generator | None = None
    ) -> Float[Tensor, "B T d"]:
        """The noise eps ~ N(0, I) of one posterior sample z = mu_x + sigma_x eps; d = 0 for an exact model."""

    @abstractmethod
    def negative_bound(
        self,
        tokens: Int[Tensor, "B T"],
        noise: Float[Tensor, "B T d"],
        *,
        frozen: int = 0,
        equal_cotangents: bool = False,
    ) -> Float[Tensor, " B"]:
        """-log p(x), or one sample of an upper bound on it, by the shortest way.

        The first `frozen` blocks, and with them the codebook, get no gradient. `equal_cotangents` promises a loss
        that weights all sequences alike, such as a mean: that saves work at large vocabularies.
        """

    @abstractmethod
    def conditional_bound(
        self, tokens: Int[Tensor, "B T"], given: int, noise: Float[Tensor, "B T d"]
    ) -> Float[Tensor, " B"]:
        """As `negative_bound`, of the tokens after the first `given`, conditional on those.

        Raises UserError where no such bound is known.
        """

    @abstractmethod
    def terms(self, tokens: Int[Tensor, "B T"], noise: Float[Tensor, "B T d"]) -> dict[str, Tensor]:
        """The parts of the bound by name, [B] each."""

    @abstractmethod
    def allocate_cache(self, batch: int, num_positions: int) -> KVCache:
        """An empty cache for the Transformer next to the tokens."""

    @abstractmethod
    def features_at(self, cache: KVCache, previous: Tensor | None, batch: int) -> Float[Tensor, "B D"]:
        """Features of the next position, given tokens or latents of the position before it (None at the start)."""

    @abstractmethod
    def token_vectors(self) -> tuple[Float[Tensor, "V m"], Float[Tensor, " V"] | None]:
        """The vector of every token, and its log standard deviation where tokens are Gaussians."""

    @abstractmethod
    def heads(self) -> list[nn.Module]:
        """Modules on top of a Transformer; sharded training gathers their weights when their turn comes."""

    def blocks_from(self, first: int) -> Iterable[nn.Module]:
        """The parts that train when the first `first` blocks are frozen."""
        return (self,)

    def append_block(self) -> nn.Module:
        """Put the next block of the configuration on top of the stack."""
        raise NotImplementedError(f"{type(self).__name__} has one block")

    def train_only(self, block: int) -> None:
        """Leave only block `block` (0-based) trainable; 0 trains all that is there, the codebook included."""
        if block > 0:
            self.requires_grad_(False)
            next(iter(self.blocks_from(block))).requires_grad_(True)
        for parameter in self.parameters():
            if not parameter.numel():
                # what a head has for earlier channels where there are none: no gradient would ever arrive
                parameter.requires_grad_(False)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """A context in which PyTorch's global CPU generator starts from `seed`; it is as before afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield
