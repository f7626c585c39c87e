"""The configuration of a model: its Transformers, its blocks, its latents.

No torch here: the command line reads configurations without it.
"""

import math
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from importlib import import_module
from typing import Any, ClassVar, Literal, Self, TypeVar

from tarflowlm.checks import as_integer, as_number, check_type
from tarflowlm.errors import UserError

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Config:
    """The base of all configurations. Every field must have the type of its annotation."""

    section: ClassVar[str] = ""
    """Its section of a run as messages name it, with a dot at the end."""

    def __post_init__(self) -> None:
        for name, hint in typing.get_type_hints(type(self)).items():
            if typing.get_origin(hint) is not ClassVar:
                _check_field(getattr(self, name), hint, f"{self.section}{name}")

    def require(self, name: str, is_valid: bool, rule: str) -> None:
        """UserError, naming field and value, unless the value of field `name` is valid."""
        if not is_valid:
            raise UserError(f"{self.section}{name} {getattr(self, name)}: {rule}")

    def at_least(self, least: int, *names: str) -> None:
        """UserError unless these fields are finite and at least `least`."""
        for name in names:
            is_valid = least <= getattr(self, name) < math.inf
            self.require(name, is_valid, f"must be at least {least}")

    def above_zero(self, name: str) -> None:
        """UserError unless this field is finite and above 0."""
        self.require(name, 0 < getattr(self, name) < math.inf, "must be above 0 and finite")

    def below_one(self, *names: str) -> None:
        """UserError unless these fields are at least 0 and below 1."""
        for name in names:
            self.require(name, 0 <= getattr(self, name) < 1, "must be at least 0 and below 1")


def _check_field(value: object, hint: Any, name: str) -> None:
    """UserError unless `value` has the type `hint`; a list may stand for a tuple."""
    kinds = typing.get_args(hint)
    if typing.get_origin(hint) is tuple:
        what = kinds[0].__name__ if isinstance(kinds[0], type) else "names"
        check_type(value, name, (tuple, list), f"give a list of {what}")
        for index, item in enumerate(typing.cast(Sequence[object], value)):
            _check_field(item, kinds[0], f"{name}.{index}")
    elif typing.get_origin(hint) is Literal:
        if value not in kinds:
            raise UserError(f"{name} {value!r}: choose one of {', '.join(kinds)}")
    elif hint is int:
        as_integer(value, name, most=2**62)
    elif hint is float:
        as_number(value, name)
    else:
        kinds = kinds or (hint,)
        names = ["None" if kind is type(None) else kind.__name__ for kind in kinds]
        check_type(value, name, kinds, f"give {' or '.join(names)}")


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
    """Positions that a causal convolution mixes into an input, channel by channel; 0: none."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.at_least(1, "width", "num_heads", "mlp_ratio")
        self.at_least(0, "input_taps")
        pairs = 2 * self.num_heads
        rule = f"must be a multiple of 2 * num_heads = {pairs}"
        self.require("width", self.width % pairs == 0, rule)

    @property
    def head_width(self) -> int:
        return self.width // self.num_heads


@dataclass(frozen=True, kw_only=True)
class LanguageModelConfig(Config):
    """The fields that both models share."""

    section: ClassVar[str] = "model."
    family: ClassVar[str]
    """The kind of model, as written to config.json."""
    model: ClassVar[str]
    """module:class of the model."""
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
        rule = f"does not divide context {self.context}: change one of them"
        self.require("patch", self.context % self.patch == 0, rule)

    @property
    def num_blocks(self) -> int:
        """Flow blocks L; 1 for the baseline."""
        return 1

    @property
    def has_token_weights(self) -> bool:
        """Whether a token is drawn by weights of tokens, which samplers can change."""
        return True

    @property
    def continues_exactly(self) -> bool:
        """Whether the states of a prompt in all blocks are known before what follows it."""
        return False

    @property
    def fills_in(self) -> bool:
        """Whether a block below the last one has `certainty`."""
        return False

    def first_blocks(self, num_blocks: int) -> Self:
        """The configuration of the first blocks."""
        return self

    def describe(self, block: int) -> str:
        """A name for block `block` (0-based)."""
        return "baseline"

    def build(self) -> Any:
        """A new model, initialised from PyTorch's global generator (`language_model.seeded`)."""
        return imported(self.model)(self)


def imported(path: str) -> Any:
    """The object that "module:name" names."""
    module, name = path.split(":")
    return getattr(import_module(module), name)


@dataclass(frozen=True, kw_only=True)
class BaselineConfig(LanguageModelConfig):
    """Shape of the baseline."""

    family: ClassVar[str] = "ar"
    model: ClassVar[str] = "tarflowlm.baseline:TokenLM"
    in_patch: Literal["autoregressive", "independent"] = "independent"
    """Tokens of a patch: independent (as in the paper), or each given the tokens before it."""
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
    over tokens. mix1: a mixture per channel. mixd: a mixture per token over one codebook.
    """
    layers: int = 1
    """Transformer layers."""
    start: Literal["codebook", "plain"] = "codebook"
    """Start of a mix1 block 1 with K = V, and of a mixd block with V components of its own: as the
    Mix-d coupling of the codebook, or plain. Every other block starts plain.
    """
    sees_channels: bool = True
    """Let the head of a channel see the channels before it; without, the past alone."""
    sees_tokens: bool = True
    """Let it see those of all tokens of its patch; without, only those of its own group of d
    channels, which is its token where channels are not mixed (the paper's figure 1b), and where
    they are has channels of several tokens (figure 1c). For mixd: in_patch.
    """
    certainty: float = 0.0
    """For a tied mixd block below others: act only where a token has a weight above this
    (docs/math.md, eq. 9a). 0: act on all tokens.
    """
    components: int = 2
    """Mixture components K; 0 ties the components of mixd to the encoder's codebook; 1 for affine
    couplings.
    """

    @property
    def is_tied(self) -> bool:
        """Whether the components are tied to the encoder's codebook: they are tokens."""
        return self.coupling == "mixd" and self.components == 0


COUPLINGS: dict[str, type | str] = {
    "affine": "tarflowlm.flow.channelwise:AffineCoupling",
    "token-affine": "tarflowlm.flow.channelwise:AffineCoupling",
    "mix1": "tarflowlm.flow.channelwise:Mix1Coupling",
    "mixd": "tarflowlm.flow.mixd:MixDCoupling",
}
"""The class of every coupling that `BlockConfig` can name, or its module:class."""


def coupling(name: str) -> Callable[[type[T]], type[T]]:
    """Register a `flow.couplings.Coupling` under a name for `BlockConfig.coupling` (docs/flow.md).

    UserError for a name that is taken.
    """
    if not name or not isinstance(name, str):
        raise UserError(f"coupling {name!r:.40}: give it a name, a str")

    def register(kind: type[T]) -> type[T]:
        if not hasattr(kind, "build"):
            raise UserError(f"coupling {name!r}: {kind!r:.40} has no `build` (docs/flow.md)")
        known = COUPLINGS.get(name, kind)
        # a notebook may run the cell that defines a class more than once
        if getattr(known, "__qualname__", "") != kind.__qualname__:
            raise UserError(f"coupling {name!r} exists already: choose another name")
        COUPLINGS[name] = kind
        return kind

    return register


def stack(
    couplings: Sequence[str],
    layers: Sequence[int],
    components: Sequence[int],
    start: Literal["codebook", "plain"] = "codebook",
) -> tuple[BlockConfig, ...]:
    """Blocks from their couplings, layers and components, block 1 first.

    UserError for lists of different lengths.
    """
    if not len(couplings) == len(layers) == len(components):
        sizes = f"{len(couplings)} couplings, {len(layers)} layers, {len(components)} components"
        raise UserError(f"{sizes}: give one of each for every block")
    return tuple(
        BlockConfig(coupling=name, layers=depth, components=count, start=start)
        for name, depth, count in zip(couplings, layers, components, strict=True)
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
    """Head of mix1 and affine blocks: the paper's, or ours, which adds linear paths into the
    log-weights or means (docs/math.md, eq. 10).
    """
    head_hidden: int = 64
    """Hidden units per channel of that head (D_m / 2 in the paper)."""
    channel_mix: bool | None = True
    """Reorder channels to [even, odd] between blocks; None: where P > 1, as in the paper."""
    alternate: bool = True
    """Let every second block run right to left, as in the paper."""
    reads_tokens: bool = False
    """Let block 1, and blocks above one with certainty, also read an embedding of the tokens that
    the latents before a position decode to.
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
        """The fault of a block, as "FIELD VALUE: rule", or None."""
        name = block.coupling
        if name not in COUPLINGS:
            known = f"choose one of {', '.join(COUPLINGS)}"
            return f"coupling {name!r}: {known}, or import your own (--import MODULE)"
        if block.layers < 1:
            return f"layers {block.layers}: must be at least 1"
        components = f"components ({name}) {block.components}"
        least = int(name == "mix1")
        if block.components < least:
            return f"{components}: must be at least {least}"
        if name in ("affine", "token-affine") and block.components > 1:
            return f"{components}: has no effect, an affine coupling has one Gaussian; use 1"
        if block.certainty and not (0 < block.certainty < 1 and block.is_tied):
            rule = "must be 0, or below 1 in a mixd block with components 0"
            return f"certainty {block.certainty}: {rule}"
        if self.fills_below(index) and not block.is_tied:
            return f"{components}: above a block with certainty, use mixd with components 0"
        if block.is_tied and index > 0 and self.mixes_channels:
            return f"{components}: ties it to block 1; set channel_mix off, or give K >= 1"
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
        """Whether a block below block `index` (0-based) has `certainty`."""
        return any(block.certainty for block in self.blocks[:index])

    @property
    def mixes_channels(self) -> bool:
        return self.patch > 1 if self.channel_mix is None else self.channel_mix

    @property
    def head_features(self) -> int:
        """Embedding width A of the head (docs/math.md, eq. 10; paper: E in appendix H)."""
        before = max(self.patch * self.latent_dim - 1, 1)
        return min(max(1, int(9 * 2 * self.head_hidden / (16 * before))), 96)

    def first_blocks(self, num_blocks: int) -> Self:
        return replace(self, blocks=self.blocks[:num_blocks])

    def describe(self, block: int) -> str:
        return f"block {block + 1} {self.blocks[block].coupling}"
