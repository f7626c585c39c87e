"""Volume-preserving maps: the direction of a block, patches, and the mixing of channels. Their log-det is zero."""

import torch
from jaxtyping import Float
from torch import Tensor

from tarflowlm.errors import UserError
from tarflowlm.flow.bijection import Bijection, zero_log_det


class Direction(Bijection):
    """Reverses the order of positions where `reverse` holds; its own inverse."""

    def __init__(self, reverse: bool) -> None:
        super().__init__()
        self.reverse = reverse

    def forward(self, z: Float[Tensor, "B T C"]) -> tuple[Float[Tensor, "B T C"], Float[Tensor, " B"]]:
        return self.inverse(z), zero_log_det(z)

    def inverse(self, u: Float[Tensor, "B T C"]) -> Float[Tensor, "B T C"]:
        return u.flip(1) if self.reverse else u


class Patch(Bijection):
    """Joins P neighbouring tokens into one position: [B, T, d] <-> [B, T / P, P d] (docs/math.md, eq. 14).

    Raises UserError where P does not divide T.
    """

    def __init__(self, patch: int) -> None:
        super().__init__()
        self.patch = patch

    def forward(self, z: Float[Tensor, "B T d"]) -> tuple[Float[Tensor, "B N C"], Float[Tensor, " B"]]:
        B, T, d = z.shape
        if T % self.patch:
            raise UserError(f"patch {self.patch} does not divide the {T} tokens of the sequence")
        return z.reshape(B, T // self.patch, self.patch * d), zero_log_det(z)

    def inverse(self, u: Float[Tensor, "B N C"]) -> Float[Tensor, "B T d"]:
        B, N, C = u.shape
        return u.reshape(B, N * self.patch, C // self.patch)


class ChannelMix(Bijection):
    """Reorders the last axis to [even-indexed, odd-indexed], `times` times over (docs/math.md, eq. 15).

    With patches of tokens this interleaves their channels, so that the channel-wise autoregression of a later
    block sees the tokens of a patch in another order. The inverse is the exact inverse permutation.
    """

    order: Tensor
    undo: Tensor

    def __init__(self, num_channels: int, times: int = 1) -> None:
        super().__init__()
        order = list(range(num_channels))
        for _ in range(times):
            order = order[0::2] + order[1::2]
        self.is_identity = order == sorted(order)
        self.register_buffer("order", torch.tensor(order), persistent=False)
        self.register_buffer("undo", torch.tensor(order).argsort(), persistent=False)

    def forward(self, z: Float[Tensor, "B T C"]) -> tuple[Float[Tensor, "B T C"], Float[Tensor, " B"]]:
        return (z if self.is_identity else z[..., self.order]), zero_log_det(z)

    def inverse(self, u: Float[Tensor, "B T C"]) -> Float[Tensor, "B T C"]:
        return u if self.is_identity else u[..., self.undo]
