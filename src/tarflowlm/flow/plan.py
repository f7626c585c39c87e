"""Patches and orders of latents, and the shape of a block for which a coupling is built."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from tarflowlm.errors import UserError
from tarflowlm.flow.codebook import Codebook
from tarflowlm.flow.heads import HeadShape
from tarflowlm.model_config import FlowConfig


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
        is_wide = z.dtype in (torch.float32, torch.float64)
        if z.ndim != 3 or z.shape[-1] != len(self.channels) or not is_wide:
            wanted = f"[B, N, {len(self.channels)}] after tokens are joined to positions"
            what = f"latents of shape {list(z.shape)} and type {z.dtype}"
            raise UserError(f"{what}: the block takes {wanted}, in float32 or wider")
        return self.positions(z[..., self.channels] if self.mixes else z)

    def inverse(self, u: Float[Tensor, "B N C"]) -> Float[Tensor, "B N C"]:
        u = self.positions(u)
        return u[..., self.undo] if self.mixes else u

    def positions(self, x: Float[Tensor, "B N ..."]) -> Float[Tensor, "B N ..."]:
        """x with its positions in the block's order, or back in the order of the tokens."""
        return x.flip(1) if self.reverse else x


class NoisyCodebook:
    """The components of a codebook and, last, N(0, I): the outputs of a block with `certainty`."""

    def __init__(self, codebook: Codebook) -> None:
        self.codebook = codebook
        self.vocab_size = codebook.vocab_size + 1

    @property
    def mean(self) -> Float[Tensor, "K d"]:
        return F.pad(self.codebook.mean, (0, 0, 0, 1))

    @property
    def log_std(self) -> Float[Tensor, " K"]:
        return F.pad(self.codebook.log_std, (0, 1))


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
