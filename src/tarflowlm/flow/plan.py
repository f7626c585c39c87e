"""Where latents stand: patches and orders; and the plan from which a block is built."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tarflowlm.errors import UserError
from tarflowlm.flow.codebook import Codebook, NoisyCodebook
from tarflowlm.flow.heads import HeadShape
from tarflowlm.model_config import BlockConfig, FlowConfig


class Patch(nn.Module):
    """Joins P neighbouring tokens into one position (docs/math.md, eq. 14).

    UserError if P does not divide T.
    """

    def __init__(self, patch: int) -> None:
        super().__init__()
        if patch < 1:
            raise UserError(f"patch {patch}: must be at least 1")
        self.patch = patch

    def forward(self, z: Float[Tensor, "B T d"]) -> Float[Tensor, "B N C"]:
        if z.ndim != 3:
            raise UserError(f"latents of shape {list(z.shape)}: give [B, T, d]")
        B, T, d = z.shape
        if T % self.patch:
            raise UserError(f"patch {self.patch} does not divide the {T} tokens of the sequence")
        return z.reshape(B, T // self.patch, self.patch * d)

    def inverse(self, u: Float[Tensor, "B N C"]) -> Float[Tensor, "B T d"]:
        B, N, C = u.shape
        return u.reshape(B, N * self.patch, C // self.patch)


class Order(nn.Module):
    """pi_l, the order in which a block sees its input (docs/math.md, eqs. 5 and 15).

    Channels become [even-indexed, odd-indexed], `mix` times, which interleaves the tokens of a
    patch. With `reverse` the positions run right to left.
    """

    channels: Tensor
    undo: Tensor

    def __init__(self, num_channels: int, *, reverse: bool = False, mix: int = 0) -> None:
        super().__init__()
        order = list(range(num_channels))
        for _ in range(mix):
            order = order[0::2] + order[1::2]
        self.reverse = reverse
        self.mixes = order != sorted(order)
        self.register_buffer("channels", torch.tensor(order), persistent=False)
        self.register_buffer("undo", torch.tensor(order).argsort(), persistent=False)

    def forward(self, z: Float[Tensor, "B N C"]) -> Float[Tensor, "B N C"]:
        if z.ndim != 3 or z.shape[-1] != len(self.channels):
            wanted = f"[B, N, {len(self.channels)}] after tokens are joined to positions"
            raise UserError(f"latents of shape {list(z.shape)}: the block takes {wanted}")
        return self.positions(z[..., self.channels] if self.mixes else z)

    def inverse(self, u: Float[Tensor, "B N C"]) -> Float[Tensor, "B N C"]:
        u = self.positions(u)
        return u[..., self.undo] if self.mixes else u

    def positions(self, x: Float[Tensor, "B N ..."]) -> Float[Tensor, "B N ..."]:
        """x with its positions in the block's order, or back in the order of the tokens."""
        return x.flip(1) if self.reverse else x


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
