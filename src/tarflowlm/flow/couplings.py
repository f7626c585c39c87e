"""Couplings: invertible maps of one position, with parameters predicted from features of the
earlier positions.

A coupling maps the input h_n of a position, given the features c_n, to noise u_n. All of them
satisfy

    log|det J| = sum_n log p(h_n | c_n) - log N(u_n; 0, I)        (docs/math.md, eq. 6)

so the last block needs only `log_prob`. The code writes z for h, whatever the block.

Shape legend: B batch, N positions, P tokens per position, d channels per token, C = P d, D width, K
components, G groups of C / G channels. `forward` and `log_prob` take whole sequences, `invert` and
`complete` one position.
"""

from abc import abstractmethod
from collections.abc import Callable, Generator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tarflowlm.flow.numerics import standard_normal_log_prob

AdjustWeights = Callable[[Tensor], Tensor]
"""Maps log-weights of tokens [..., K] to log-weights: the temperature, top-k and top-p of a
sampler.
"""


@dataclass(frozen=True)
class Conditional:
    """p(z_g | c_n, z_<g) of one group of channels, as a map to noise and back."""

    # z_g [B, C/G] to u_g [B, C/G] and log|det du_g/dz_g| [B], in nats
    forward: Callable[[Tensor], tuple[Tensor, Tensor]]
    inverse: Callable[[Tensor], Tensor]  # u_g to z_g, with the weights as the sampler adjusted them
    log_density: Callable[
        [Tensor], Tensor
    ]  # log p(z_g | c_n, z_<g) [B] of `forward`, in nats, without the noise


Conditionals = Generator[Conditional, Tensor | None, None]
"""Yields the conditional of each group of a position in turn; the caller sends back the value
z_g.
"""


class Coupling(nn.Module):
    """The interface of a coupling. `group` is the number C/G of channels per group."""

    group: int
    is_tied = False
    """True for a mixture of the encoder's codebook; its `log_prob` then takes `relative`."""

    @abstractmethod
    def forward(
        self, z: Float[Tensor, "B N C"], features: Float[Tensor, "B N D"]
    ) -> tuple[Tensor, Tensor]:
        """Noise u [B, N, C], and log|det du_n/dz_n| of every position [B, N], in nats."""

    @abstractmethod
    def log_prob(
        self, z: Float[Tensor, "B N C"], features: Float[Tensor, "B N D"]
    ) -> Float[Tensor, "B N"]:
        """log p(z_n | c_n) of every position, in nats."""

    @abstractmethod
    def conditionals(
        self, features: Float[Tensor, "B D"], adjust: AdjustWeights | None = None
    ) -> Conditionals:
        """The conditionals of one position, group by group, from its features c_n.

        `adjust` changes the mixture weights of `inverse`; only for Mix-d, whose components can be
        tokens.
        """

    def invert(
        self,
        u: Float[Tensor, "B C"],
        features: Float[Tensor, "B D"],
        adjust: AdjustWeights | None = None,
    ) -> Float[Tensor, "B C"]:
        """The latents z_n of one position, from its noise u_n and features c_n."""
        return self._walk(u, self.conditionals(features, adjust))

    def _walk(self, u: Float[Tensor, "B C"], conditionals: Conditionals) -> Float[Tensor, "B C"]:
        z: list[Tensor] = []
        for u_g in u.split(self.group, -1):
            z.append(conditionals.send(z[-1] if z else None).inverse(u_g))
        return torch.cat(z, -1)

    def inverter(self) -> Callable[[Tensor, Tensor, AdjustWeights | None], Tensor]:
        """`invert` for many positions, with the weights as they are now."""
        return self.invert

    def complete(
        self,
        u: Tensor,
        features: Tensor,
        known: Tensor,
        is_known: Tensor,
        adjust: AdjustWeights | None = None,
    ) -> tuple[Float[Tensor, "B C"], Float[Tensor, "B C"], Float[Tensor, "B P"]]:
        """Complete one position in which some tokens are given, `is_known` [B, P]: returns (z, u,
        log p).

        They keep their latents `known` [B, C] and get the noise those map to; the others are
        inverted from u [B, C]. log p, in nats, is that of each given token's latents conditional on
        everything before them, and 0 for the other tokens (docs/math.md, section 9).
        """
        P, channels = is_known.shape[1], u.shape[1]
        conditionals, z, noise = self.conditionals(features, adjust), list[Tensor](), list[Tensor]()
        log_p, mask = u.new_zeros(is_known.shape), is_known.to(u.device)
        # read on the host, to skip a direction that no row needs
        some, every = is_known.any(0).tolist(), is_known.all(0).tolist()
        for g, (u_g, known_g) in enumerate(
            zip(u.split(self.group, -1), known.split(self.group, -1), strict=True)
        ):
            conditional, a = conditionals.send(z[-1] if z else None), g * self.group * P // channels
            if not some[a]:
                z.append(conditional.inverse(u_g))
                noise.append(u_g)
                continue
            given_u, log_det = conditional.forward(known_g)
            here = mask[:, a, None]
            z.append(known_g if every[a] else torch.where(here, known_g, conditional.inverse(u_g)))
            noise.append(torch.where(here, given_u, u_g))
            log_p[:, a] += torch.where(here[:, 0], log_det + standard_normal_log_prob(given_u), 0.0)
        return torch.cat(z, -1), torch.cat(noise, -1), log_p
