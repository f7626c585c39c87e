"""The common interface of the two models, TarFlowLM and the baseline, and checks of callers'
values.
"""

from abc import abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from numbers import Integral, Real
from typing import Any, ClassVar, get_args

import torch
from jaxtyping import Float, Int
from torch import Generator, Tensor, nn

from tarflowlm.config import LanguageModelConfig as LanguageModelConfig
from tarflowlm.errors import UserError
from tarflowlm.flow.transformer import KVCache


class LanguageModel(nn.Module):
    """A model p(x) of token sequences x [B, T], exact or through a bound, in nats; P must divide
    T.
    """

    config: LanguageModelConfig
    is_exact: ClassVar[bool]
    """True: `bound` is -log p(x) itself. False: it is a random upper bound."""

    def __init__(self, config: LanguageModelConfig) -> None:
        super().__init__()
        if config.vocab_size < 1:
            raise UserError(
                f"model.vocab_size {config.vocab_size}: set it to the tokenizer's number of symbols"
            )
        self.config = config

    @property
    def num_blocks(self) -> int:
        """Flow blocks built so far; a progressive run adds them one by one."""
        return 1

    @property
    def device(self) -> torch.device:
        """The device of the parameters."""
        return next(self.parameters()).device

    @abstractmethod
    def draw_noise(
        self, tokens: Int[Tensor, "B T"], generator: Generator | None = None
    ) -> Float[Tensor, "B T d"]:
        """Noise eps ~ N(0, I) for one posterior sample z = mu_x + sigma_x eps; d = 0 for an exact
        model.
        """

    @abstractmethod
    def bound(
        self,
        tokens: Int[Tensor, "B T"],
        noise: Float[Tensor, "B T d"],
        *,
        per_token: bool = False,
        frozen: int = 0,
    ) -> Float[Tensor, "B ..."]:
        """-log p(x), or one sample of an upper bound on it, in nats: [B], or with `per_token` its
        parts [B, T].

        With `frozen` > 0 so many blocks and the codebook get no gradient. Tokens share their
        position's part equally.
        """

    @abstractmethod
    def allocate_cache(self, batch: int, num_positions: int) -> KVCache:
        """An empty KV cache for the Transformer next to the tokens (that of block 1)."""

    @abstractmethod
    def features_at(
        self, cache: KVCache, previous: Tensor | None, batch: int
    ) -> Float[Tensor, "B D"]:
        """Features of the next position, given tokens or latents of the position before it (None at
        the start).
        """

    @abstractmethod
    def token_vectors(self) -> tuple[Float[Tensor, "V dim"], Float[Tensor, " V"] | None]:
        """The vector of every token, and its log standard deviation where tokens are Gaussians."""

    def blocks_from(self, first: int) -> Iterable[nn.Module]:
        """The modules that train when the first `first` blocks are frozen."""
        return (self,)

    def append_block(self) -> nn.Module:
        """Build the next block of the configuration on top of the stack, and return it."""
        raise NotImplementedError

    def train_only(self, block: int) -> None:
        """Make only block `block` (0-based) trainable; 0 leaves everything trainable, the codebook
        included.
        """
        if block > 0:
            self.requires_grad_(False)
            next(iter(self.blocks_from(block))).requires_grad_(True)
        for parameter in self.parameters():
            if (
                not parameter.numel()
            ):  # in a head with a single group: it would never get a gradient
                parameter.requires_grad_(False)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """A context in which PyTorch's global CPU generator starts from `seed`; its state is restored
    afterwards.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def check_type(value: Any, name: str, kinds: type | tuple[type, ...], wanted: str) -> None:
    """UserError, which asks for what is `wanted`, unless `value` is of one of the `kinds`. A bool
    is no number.
    """
    if not isinstance(value, kinds) or isinstance(value, bool):
        raise UserError(
            f"{name} {' '.join(repr(value).split()):.40} of type {type(value).__name__}: {wanted}"
        )


def check_model(model: Any) -> None:
    """UserError unless `model` is one; the result of `load` has one."""
    check_type(model, "model", LanguageModel, "pass lm.model, where lm = tarflowlm.load(...)")


def check_generator(generator: Any) -> None:
    """UserError unless `generator` is one, or None."""
    check_type(
        generator,
        "generator",
        (Generator, type(None)),
        "give torch.Generator().manual_seed(0) or None",
    )


def check_option(value: Any, name: str, literal: Any) -> None:
    """UserError unless `value` is one of the names of a `literal` type."""
    if value not in get_args(literal):
        raise UserError(f"{name} {value!r:.40}: choose one of {', '.join(get_args(literal))}")


def as_integer(value: Any, name: str, least: int | None = None) -> int:
    """`value`, an integer of Python, NumPy or PyTorch. UserError for anything else, and below
    `least`.
    """
    value = value.item() if getattr(value, "ndim", None) == 0 else value
    check_type(value, name, Integral, "must be an integer")
    if least is not None and value < least:
        raise UserError(f"{name} {value}: must be at least {least}")
    return int(value)


def as_number(value: Any, name: str) -> float:
    """`value`, a number of Python, NumPy or PyTorch. UserError for anything else."""
    value = value.item() if getattr(value, "ndim", None) == 0 else value
    check_type(value, name, Real, "must be a number")
    return float(value)
