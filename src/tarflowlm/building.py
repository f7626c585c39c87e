"""From a configuration to modules: the blocks of a model, and their couplings."""

from dataclasses import dataclass, fields, replace
from typing import Any

import torch

from tarflowlm.flow.channelwise import AffineCoupling, Mix1Coupling
from tarflowlm.flow.codebook import Codebook, NoisyCodebook
from tarflowlm.flow.couplings import Coupling
from tarflowlm.flow.heads import HeadShape
from tarflowlm.flow.mixd import MixDCoupling
from tarflowlm.flow.order import Order
from tarflowlm.flow.stack import FlowBlock
from tarflowlm.model_config import (
    Affine,
    BlockConfig,
    ChannelBlock,
    FlowConfig,
    Mix1,
    MixD,
    TokenAffine,
)


@dataclass(frozen=True)
class BlockShape:
    """The shape of a block, from which a coupling is built besides its own options."""

    patch: int
    """Tokens P of a position."""
    latent_dim: int
    """Channels d of a token."""
    starts_wide: bool
    """Whether the block starts wide and reads the past a little; otherwise as the identity."""
    components: Codebook | NoisyCodebook
    """The components of the latents that the block sees; a tied coupling shares them."""
    head: HeadShape
    """The shape of a head whose groups are channels."""
    has_bias: bool = True
    """Whether the head of a mixture over tokens has a bias."""

    @property
    def channels(self) -> int:
        """Channels C of a position."""
        return self.patch * self.latent_dim


def block_shape(config: FlowConfig, index: int, codebook: Codebook) -> BlockShape:
    """The shape of block `index` (0-based) above the encoder's codebook."""
    # a block that joins a trained stack must not harm it
    starts_wide = index == (0 if config.starts == "first" else config.num_blocks - 1)
    head = HeadShape(
        width=config.trunk.width,
        hidden=config.head_hidden,
        features=config.head_features,
        linear_paths=config.head == "linear-paths",
        embed_bias=config.head == "paper",
        noise=0.1 if starts_wide else 0.0,
    )
    return BlockShape(
        patch=config.patch,
        latent_dim=config.latent_dim,
        starts_wide=starts_wide,
        # a block that fills in puts out noise, or unchanged latents
        components=NoisyCodebook(codebook) if config.fills_below(index) else codebook,
        head=head,
        has_bias=not config.trunk.is_gated,
    )


def build_block(config: FlowConfig, index: int, codebook: Codebook) -> FlowBlock:
    """Block `index` (0-based) above the encoder's `codebook`, with weights from PyTorch's global
    generator.
    """
    options, shape = config.blocks[index], block_shape(config, index, codebook)
    reads = config.reads_tokens and (index == 0 or config.fills_below(index))
    return FlowBlock(
        trunk=config.trunk,
        num_layers=options.layers,
        order=Order(
            shape.channels,
            reverse=config.alternate and index % 2 == 1,
            mix=index * config.mixes_channels,
        ),
        coupling=build_coupling(options, shape),
        codebook=shape.components if reads else None,
        is_linear=config.input_map == "linear",
    )


def build_coupling(options: BlockConfig, shape: BlockShape) -> Coupling:
    """The coupling of a block with these options and this shape.

    One of your own gets `channels`, a `head` and its own options by name if it acts channel by
    channel, and else the `shape` and its own options.
    """
    match options:
        case MixD():
            return MixDCoupling(
                width=shape.head.width,
                patch=shape.patch,
                latent_dim=shape.latent_dim,
                components=options.components,
                in_patch=options.in_patch == "autoregressive",
                tied=shape.components if options.components_are_tokens else None,
                has_bias=shape.has_bias,
            )
        case TokenAffine():
            hidden = shape.head.hidden * shape.latent_dim
            head = replace(shape.head, hidden=hidden, autoregressive=options.sees_tokens)
            return AffineCoupling(channels=shape.channels, head=head, group=shape.latent_dim)
        case Affine():
            return AffineCoupling(channels=shape.channels, head=channel_head(options, shape))
        case Mix1():
            return Mix1Coupling(
                channels=shape.channels,
                components=options.components,
                head=channel_head(options, shape),
                spread=0.95 if shape.starts_wide else 0.3,
            )
        case ChannelBlock():
            head = channel_head(options, shape)
            return options.implementation(
                channels=shape.channels, head=head, **_own(options, ChannelBlock)
            )
        case _:
            return options.implementation(shape, **_own(options, BlockConfig))


def channel_head(options: ChannelBlock, shape: BlockShape) -> HeadShape:
    """The shape of a head of channels with these options."""
    # groups of d channels in the block's order, which are tokens unless channels are mixed
    tokens = torch.arange(shape.channels) // shape.latent_dim
    return replace(
        shape.head,
        autoregressive=options.sees_channels,
        tokens=None if options.sees_tokens else tokens,
    )


def _own(options: BlockConfig, above: type[BlockConfig]) -> dict[str, Any]:
    """The options that a subclass of `above` adds."""
    names = {one.name for one in fields(options)} - {one.name for one in fields(above)}
    return {name: getattr(options, name) for name in names}
