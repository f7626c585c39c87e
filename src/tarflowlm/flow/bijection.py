"""The interface of invertible maps, their composition, and the volume-preserving maps.

Shape legend: B batch, T tokens, P patch, N = T / P positions, d channels per token, C = P d.
"""

from abc import abstractmethod
from collections.abc import Iterable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tarflowlm.errors import UserError


def zero_log_det(z: Tensor) -> Tensor:
    """Zeros [B]: the log-determinant of a volume-preserving map, with the dtype and device of z [B, ...]."""
    return torch.zeros(z.shape[0], dtype=z.dtype, device=z.device)


class Bijection(nn.Module):
    """An invertible map between latents z and noise u, both [B, N, C].

    A subclass provides `forward` and `inverse`; forward(inverse(u))[0] equals u up to rounding.
    """

    @abstractmethod
    def forward(self, z: Float[Tensor, "B N C"]) -> tuple[Float[Tensor, "B ..."], Float[Tensor, "B ..."]]:
        """Latents to noise, in parallel over positions: u, and log|det du/dz| in nats.

        The log-determinant is that of the sequence, [B], or for a flow block its parts by position, [B, N].
        """

    @abstractmethod
    def inverse(self, u: Float[Tensor, "B N C"]) -> Float[Tensor, "B ..."]:
        """Noise to latents, without a log-determinant."""


class Compose(Bijection):
    """The composition of `maps`, applied in the order given."""

    def __init__(self, maps: Iterable[Bijection] = ()) -> None:
        super().__init__()
        self.maps = nn.ModuleList(maps)

    def forward(self, z: Float[Tensor, "B N C"]) -> tuple[Float[Tensor, "B ..."], Float[Tensor, " B"]]:
        """The output of the last map, and the sum of all log-determinants [B], in nats."""
        log_det = zero_log_det(z)
        for f in self.maps:
            z, step = f(z)
            log_det = log_det + step
        return z, log_det

    def inverse(self, u: Float[Tensor, "B N C"]) -> Float[Tensor, "B ..."]:
        """The inverses of the maps, last to first."""
        for f in reversed(self.maps):
            u = f.inverse(u)  # type: ignore[operator]
        return u


class Direction(Bijection):
    """Reverses the order of positions if `reverse`, else the identity; its own inverse (docs/math.md, eq. 5)."""

    def __init__(self, reverse: bool) -> None:
        super().__init__()
        self.reverse = reverse

    def forward(self, z: Float[Tensor, "B N C"]) -> tuple[Float[Tensor, "B N C"], Float[Tensor, " B"]]:
        """z with its positions reversed; log-determinant 0."""
        return self.inverse(z), zero_log_det(z)

    def inverse(self, u: Float[Tensor, "B N ..."]) -> Float[Tensor, "B N ..."]:
        """u with its positions reversed."""
        return u.flip(1) if self.reverse else u


class Patch(Bijection):
    """Joins P neighbouring tokens into one position: [B, T, d] <-> [B, N, C] (docs/math.md, eq. 14)."""

    def __init__(self, patch: int) -> None:
        super().__init__()
        self.patch = patch

    def forward(self, z: Float[Tensor, "B T d"]) -> tuple[Float[Tensor, "B N C"], Float[Tensor, " B"]]:
        """Tokens to positions; log-determinant 0. UserError if P does not divide T."""
        B, T, d = z.shape
        if T % self.patch:
            raise UserError(f"patch {self.patch} does not divide the {T} tokens of the sequence")
        return z.reshape(B, T // self.patch, self.patch * d), zero_log_det(z)

    def inverse(self, u: Float[Tensor, "B N C"]) -> Float[Tensor, "B T d"]:
        """Positions to tokens."""
        B, N, C = u.shape
        return u.reshape(B, N * self.patch, C // self.patch)


class ChannelMix(Bijection):
    """Reorders the channels to [even-indexed, odd-indexed], applied `times` times (docs/math.md, eq. 15).

    This interleaves the channels of the tokens in a patch, so a later block models them in another order. The
    inverse is the inverse permutation.
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

    def forward(self, z: Float[Tensor, "B N C"]) -> tuple[Float[Tensor, "B N C"], Float[Tensor, " B"]]:
        """z with its channels permuted; log-determinant 0."""
        return (z if self.is_identity else z[..., self.order]), zero_log_det(z)

    def inverse(self, u: Float[Tensor, "B N C"]) -> Float[Tensor, "B N C"]:
        """u with the permutation undone."""
        return u if self.is_identity else u[..., self.undo]
