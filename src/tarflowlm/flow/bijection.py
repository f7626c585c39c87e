"""The contract of every invertible map here, their composition, and the maps that keep the volume."""

from abc import abstractmethod
from collections.abc import Iterable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tarflowlm.errors import UserError


def zero_log_det(z: Tensor) -> Tensor:
    """log|det| = 0 for every sequence: [B]."""
    return torch.zeros(z.shape[0], dtype=z.dtype, device=z.device)


class Bijection(nn.Module):
    """An invertible map between latents z and noise u, both [B, T, C].

    `forward` takes latents to noise, in parallel over positions, and returns the value together with
    log|det du/dz|, summed over positions and channels: shape [B], in nats.
    `inverse` takes noise to latents and returns the latents alone.
    A subclass provides both; forward(inverse(u))[0] equals u up to rounding.
    """

    @abstractmethod
    def forward(self, z: Float[Tensor, "B T C"]) -> tuple[Float[Tensor, "B ..."], Float[Tensor, " B"]]: ...

    @abstractmethod
    def inverse(self, u: Float[Tensor, "B T C"]) -> Float[Tensor, "B ..."]: ...


class Compose(Bijection):
    """f_n o ... o f_1: applies the maps in the order given and adds their log-determinants."""

    def __init__(self, maps: Iterable[Bijection] = ()) -> None:
        super().__init__()
        self.maps = nn.ModuleList(maps)

    def forward(self, z: Float[Tensor, "B T C"]) -> tuple[Float[Tensor, "B ..."], Float[Tensor, " B"]]:
        log_det = zero_log_det(z)
        for f in self.maps:
            z, step = f(z)
            log_det = log_det + step
        return z, log_det

    def inverse(self, u: Float[Tensor, "B T C"]) -> Float[Tensor, "B ..."]:
        for f in reversed(self.maps):
            u = f.inverse(u)  # type: ignore[operator]
        return u


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
