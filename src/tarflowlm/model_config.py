"""The configuration of a model: its Transformers, its blocks, its latents.

No torch here: the command line reads configurations without it.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pkgutil import resolve_name
from typing import Annotated, Any, ClassVar, Literal, Self

from annotated_types import Ge, Interval

from tarflowlm.registry import Plugged, Registry
from tarflowlm.schema import Below1, Checked, Count, Positive, Whole

InPatch = Literal["autoregressive", "independent"]


Depth = Annotated[int, Interval(ge=1, le=4096)]
"""A number of layers, of which an impossible one would never be built."""

LAYERS = Registry("layer", "gpt", "qwen3", needs="compute")
"""The layers of Transformers; those of users are a `flow.transformer.Layer`."""


def layer(name: str) -> Callable[[Plugged], Plugged]:
    """Register a `flow.transformer.Layer` under a name, for `TransformerConfig.layer`.

    UserError for a name that is taken.
    """
    return LAYERS.own(name)


@dataclass(frozen=True, kw_only=True)
class TransformerConfig(Checked):
    """Shape of a Transformer; the number of layers is set per block."""

    section: ClassVar[str] = "model.trunk."
    width: Count = 128
    """Features per position, D."""
    num_heads: Count = 2
    """Attention heads H; the width must be a multiple of 2 H."""
    mlp_ratio: Count = 4
    """Hidden width of the MLP, as a multiple of the width."""
    layer: Annotated[str, LAYERS] = "gpt"
    """gpt: an MLP with GELU, and a head with a bias. qwen3: a gated MLP of as many weights (SwiGLU;
    Shazeer 2020), and no bias: the layers of Qwen3, which other programs run (docs/hub.md). Or a
    layer of your own, by its name (--import MODULE).
    """
    input_taps: Whole = 0
    """Positions that a causal convolution mixes into an input, channel by channel; 0: none."""

    def rules(self) -> Iterator[tuple[str, str]]:
        pairs = 2 * self.num_heads
        if self.width % pairs:
            yield "width", f"must be a multiple of 2 * num_heads = {pairs}"

    @property
    def head_width(self) -> int:
        return self.width // self.num_heads

    @property
    def layer_class(self) -> Any:
        """The class of a user's own layer; None for ours."""
        return LAYERS[self.layer]

    @property
    def is_gated(self) -> bool:
        """Whether the MLP has a gate, and the head no bias."""
        return self.layer == "qwen3" and self.layer_class is None

    @property
    def hidden(self) -> int:
        """Hidden width of the MLP, M; with a gate about two thirds, a multiple of 32."""
        hidden = self.mlp_ratio * self.width
        return 32 * max(1, round(hidden / 48)) if self.is_gated else hidden

    @property
    def layer_size(self) -> int:
        """Numbers in the matrices of a layer; 0 for a user's own."""
        if self.layer_class is not None:
            return 0
        return (4 * self.width + (2 + self.is_gated) * self.hidden) * self.width


@dataclass(frozen=True, kw_only=True)
class LanguageModelConfig(Checked):
    """The fields that both models share."""

    section: ClassVar[str] = "model."
    KEY: ClassVar[str] = "family"
    family: ClassVar[str]
    """The kind of model, as written to config.json."""
    model: ClassVar[str]
    """module:class of the model."""
    bound: ClassVar[str]
    """What an evaluation gives: exact values, or upper bounds (elbo)."""
    vocab_size: Whole = 0
    """Token types V; 0 takes it from the tokenizer."""
    context: Annotated[int, Ge(2)] = 256
    """Tokens T per training sequence; longer texts are written in windows of as many."""
    patch: Count = 1
    """Tokens P per position; P divides the context."""
    trunk: TransformerConfig = field(default_factory=TransformerConfig)
    """Shape of the Transformer; every block of a flow has its own weights."""

    def rules(self) -> Iterator[tuple[str, str]]:
        if self.context % self.patch:
            yield "patch", f"does not divide context {self.context}: change one of them"

    @property
    def num_blocks(self) -> int:
        """Flow blocks L; 1 for the baseline."""
        return 1

    @property
    def num_layers(self) -> int:
        """Transformer layers of all blocks."""
        return 0

    @property
    def least_size(self) -> int:
        """A number of weights that the model has at least, in time that no size changes."""
        return self.num_layers * self.trunk.layer_size

    @property
    def has_token_weights(self) -> bool:
        """Whether a token is drawn by weights of tokens, which samplers can change."""
        return True

    @property
    def takes_temperature(self) -> bool:
        """Whether samplers can change the weights of some tokens."""
        return self.has_token_weights or self.fills_in

    @property
    def continues_exactly(self) -> bool:
        """Whether the states of a prompt are known in all blocks before the rest is written."""
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
        """A new model, initialised from PyTorch's global generator (`model.seeded`)."""
        return resolve_name(self.model)(self)


FAMILIES = LanguageModelConfig.KINDS
"""The configurations of models. One of a user's own is a subclass with a `family` and a `model`."""


@dataclass(frozen=True, kw_only=True)
class BaselineConfig(LanguageModelConfig):
    """Shape of the baseline."""

    family: ClassVar[str] = "ar"
    model: ClassVar[str] = "tarflowlm.baseline:TokenLM"
    bound: ClassVar[str] = "exact"
    in_patch: InPatch = "independent"
    """Tokens of a patch: independent (as in the paper), or each given the tokens before it."""
    layers: Depth = 6
    """Transformer layers."""

    @property
    def num_layers(self) -> int:
        return self.layers

    @property
    def least_size(self) -> int:
        joined = self.patch * self.trunk.width if self.patch > 1 else 0
        rows = self.vocab_size + self.trunk.input_taps + joined
        return super().least_size + rows * self.trunk.width


@dataclass(frozen=True, kw_only=True)
class BlockConfig(Checked):
    """One block of the stack: its depth, and the options of its coupling, which subclasses add."""

    KEY: ClassVar[str] = "coupling"
    coupling: ClassVar[str]
    """The name of the coupling."""
    implementation: ClassVar[Any] = None
    """The class of a coupling of your own."""
    layers: Depth = 1
    """Transformer layers."""

    def __post_init__(self) -> None:
        """No check: the stack checks its blocks, for it knows their places."""

    @property
    def components_are_tokens(self) -> bool:
        """Whether the components are tied to the encoder's codebook: they are tokens."""
        return False


@dataclass(frozen=True, kw_only=True)
class ChannelBlock(BlockConfig):
    """A block whose coupling acts channel by channel."""

    sees_channels: bool = True
    """Let the head of a channel see the channels before it; False: only the past."""
    sees_tokens: bool = True
    """Let it see the channels of all tokens of its patch; False: only channels of its own group
    of d. Without mixed channels a group is a token (the paper's figure 1b); with them it has
    channels of several tokens (figure 1c).
    """


@dataclass(frozen=True, kw_only=True)
class Affine(ChannelBlock):
    """One Gaussian per channel."""

    coupling: ClassVar[str] = "affine"


@dataclass(frozen=True, kw_only=True)
class TokenAffine(BlockConfig):
    """One Gaussian for all channels of a token."""

    coupling: ClassVar[str] = "token-affine"
    sees_tokens: bool = True
    """Let the head of a token see the tokens before it in its patch; False: only the past."""


@dataclass(frozen=True, kw_only=True)
class Mix1(ChannelBlock):
    """A mixture per channel."""

    coupling: ClassVar[str] = "mix1"
    components: Count = 2
    """Mixture components K."""


@dataclass(frozen=True, kw_only=True)
class MixD(BlockConfig):
    """A mixture per token over one codebook."""

    coupling: ClassVar[str] = "mixd"
    components: Whole = 0
    """Mixture components K; 0 ties them to the encoder's codebook."""
    certainty: Below1 = 0.0
    """Below other blocks: apply this block only where its largest token weight exceeds this, and
    pass other latents through (docs/math.md, eq. 9a). 0: act on all tokens.
    """
    in_patch: InPatch = "autoregressive"
    """Mixture weights inside a patch: given the earlier tokens of the patch, or independent."""

    def rules(self) -> Iterator[tuple[str, str]]:
        if self.certainty and self.components:
            yield "certainty", "needs components 0, which are tokens"

    @property
    def components_are_tokens(self) -> bool:
        return self.components == 0


COUPLINGS = BlockConfig.KINDS
"""The configurations of blocks by their couplings."""
COUPLINGS.needs = "conditionals"


def coupling(
    name: str, options: type[BlockConfig] = ChannelBlock
) -> Callable[[type[Plugged]], type[Plugged]]:
    """Register a `flow.couplings.Coupling` under a name (docs/flow.md).

    The class gets its configuration as `options`: a subclass of `options`, a frozen dataclass.
    UserError for a name that is taken.
    """
    COUPLINGS.check_name(name)

    def register(kind: type[Plugged]) -> type[Plugged]:
        COUPLINGS.check(name, kind)
        own = {"coupling": name, "implementation": kind}
        # where pickle finds it
        own |= {"__module__": kind.__module__, "__qualname__": f"{kind.__qualname__}.options"}
        kind.options = type(options.__name__, (options,), own)  # type: ignore[attr-defined]
        return kind

    return register


@dataclass(frozen=True, kw_only=True)
class FlowConfig(LanguageModelConfig):
    """Shape of a TarFlowLM.

    Example:
        >>> config = FlowConfig(latent_dim=16, blocks=(MixD(layers=4), Mix1(components=2)))
        >>> config.num_blocks, config.describe(0), config.has_token_weights
        (2, 'block 1 mixd', True)
    """

    family: ClassVar[str] = "flow"
    model: ClassVar[str] = "tarflowlm.model:TarFlowLM"
    bound: ClassVar[str] = "elbo"
    latent_dim: Count = 8
    """Latent channels d per token."""
    separation: Positive = 12.0
    """Typical distance between neighbouring codebook means, over sigma, at the start."""
    blocks: tuple[BlockConfig, ...] = (
        MixD(layers=6),
        Mix1(),
        Mix1(),
    )
    """Blocks of the stack, block 1 (next to the tokens) first."""
    head: Literal["linear-paths", "paper"] = "linear-paths"
    """Head of mix1 and affine blocks: the paper's, or ours, which adds linear paths into the
    log-weights or means (docs/math.md, eq. 10).
    """
    head_hidden: Count = 64
    """Hidden units per channel of that head (D_m / 2 in the paper)."""
    channel_mix: bool | None = True
    """Reorder channels to [even, odd] between blocks; None: only if P > 1, as in the paper."""
    alternate: bool = True
    """Let every second block run right to left, as in the paper."""
    starts: Literal["first", "last"] = "first"
    """The block that starts wide and reads the past a little; the others start as the identity.
    Where blocks learn together, it often becomes the language model (docs/math.md, section 4).
    """
    input_map: Literal["two-paths", "linear"] = "two-paths"
    """Map of latents to inputs of a Transformer: linear, as in TarFlow, on which the paper builds,
    or ours, which adds a nonlinear path (docs/math.md, eq. 5).
    """
    reads_tokens: bool = False
    """Let block 1, and blocks above one with certainty, also read an embedding of the tokens that
    the latents before a position decode to.
    """

    def rules(self) -> Iterator[tuple[str, str]]:
        yield from super().rules()
        if not self.blocks:
            yield "blocks", "needs at least one block"
        for index, block in enumerate(self.blocks):
            block.check(f"{self.section}blocks.{index}.")
            if self.fills_below(index) and not block.components_are_tokens:
                rule = "above a block with certainty, use mixd with components 0"
                yield f"blocks.{index}", rule
            if block.components_are_tokens and index > 0 and self.mixes_channels:
                rule = "ties it to block 1; set channel_mix off, or give K >= 1"
                yield f"blocks.{index}.components", rule

    @property
    def num_blocks(self) -> int:
        return len(self.blocks)

    @property
    def num_layers(self) -> int:
        return sum(block.layers for block in self.blocks)

    @property
    def least_size(self) -> int:
        width, channels = self.trunk.width, self.patch * self.latent_dim
        size = super().least_size + self.vocab_size * self.latent_dim
        for block in self.blocks:
            rows = channels + self.trunk.input_taps
            if isinstance(block, MixD):
                rows += block.components
            elif block.implementation is None:
                rows += channels * self.head_hidden
            size += rows * width
            if isinstance(block, Mix1) and block.implementation is None:
                size += channels * self.head_hidden * block.components
        return size

    @property
    def has_token_weights(self) -> bool:
        return self.blocks[0].components_are_tokens and not self.fills_in

    @property
    def continues_exactly(self) -> bool:
        return not self.alternate and self.num_blocks > 1

    @property
    def fills_in(self) -> bool:
        return self.fills_below(self.num_blocks - 1)

    def fills_below(self, index: int) -> bool:
        """Whether a block below block `index` (0-based) has `certainty`."""
        below = self.blocks[:index]
        return any(isinstance(block, MixD) and block.certainty > 0 for block in below)

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
