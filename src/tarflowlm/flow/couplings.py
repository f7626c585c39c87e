"""Couplings: invertible maps of one position, whose parameters depend on the earlier positions."""

from abc import abstractmethod
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tarflowlm.flow import full_precision
from tarflowlm.flow.numerics import REFERENCE, Maps, log_standard_normal

Latents = Float[Tensor, "B N C"]
Features = Float[Tensor, "B N D"]
ByPosition = Float[Tensor, "B N"]
OneLatent = Float[Tensor, "B C"]
OneFeature = Float[Tensor, "B D"]
Gumbel = Float[Tensor, "B G K"]

AdjustWeights = Callable[[Tensor], Tensor]
"""Maps log-weights of tokens [..., K] to log-weights: temperature, top-k and top-p of a sampler."""


@dataclass(frozen=True)
class Conditional:
    """p(z_g | c_n, z_<g) of one group of channels, as a map to noise and back."""

    forward: Callable[[Tensor], tuple[Tensor, Tensor]]
    """z_g [B, C/G] to u_g [B, C/G], and log|det du_g/dz_g| [B] in nats."""
    inverse: Callable[[Tensor, AdjustWeights | None, Tensor | None], Tensor]
    """u_g to z_g; Mix-d can adjust its weights. With Gumbel numbers [B, K] and a normal u_g it may
    instead draw z_g (eq. 18d).
    """


Conditionals = Generator[Conditional, Tensor | None, None]
"""Yields the conditional of each group of a position; the caller sends back the value z_g."""


class Coupling(nn.Module):
    """A map from the input h_n of a position, given its features c_n, to noise u_n.

    Every coupling satisfies

        log|det J| = sum_n log p(h_n | c_n) - log N(u_n; 0, I)        (docs/math.md, eq. 6)

    so the last block needs only `log_prob`. The code writes z for h, whatever the block.

    To implement one, write `forward` and `conditionals`, and `log_prob` where the density is
    cheaper than the noise; `building.build_coupling` says what its `__init__` gets. Give the class
    a name by `@tarflowlm.coupling("mine")`: `model.blocks.0.coupling` chooses it, and `--import`
    tells a command where it is. A coupling that acts channel by channel subclasses
    `channelwise.ChannelCoupling`, which asks for less (docs/flow.md).
    """

    group: int
    """Channels C/G that one conditional maps."""
    choices: int = 0
    """Components K of a conditional, of which a draw chooses one; 0: a draw inverts noise."""
    maps: Maps = REFERENCE
    """The maps of mixtures where latents are on an accelerator."""

    @abstractmethod
    def forward(self, z: Latents, features: Features) -> tuple[Latents, ByPosition]:
        """Noise u, and log|det du_n/dz_n| of every position, in nats."""

    @abstractmethod
    def conditionals(self, features: OneFeature, weights: Any = None) -> Conditionals:
        """The conditionals of one position, group by group; `weights` as in `invert`."""

    def present_weights(self) -> Any:
        """A copy of what the network now has, as `conditionals` reads it fastest, or None."""
        return None

    def log_prob(self, z: Latents, features: Features) -> ByPosition:
        """log p(z_n | c_n) of every position, in nats."""
        u, log_det = self(z, features)
        return log_det + log_standard_normal(u).sum(-1)

    def invert(
        self,
        u: OneLatent,
        features: OneFeature,
        adjust: AdjustWeights | None = None,
        gumbel: Gumbel | None = None,
        weights: Any = None,
    ) -> OneLatent:
        """The latents z_n of one position, from its noise u_n and features c_n, or a draw.

        `weights` are `present_weights`, for whoever inverts many positions.
        """
        conditionals = self.conditionals(features, weights)
        z: list[Tensor] = []
        with full_precision(u):
            for g, u_g in enumerate(u.split(self.group, -1)):
                conditional = conditionals.send(z[-1] if z else None)
                z.append(conditional.inverse(u_g, adjust, None if gumbel is None else gumbel[:, g]))
        return torch.cat(z, -1)
