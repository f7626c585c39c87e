"""Patches join tokens to positions; an order says in which order a block sees them."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tarflowlm.errors import UserError


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
