"""The contract of every invertible map here, and the composition of such maps."""

from abc import abstractmethod
from collections.abc import Iterable

import torch
from jaxtyping import Float
from torch import Tensor, nn


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
