"""Couplings channel by channel, or group by group, with parameters from an autoregressive head.

Inside a position the forward map is parallel, and the inverse goes from group to group.
"""

from abc import abstractmethod

import torch
from torch import Tensor

from tarflowlm.errors import UserError
from tarflowlm.flow import full_precision, numerics
from tarflowlm.flow.couplings import (
    AdjustWeights,
    ByPosition,
    Conditional,
    Conditionals,
    Coupling,
    Features,
    Latents,
    OneFeature,
)
from tarflowlm.flow.head_steps import Weights, head_weights
from tarflowlm.flow.heads import AutoregressiveHead, HeadShape


class ChannelCoupling(Coupling):
    """A coupling of groups of C/G channels, with parameters from an autoregressive head.

    To implement one, `__init__` takes `channels` (C), the shape of a `head` and its own options by
    name, and makes that head; `to_noise` and `to_latents` map a group from its outputs. In a
    forward pass a group is [G, B, N, C/G], in an inverse [B, C/G]. The noise has to be standard
    normal, whatever p(z) is: log du/dz = log p(z) - log N(u; 0, 1). docs/flow.md has one in 30
    lines.
    """

    group = 1
    head: AutoregressiveHead

    @abstractmethod
    def to_noise(self, z: Tensor, *parameters: Tensor) -> tuple[Tensor, Tensor]:
        """Noise u and log du_i/dz_i of every channel [..., C/G], in nats; parameters [..., O]."""

    @abstractmethod
    def to_latents(self, u: Tensor, *parameters: Tensor) -> Tensor:
        """The inverse of `to_noise` at the same parameters."""

    def draw(self, normal: Tensor, gumbel: Tensor, *parameters: Tensor) -> Tensor:
        """A draw from standard normal [B, C/G] and Gumbel numbers [B, K]; here the inverse."""
        return self.to_latents(normal, *parameters)

    def channels(self, z: Latents, features: Features) -> tuple[Latents, Latents]:
        """Noise u, and log du_i/dz_i of every channel, in nats."""
        parameters = self.head(features, z)
        groups = z.unflatten(-1, (-1, self.group)).permute(2, 0, 1, 3).contiguous()  # [G, B, N, m]
        with full_precision(z):
            u, log_slope = self.to_noise(groups, *parameters)
        u, log_slope = (x.permute(1, 2, 0, 3).flatten(2) for x in (u, log_slope))
        return u, log_slope

    def forward(self, z: Latents, features: Features) -> tuple[Latents, ByPosition]:
        u, log_slope = self.channels(z, features)
        return u, log_slope.sum(-1)

    def newton_step(self, z: Latents, u: Latents, features: Features) -> tuple[Latents, Latents]:
        """A step from a guess z towards the latents of noise u, and the residual u - f(z).

            z_i + (u_i - f_i(z)) / (df_i/dz_i)        (docs/math.md, eq. 18c)

        The latents of u are the only fixed point.
        """
        with full_precision(z):
            mapped, log_slope = self.channels(z, features)
        residual = u - mapped
        return torch.addcmul(z, residual, torch.exp(-log_slope)), residual

    def conditionals(self, features: OneFeature, weights: Weights | None = None) -> Conditionals:
        walk = (weights or head_weights(self.head, features)).walk(features)
        z = None
        for _ in range(self.head.groups):
            z = yield self._conditional(walk.send(z))

    def _conditional(self, parameters: list[Tensor]) -> Conditional:
        def forward(z: Tensor) -> tuple[Tensor, Tensor]:
            u, log_slope = self.to_noise(z, *parameters)
            return u, log_slope.sum(-1)

        def inverse(u: Tensor, adjust: AdjustWeights | None, gumbel: Tensor | None) -> Tensor:
            assert adjust is None, "the components of a channel are not tokens"
            if gumbel is None:
                return self.to_latents(u, *parameters)
            return self.draw(u, gumbel, *parameters)

        return Conditional(forward, inverse)

    def present_weights(self) -> Weights:
        return head_weights(self.head)


class AffineCoupling(ChannelCoupling):
    r"""Affine coupling, one Gaussian per channel (docs/math.md, eq. 7).

        u_i = (z_i - m_i) / s_i,    log du_i/dz_i = -log s_i,    (m_i, log s_i) = head_i(c, z_<i)

    Mix-1 with K = 1, in closed form. With `group` > 1, i counts groups: `group` = d is the
    token-affine coupling, which for P = 1 is TarFlow's. Paper: section 3.2.
    """

    def __init__(self, *, channels: int, head: HeadShape, group: int = 1) -> None:
        super().__init__()
        if group < 1 or channels % group:
            raise UserError(f"group {group}: must divide the {channels} channels")
        self.group = group
        self.head = AutoregressiveHead(
            head,
            groups=channels // group,
            channels=group,
            outputs=(group, group),
            log_std_last=True,
        )

    def to_noise(self, z: Tensor, *parameters: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_std = parameters
        return (z - mean) * torch.exp(-log_std), -log_std

    def to_latents(self, u: Tensor, *parameters: Tensor) -> Tensor:
        mean, log_std = parameters
        return u * log_std.exp() + mean


class Mix1Coupling(ChannelCoupling):
    r"""Mix-1: the CDF of a mixture per channel (docs/math.md, eq. 8).

        u_i = Phi^-1( sum_k w_ik Phi((z_i - m_ik) / s_ik) )
        log du_i/dz_i = log p(z_i) - log phi(u_i)

    with the 3 K parameters (w_i, m_i, s_i) = head_i(c, z_<i). Paper: section 3.2.1.

    Start: means at `spread` times standard normal quantiles, scales that give the mixture unit
    variance. A small `spread` is close to the identity.
    """

    def __init__(
        self, *, channels: int, components: int, head: HeadShape, spread: float = 0.3
    ) -> None:
        super().__init__()
        if components < 1:
            raise UserError(f"components {components}: must be at least 1")
        self.head = AutoregressiveHead(
            head, groups=channels, channels=1, outputs=(components,) * 3, log_std_last=True
        )
        self.choices = components
        quantiles = (torch.arange(components, dtype=torch.float64) + 0.5) / components
        means = spread * torch.special.ndtri(quantiles)
        variance = (1.0 - means.square().mean()).clamp_min(components**-2)
        with torch.no_grad():
            self.head.biases[1].copy_(means.float().expand(channels, -1))
            self.head.biases[2].fill_(0.5 * variance.log())

    def to_noise(self, z: Tensor, *parameters: Tensor) -> tuple[Tensor, Tensor]:
        u, log_slope = numerics.mixture_cdf(z[..., 0], *parameters, maps=self.maps)
        return u[..., None], log_slope[..., None]

    def to_latents(self, u: Tensor, *parameters: Tensor) -> Tensor:
        z = numerics.mixture_cdf_inverse(u[..., 0], *parameters, maps=self.maps)
        return z[..., None]

    def draw(self, normal: Tensor, gumbel: Tensor, *parameters: Tensor) -> Tensor:
        log_w, mean, log_std = parameters
        k = (log_w + gumbel).argmax(-1, keepdim=True)
        return torch.addcmul(mean.gather(1, k), log_std.gather(1, k).exp(), normal)

    def log_prob(self, z: Latents, features: Features) -> ByPosition:
        parameters = self.head(features, z)
        channels = z.permute(2, 0, 1).contiguous()
        with full_precision(z):
            return numerics.mixture_log_density(channels, *parameters, maps=self.maps).sum(0)
