"""The configuration of a model: its Transformers, its blocks, its latents.

No torch here: the command line reads configurations without it.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from importlib import import_module
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar

from tarflowlm.errors import UserError
from tarflowlm.schema import Checked, Count, Positive, Range, Whole

T = TypeVar("T")


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
    input_taps: Whole = 0
    """Positions that a causal convolution mixes into an input, channel by channel; 0: none."""

    def rules(self) -> Iterator[tuple[str, str]]:
        pairs = 2 * self.num_heads
        if self.width % pairs:
            yield "width", f"must be a multiple of 2 * num_heads = {pairs}"

    @property
    def head_width(self) -> int:
        return self.width // self.num_heads


@dataclass(frozen=True, kw_only=True)
class LanguageModelConfig(Checked):
    """The fields that both models share."""

    section: ClassVar[str] = "model."
    KEY: ClassVar[str] = "family"
    family: ClassVar[str]
    """The kind of model, as written to config.json."""
    model: ClassVar[str]
    """module:class of the model."""
    vocab_size: Whole = 0
    """Token types V; 0 takes it from the tokenizer."""
    context: Annotated[int, Range(least=2)] = 256
    """Tokens T per training sequence; generated sequences are at most as long."""
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
    layers: Count = 6
    """Transformer layers."""


@dataclass(frozen=True, kw_only=True)
class BlockConfig(Checked):
    """One block of the stack."""

    coupling: str = "mix1"
    """The map of a position. affine, token-affine: one Gaussian, autoregressive over channels or
    over tokens. mix1: a mixture per channel. mixd: a mixture per token over one codebook.
    """
    layers: Count = 1
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
    certainty: Annotated[float, Range(least=0, below=1)] = 0.0
    """For a tied mixd block below others: act only where a token has a weight above this
    (docs/math.md, eq. 9a). 0: act on all tokens.
    """
    components: Whole = 2
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
    latent_dim: Count = 8
    """Latent channels d per token."""
    separation: Positive = 12.0
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
    head_hidden: Count = 64
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

    def rules(self) -> Iterator[tuple[str, str]]:
        yield from super().rules()
        if not self.blocks:
            yield "blocks", "needs at least one block"
        for index, block in enumerate(self.blocks):
            where, name = f"blocks.{index}", block.coupling
            if name not in COUPLINGS:
                known = f"choose one of {', '.join(COUPLINGS)}"
                yield f"{where}.coupling", f"{known}, or import your own (--import MODULE)"
            if name == "mix1" and not block.components:
                yield f"{where}.components", "must be at least 1 (mix1)"
            if name in ("affine", "token-affine") and block.components > 1:
                rule = f"has no effect, an affine coupling ({name}) has one Gaussian; use 1"
                yield f"{where}.components", rule
            if block.certainty and not block.is_tied:
                yield f"{where}.certainty", "needs a mixd block with components 0"
            if self.fills_below(index) and not block.is_tied:
                rule = "above a block with certainty, use mixd with components 0"
                yield f"{where}.components", rule
            if block.is_tied and index > 0 and self.mixes_channels:
                rule = "ties it to block 1; set channel_mix off, or give K >= 1"
                yield f"{where}.components", rule

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
