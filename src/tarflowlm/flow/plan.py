"""The plan from which a block and its coupling are built."""

from dataclasses import dataclass

import torch

from tarflowlm.flow.codebook import Codebook, NoisyCodebook
from tarflowlm.flow.heads import HeadShape
from tarflowlm.flow.layers import Order
from tarflowlm.model_config import BlockConfig, FlowConfig


@dataclass(frozen=True)
class BlockPlan:
    """Block `index` (0-based) of a configuration, above the encoder's codebook."""

    config: FlowConfig
    index: int
    codebook: Codebook

    @property
    def block(self) -> BlockConfig:
        return self.config.blocks[self.index]

    @property
    def channels(self) -> int:
        """Channels C of a position."""
        return self.config.patch * self.config.latent_dim

    @property
    def order(self) -> Order:
        """The order in which the block sees its input: every second one runs right to left."""
        reverse = self.config.alternate and self.index % 2 == 1
        return Order(self.channels, reverse=reverse, mix=self.mix)

    @property
    def mix(self) -> int:
        """How often the channels are mixed before the block sees them."""
        return self.index if self.config.mixes_channels else 0

    @property
    def components(self) -> Codebook | NoisyCodebook:
        """The components of the latents that the block sees, which a tied coupling has."""
        above_fills = self.config.fills_below(self.index)
        return NoisyCodebook(self.codebook) if above_fills else self.codebook

    @property
    def token_reader(self) -> Codebook | NoisyCodebook | None:
        """The codebook by which the block reads tokens, if it does."""
        reads = self.index == 0 or self.config.fills_below(self.index)
        return self.components if self.config.reads_tokens and reads else None

    def head(self, *, by_token: bool = False) -> HeadShape:
        """The shape of a head whose groups are channels, or with `by_token` tokens."""
        config = self.config
        block = self.block
        group = config.latent_dim if by_token else 1
        # groups of d channels in the block's order, which are tokens unless channels are mixed
        tokens = torch.arange(self.channels) // config.latent_dim
        return HeadShape(
            width=config.trunk.width,
            hidden=config.head_hidden * group,
            features=config.head_features,
            linear_paths=config.head == "linear-paths",
            embed_bias=config.head == "paper",
            autoregressive=block.sees_channels and (block.sees_tokens or not by_token),
            # a block that is put on a trained stack must not harm it: it starts as the identity
            noise=0.1 if self.index == 0 else 0.0,
            tokens=None if block.sees_tokens or by_token else tokens,
        )
