"""The configuration of a model: its Transformers, its blocks, its latents. No torch here, as in
`config`.
"""

import math
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from importlib import import_module
from typing import Any, ClassVar, Literal, NamedTuple, TypeVar

from tarflowlm.errors import UserError

C = TypeVar("C", bound="LanguageModelConfig")
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Config:
    """The base of all configurations. Fields of `Literal` type accept only the values listed."""

    section: ClassVar[str] = ""
    """The section of the run that holds it, as options and messages name it, with a dot at the
    end.
    """

    def __post_init__(self) -> None:
        """UserError, naming the field, for a value that its `Literal` does not list."""
        for name, hint in typing.get_type_hints(type(self)).items():
            is_tuple = typing.get_origin(hint) is tuple
            item, held = typing.get_args(hint)[0] if is_tuple else hint, getattr(self, name)
            for value in held if is_tuple else (held,):
                if typing.get_origin(item) is Literal and value not in (
                    allowed := typing.get_args(item)
                ):
                    raise UserError(
                        f"{self.section}{name} {value!r}: choose one of {', '.join(map(str, allowed))}"
                    )

    def require(self, name: str, is_valid: bool, rule: str) -> None:
        """UserError, naming field and value, unless the value of field `name` is valid."""
        if not is_valid:
            raise UserError(f"{self.section}{name} {getattr(self, name)}: {rule}")

    def at_least(self, least: int, *names: str) -> None:
        """UserError unless these fields are finite and at least `least`."""
        for name in names:
            self.require(name, least <= getattr(self, name) < math.inf, f"must be at least {least}")

    def above_zero(self, *names: str) -> None:
        """UserError unless these fields are finite and above 0."""
        for name in names:
            self.require(name, 0 < getattr(self, name) < math.inf, "must be above 0 and finite")

    def below_one(self, *names: str) -> None:
        """UserError unless these fields are at least 0 and below 1."""
        for name in names:
            self.require(name, 0 <= getattr(self, name) < 1, "must be at least 0 and below 1")


@dataclass(frozen=True, kw_only=True)
class TransformerConfig(Config):
    """Shape of a Transformer; the number of layers is set per block."""

    width: int = 128
    """Features per position, D."""
    num_heads: int = 2
    """Attention heads H; the width must be a multiple of 2 H."""
    mlp_ratio: int = 4
    """Hidden width of the MLP, as a multiple of the width."""
    rotary_base: float = 10_000.0
    """Base of the rotary frequencies: the longest wavelength is near 2 pi times this many
    positions.
    """
    input_taps: int = 0
    """Positions, the newest included, that a causal convolution mixes into an input, channel by
    channel; 0: none.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        self.at_least(1, "width", "num_heads", "mlp_ratio")
        self.at_least(0, "input_taps")
        self.above_zero("rotary_base")
        rule = f"must be a multiple of 2 * num_heads = {2 * self.num_heads}, since rotary positions rotate pairs"
        self.require("width", self.width % (2 * self.num_heads) == 0, rule)

    @property
    def head_width(self) -> int:
        """Width E of an attention head."""
        return self.width // self.num_heads


@dataclass(frozen=True, kw_only=True)
class LanguageModelConfig(Config):
    """The fields that both models share."""

    section: ClassVar[str] = "model."
    family: ClassVar[str]
    """The kind of model, as written to config.json."""
    model: ClassVar[str]
    """module:class of the model, imported when one is built: a shape needs no torch."""
    vocab_size: int = 0
    """Token types V; 0 takes it from the tokenizer."""
    context: int = 256
    """Tokens T per training sequence; generated sequences are at most as long."""
    patch: int = 1
    """Tokens P per position; P divides the context."""
    trunk: TransformerConfig = field(default_factory=TransformerConfig)
    """Shape of the Transformer; every block of a flow has its own weights."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.at_least(2, "context")
        self.at_least(1, "patch")
        self.at_least(0, "vocab_size")
        rule = f"does not divide context {self.context}: choose a patch that does, or a multiple of it as context"
        self.require("patch", self.context % self.patch == 0, rule)

    @property
    def num_blocks(self) -> int:
        """Flow blocks L, at most one training stage each; 1 for the baseline."""
        return 1

    @property
    def has_token_weights(self) -> bool:
        """Whether a token is drawn by weights of tokens, which temperature, top-k and top-p change
        directly.
        """
        return True

    @property
    def continues_exactly(self) -> bool:
        """Whether the states of a prompt in all blocks are known before what follows it."""
        return False

    def fills(self, num_blocks: int | None = None) -> bool:
        """Whether a block among the first `num_blocks`, or below the last one, only fills in what
        it is sure of.
        """
        return False

    def first_blocks(self: C, num_blocks: int) -> C:
        """The configuration of the first `num_blocks` blocks, the model of a progressive stage."""
        assert num_blocks >= self.num_blocks
        return self

    def describe(self, block: int) -> str:
        """A short description of block `block` (0-based)."""
        return "baseline"

    def build(self) -> Any:
        """A new model of this shape, initialised from PyTorch's global generator (see
        `language_model.seeded`).
        """
        module, name = self.model.split(":")
        return getattr(import_module(module), name)(self)


@dataclass(frozen=True, kw_only=True)
class BaselineConfig(LanguageModelConfig):
    """Shape of the baseline."""

    family: ClassVar[str] = "ar"
    model: ClassVar[str] = "tarflowlm.baseline:TokenLM"
    in_patch: Literal["autoregressive", "independent"] = "independent"
    """Tokens of a patch: independent given the earlier patches (as in the paper), or each given
    those before it.
    """
    layers: int = 6
    """Transformer layers."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.at_least(1, "layers")


@dataclass(frozen=True, kw_only=True)
class BlockConfig(Config):
    """One block of the stack."""

    coupling: str = "mix1"
    """The map of a position. affine, token-affine: one Gaussian, autoregressive over channels or
    over tokens. mix1: a mixture per channel. mixd: a mixture per token over one codebook
    (docs/math.md, section 3). Your own modules may register others (docs/flow.md).
    """
    layers: int = 1
    """Transformer layers."""
    start: Literal["codebook", "flattened", "plain"] = "codebook"
    """Start of a mix1 block 1 with K = V: as the Mix-d coupling of the codebook, the same with a
    tenth of the evidence in its weights, or plain, without the codebook. Start of a mixd block with
    V components of its own: the codebook, or plain. Every other block starts plain.
    """
    sees_channels: bool = True
    """Let the head of a channel see the channels before it; without, a mixture per channel given
    the past alone.
    """
    sees_tokens: bool = True
    """Let it also see those of the other tokens of its patch; without, the tokens of a patch are
    independent given the past (the paper's figure 1b). For mixd: in_patch.
    """
    certainty: float = 0.0
    """Of a tied mixd block below others: it acts only on tokens of which it is sure, those where a
    token has a weight above this, and leaves all others to the blocks above. 0: it acts on all.
    """
    components: int = 2
    """Mixture components K; 0 ties those of mixd to the encoder's codebook; 1 for affine
    couplings.
    """


class CouplingKind(NamedTuple):
    """A coupling that `BlockConfig` can name."""

    outputs: Callable[
        [int], int
    ]  # parameters of a channel, from the components K: the paper's count of operations
    flaw: Callable[
        [BlockConfig], str | None
    ]  # what is wrong with a block of it, as "FIELD VALUE: rule"
    build: Callable[..., Any] | None = (
        None  # its class, called with what `TarFlowLM._coupling` says; None for ours
    )


def _affine_flaw(block: BlockConfig) -> str | None:
    rule = "has no effect, an affine coupling has one Gaussian; use 1"
    return (
        None
        if block.components in (0, 1)
        else f"components ({block.coupling}) {block.components}: {rule}"
    )


_AFFINE = CouplingKind(lambda K: 2, _affine_flaw)
COUPLINGS = {
    "affine": _AFFINE,
    "token-affine": _AFFINE,
    "mixd": CouplingKind(lambda K: 3 * K, lambda block: None),
    "mix1": CouplingKind(
        lambda K: 3 * K, lambda b: None if b.components else "components (mix1) 0: must be above 0"
    ),
}


def coupling(
    name: str,
    *,
    outputs: Callable[[int], int] = lambda K: 2,
    flaw: Callable[[BlockConfig], str | None] = lambda block: None,
) -> Callable[[type[T]], type[T]]:
    """Register a subclass of `flow.channelwise.ChannelCoupling` under a name for
    `BlockConfig.coupling`.

    `outputs` gives the parameters of a channel for K components, `flaw` says what is wrong with a
    block, or None. The class is called with width, channels, components, and the options of the
    head. UserError for a name that is taken.
    """

    def register(kind: type[T]) -> type[T]:
        if (
            name in COUPLINGS
            and getattr(COUPLINGS[name].build, "__qualname__", "") != kind.__qualname__
        ):
            raise UserError(f"coupling {name!r} exists already: choose another name")
        COUPLINGS[name] = CouplingKind(outputs, flaw, kind)
        return kind

    return register


def stack(
    couplings: Sequence[str], layers: Sequence[int], components: Sequence[int]
) -> tuple[BlockConfig, ...]:
    """Blocks from their couplings, layers and components, block 1 first. ValueError for unequal
    lengths.
    """
    rows = zip(couplings, layers, components, strict=True)
    return tuple(
        BlockConfig(coupling=name, layers=depth, components=count) for name, depth, count in rows
    )


@dataclass(frozen=True, kw_only=True)
class FlowConfig(LanguageModelConfig):
    """Shape of a TarFlowLM."""

    family: ClassVar[str] = "flow"
    model: ClassVar[str] = "tarflowlm.model:TarFlowLM"
    latent_dim: int = 8
    """Latent channels d per token."""
    separation: float = 12.0
    """Typical distance between neighbouring codebook means, over sigma, at the start of
    training.
    """
    blocks: tuple[BlockConfig, ...] = (
        BlockConfig(coupling="mixd", layers=6, components=0),
        BlockConfig(),
        BlockConfig(),
    )
    """Blocks of the stack, block 1 (next to the tokens) first."""
    head: Literal["block", "full"] = "block"
    """Masked autoregressive head of mix1 and affine blocks: block (a channel is embedded and read
    out on its own, with linear paths into the log-weights or means), or full (the paper's: full
    masked layers, nothing else).
    """
    head_hidden: int = 64
    """Hidden units per channel of the masked autoregressive head (D_m / 2 in the paper)."""
    channel_mix: bool | None = True
    """Reorder channels to [even, odd] between blocks; None: where P > 1, as in the paper."""
    alternate: bool = True
    """Let every second block run right to left, as in the paper; if none does, a prompt is
    continued exactly.
    """
    reads_tokens: bool = False
    """Let block 1 read, beside the latents before a position, an embedding of the tokens that they
    decode to; and so the blocks above one with certainty.
    """
    in_patch: Literal["autoregressive", "independent"] = "autoregressive"
    """Mixture weights inside a patch of a mixd block: given the earlier tokens of the patch, or
    independent.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        self.at_least(1, "latent_dim", "head_hidden")
        self.above_zero("separation")
        self.require("blocks", len(self.blocks) > 0, "needs at least one block")
        for index, block in enumerate(self.blocks):
            if flaw := self._flaw(index, block):
                raise UserError(f"model.blocks.{index}.{flaw}")

    def _flaw(self, index: int, block: BlockConfig) -> str | None:
        K, kind = block.components, COUPLINGS.get(block.coupling)
        components = f"components ({block.coupling}) {K}"
        if kind is None:
            remedy = f"choose one of {', '.join(COUPLINGS)}, or import the module of your own (--import MODULE)"
            return f"coupling {block.coupling!r}: {remedy}"
        if block.layers < 1:
            return f"layers {block.layers}: must be at least 1"
        if K < 0:
            return f"{components}: must be at least 0"
        if flaw := kind.flaw(block):
            return flaw
        if block.certainty and not (
            0 < block.certainty < 1 and block.coupling == "mixd" and K == 0
        ):
            return f"certainty {block.certainty}: must be 0, or below 1 in a mixd block with components 0"
        if self.fills(index) and not (block.coupling == "mixd" and K == 0):
            return f"{components}: above a block with certainty, use mixd with components 0"
        if block.coupling == "mixd" and K == 0 and index > 0 and self.mixes_channels:
            remedy = "use it in block 1, turn channel_mix off, or give K >= 1 components of the block's own"
            return f"{components}: 0 (tied to the codebook) needs the codebook's order of channels: {remedy}"
        return None

    @property
    def num_blocks(self) -> int:
        return len(self.blocks)

    @property
    def has_token_weights(self) -> bool:
        """Whether the components of block 1 are tokens: those of a Mix-d coupling tied to the
        codebook.
        """
        first = self.blocks[0]
        return first.coupling == "mixd" and first.components == 0 and not self.fills()

    @property
    def continues_exactly(self) -> bool:
        return not self.alternate and self.num_blocks > 1

    def fills(self, num_blocks: int | None = None) -> bool:
        return any(
            block.certainty for block in self.blocks[: -1 if num_blocks is None else num_blocks]
        )

    @property
    def mixes_channels(self) -> bool:
        """Whether channels are reordered between blocks."""
        return self.patch > 1 if self.channel_mix is None else self.channel_mix

    @property
    def head_features(self) -> int:
        """Embedding width A of the masked autoregressive head (docs/math.md, eq. 10; paper:
        appendix H).
        """
        return min(
            max(1, int(9 * 2 * self.head_hidden / (16 * max(self.patch * self.latent_dim - 1, 1)))),
            96,
        )

    def first_blocks(self, num_blocks: int) -> "FlowConfig":
        return replace(self, blocks=self.blocks[:num_blocks])

    def each_block(self, **fields: Any) -> "FlowConfig":
        """The same configuration with these fields of `BlockConfig` set in every block."""
        return replace(self, blocks=tuple(replace(block, **fields) for block in self.blocks))

    def describe(self, block: int) -> str:
        """Number and coupling of block `block` (0-based), such as "block 1 mixd"."""
        return f"block {block + 1} {self.blocks[block].coupling}"


def as_flow_config(config: LanguageModelConfig) -> FlowConfig:
    """`config`, narrowed to FlowConfig; AssertionError for another configuration."""
    assert isinstance(config, FlowConfig), config
    return config
