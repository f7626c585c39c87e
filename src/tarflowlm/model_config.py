"""The configuration of a model: its Transformers, its blocks, its latents.

No torch here: the command line reads configurations without it.
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
    """The section of a run that it is, as options and messages name it, with a dot at the end."""

    def __post_init__(self) -> None:
        """UserError, naming the field, for a value that its `Literal` does not list."""
        for name, hint in typing.get_type_hints(type(self)).items():
            value = getattr(self, name)
            values = (value,)
            if typing.get_origin(hint) is tuple:
                values, hint = value, typing.get_args(hint)[0]
            if typing.get_origin(hint) is not Literal:
                continue
            allowed = typing.get_args(hint)
            for item in values:
                if item not in allowed:
                    choice = f"choose one of {', '.join(map(str, allowed))}"
                    raise UserError(f"{self.section}{name} {item!r}: {choice}")

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
    input_taps: int = 0
    """Positions, the newest included, that a causal convolution mixes into an input, channel by
    channel; 0: no convolution.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        self.at_least(1, "width", "num_heads", "mlp_ratio")
        self.at_least(0, "input_taps")
        pairs = 2 * self.num_heads
        rule = f"must be a multiple of 2 * num_heads = {pairs}, since rotary positions rotate pairs"
        self.require("width", self.width % pairs == 0, rule)

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
    """module:class of the model, imported when one is built."""
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
        remedy = "choose a patch that does, or a multiple of it as context"
        rule = f"does not divide context {self.context}: {remedy}"
        self.require("patch", self.context % self.patch == 0, rule)

    @property
    def num_blocks(self) -> int:
        """Flow blocks L, at most one training stage each; 1 for the baseline."""
        return 1

    @property
    def has_token_weights(self) -> bool:
        """Whether a token is drawn by weights of tokens.

        Temperature, top-k and top-p change these directly.
        """
        return True

    @property
    def continues_exactly(self) -> bool:
        """Whether the states of a prompt in all blocks are known before what follows it."""
        return False

    @property
    def fills_in(self) -> bool:
        """Whether a block below the last one only fills in what it is sure of (`certainty`)."""
        return False

    def first_blocks(self: C, num_blocks: int) -> C:
        """The configuration of the first `num_blocks` blocks, the model of a progressive stage."""
        assert num_blocks >= self.num_blocks
        return self

    def describe(self, block: int) -> str:
        """A short description of block `block` (0-based)."""
        return "baseline"

    def build(self) -> Any:
        """A new model, initialised from PyTorch's global generator (`language_model.seeded`)."""
        return imported(self.model)(self)


def imported(path: str) -> Any:
    """What "module:name" names."""
    module, name = path.split(":")
    return getattr(import_module(module), name)


@dataclass(frozen=True, kw_only=True)
class BaselineConfig(LanguageModelConfig):
    """Shape of the baseline."""

    family: ClassVar[str] = "ar"
    model: ClassVar[str] = "tarflowlm.baseline:TokenLM"
    in_patch: Literal["autoregressive", "independent"] = "independent"
    """Tokens of a patch: independent given the earlier patches (as in the paper), or each given
    the tokens before it.
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
    start: Literal["codebook", "plain"] = "codebook"
    """Start of a mix1 block 1 with K = V: as the Mix-d coupling of the codebook, or plain. Start of
    a mixd block with V components of its own: the codebook, or plain. Every other block starts
    plain.
    """
    sees_channels: bool = True
    """Let the head of a channel see the channels before it; without, a mixture per channel given
    the past alone.
    """
    sees_tokens: bool = True
    """Let it also see the channels of the other tokens of its patch; without, the tokens of a patch
    are independent given the past (the paper's figure 1b). For mixd: in_patch.
    """
    certainty: float = 0.0
    """For a tied mixd block below others: act only where a token has a weight above this, and leave
    the rest to the blocks above (docs/math.md, eq. 9a). 0: act on all tokens.
    """
    components: int = 2
    """Mixture components K; 0 ties the components of mixd to the encoder's codebook; 1 for affine
    couplings.
    """

    @property
    def is_tied(self) -> bool:
        """Whether the components are tied to the encoder's codebook: they are tokens."""
        return self.coupling == "mixd" and self.components == 0


class CouplingKind(NamedTuple):
    """A coupling that `BlockConfig` can name."""

    coupling: type | str
    """The class, or "module:class", imported when one is built."""
    outputs: Callable[[int], int]
    """Parameters of a channel, from the components K, for the paper's count of operations."""
    flaw: Callable[[BlockConfig], str | None]
    """What is wrong with a block of it, as "FIELD VALUE: rule", or None."""


def two_parameters(components: int) -> int:
    """Mean and scale of a Gaussian."""
    return 2


def mixture_parameters(components: int) -> int:
    """Weights, means and scales of a mixture."""
    return 3 * components


def no_flaw(block: BlockConfig) -> str | None:
    """Nothing is wrong with any block."""
    return None


def _affine_flaw(block: BlockConfig) -> str | None:
    if block.components in (0, 1):
        return None
    rule = "has no effect, an affine coupling has one Gaussian; use 1"
    return f"components ({block.coupling}) {block.components}: {rule}"


def _mix1_flaw(block: BlockConfig) -> str | None:
    return None if block.components else "components (mix1) 0: must be above 0"


_AFFINE = CouplingKind("tarflowlm.flow.channelwise:AffineCoupling", two_parameters, _affine_flaw)
_MIX1 = CouplingKind("tarflowlm.flow.channelwise:Mix1Coupling", mixture_parameters, _mix1_flaw)
_MIXD = CouplingKind("tarflowlm.flow.mixd:MixDCoupling", mixture_parameters, no_flaw)
COUPLINGS = {"affine": _AFFINE, "token-affine": _AFFINE, "mix1": _MIX1, "mixd": _MIXD}


def coupling(
    name: str,
    *,
    outputs: Callable[[int], int] = two_parameters,
    flaw: Callable[[BlockConfig], str | None] = no_flaw,
) -> Callable[[type[T]], type[T]]:
    """Register a `flow.couplings.Coupling` under a name for `BlockConfig.coupling`.

    `outputs` gives the parameters of a channel for K components, `flaw` says what is wrong with a
    block, or None (docs/flow.md). UserError for a name that is taken.
    """

    def register(kind: type[T]) -> type[T]:
        known = COUPLINGS[name].coupling if name in COUPLINGS else kind
        # a notebook may run the cell that defines a class more than once
        if getattr(known, "__qualname__", "") != kind.__qualname__:
            raise UserError(f"coupling {name!r} exists already: choose another name")
        COUPLINGS[name] = CouplingKind(kind, outputs, flaw)
        return kind

    return register


def stack(
    couplings: Sequence[str], layers: Sequence[int], components: Sequence[int]
) -> tuple[BlockConfig, ...]:
    """Blocks from their couplings, layers and components, block 1 first.

    ValueError for unequal lengths.
    """
    rows = zip(couplings, layers, components, strict=True)
    return tuple(
        BlockConfig(coupling=name, layers=depth, components=count) for name, depth, count in rows
    )


@dataclass(frozen=True, kw_only=True)
class FlowConfig(LanguageModelConfig):
    """Shape of a TarFlowLM.

    Example:
        >>> blocks = stack(["mixd", "mix1"], layers=[4, 2], components=[0, 2])
        >>> config = FlowConfig(latent_dim=16, blocks=blocks)
        >>> config.num_blocks, config.describe(0), config.has_token_weights
        (2, 'block 1 mixd', True)
    """

    family: ClassVar[str] = "flow"
    model: ClassVar[str] = "tarflowlm.model:TarFlowLM"
    latent_dim: int = 8
    """Latent channels d per token."""
    separation: float = 12.0
    """Typical distance between neighbouring codebook means, over sigma, at the start."""
    blocks: tuple[BlockConfig, ...] = (
        BlockConfig(coupling="mixd", layers=6, components=0),
        BlockConfig(),
        BlockConfig(),
    )
    """Blocks of the stack, block 1 (next to the tokens) first."""
    head: Literal["linear-paths", "paper"] = "linear-paths"
    """Masked autoregressive head of mix1 and affine blocks: the paper's, or ours, which adds linear
    paths into the log-weights or means (docs/math.md, eq. 10).
    """
    head_hidden: int = 64
    """Hidden units per channel of the masked autoregressive head (D_m / 2 in the paper)."""
    channel_mix: bool | None = True
    """Reorder channels to [even, odd] between blocks; None: where P > 1, as in the paper."""
    alternate: bool = True
    """Let every second block run right to left, as in the paper. If none does, a prompt is
    continued exactly.
    """
    reads_tokens: bool = False
    """Let block 1 also read an embedding of the tokens that the latents before a position decode
    to. So do the blocks above one with certainty.
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
        """What is wrong with a block, as "FIELD VALUE: rule", or None."""
        kind = COUPLINGS.get(block.coupling)
        if kind is None:
            known = f"choose one of {', '.join(COUPLINGS)}"
            own = "or import the module of your own (--import MODULE)"
            return f"coupling {block.coupling!r}: {known}, {own}"
        if block.layers < 1:
            return f"layers {block.layers}: must be at least 1"
        components = f"components ({block.coupling}) {block.components}"
        if block.components < 0:
            return f"{components}: must be at least 0"
        if flaw := kind.flaw(block):
            return flaw
        if block.certainty and not (0 < block.certainty < 1 and block.is_tied):
            rule = "must be 0, or below 1 in a mixd block with components 0"
            return f"certainty {block.certainty}: {rule}"
        if self.fills_below(index) and not block.is_tied:
            return f"{components}: above a block with certainty, use mixd with components 0"
        if block.is_tied and index > 0 and self.mixes_channels:
            wrong = "0 (tied to the codebook) needs the codebook's order of channels"
            remedy = "use it in block 1, turn channel_mix off, or give K >= 1 components of its own"
            return f"{components}: {wrong}: {remedy}"
        return None

    @property
    def num_blocks(self) -> int:
        return len(self.blocks)

    @property
    def has_token_weights(self) -> bool:
        return self.blocks[0].is_tied and not self.fills_in

    @property
    def continues_exactly(self) -> bool:
        return not self.alternate and self.num_blocks > 1

    @property
    def fills_in(self) -> bool:
        return self.fills_below(self.num_blocks - 1)

    def fills_below(self, index: int) -> bool:
        """Whether a block below block `index` (0-based) only fills in what it is sure of."""
        return any(block.certainty for block in self.blocks[:index])

    @property
    def mixes_channels(self) -> bool:
        """Whether channels are reordered between blocks."""
        return self.patch > 1 if self.channel_mix is None else self.channel_mix

    @property
    def head_features(self) -> int:
        """Embedding width A of the masked autoregressive head.

        docs/math.md, eq. 10; paper: appendix H, E with c = P d channels and D_m = 2 `head_hidden`.
        """
        before = max(self.patch * self.latent_dim - 1, 1)
        return min(max(1, int(9 * 2 * self.head_hidden / (16 * before))), 96)

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
