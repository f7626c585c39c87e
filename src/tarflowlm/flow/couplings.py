"""Couplings: the invertible map of one position, its parameters predicted from the features of the past.

All of them share one identity, per position:  log|det J| = log p(z | past) - log N(u; 0, I)   (docs/math.md, eq. 6)
so that `log_prob`, the density of z, is all the last block needs. Shape legend: B batch, T positions, D width,
C = P d channels of a position, K components. `forward` and `log_prob` take whole sequences, `invert` one position.
"""

from abc import abstractmethod
from collections.abc import Callable, Generator
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from tarflowlm.codebook import Codebook
from tarflowlm.flow import numerics
from tarflowlm.flow.heads import AutoregressiveHead
from tarflowlm.flow.numerics import standard_normal_log_prob
from tarflowlm.flow.precision import full_precision

_FEW = 512
"""Latents up to which a channel coupling is inverted in sweeps."""

AdjustWeights = Callable[[Tensor], Tensor]
"""Maps log-weights [..., K] to log-weights: temperature, top-k and top-p of a sampler."""


@dataclass(frozen=True)
class Conditional:
    """p(z_g | past, earlier groups) of one group of m channels, as a map to its noise and back."""

    forward: Callable[[Tensor], tuple[Tensor, Tensor]]
    """z_g [B, m] to u_g [B, m] and log|det| [B]."""
    inverse: Callable[[Tensor], Tensor]
    """u_g to z_g, under the weights that a sampler may have changed."""


Walk = Generator[Conditional, Tensor | None, None]
"""The conditionals of one position, group after group; it is sent the value z_g of each."""


class Coupling(nn.Module):
    """What a block asks of its coupling. `group` is the number m of channels that are drawn at once."""

    group: int

    @abstractmethod
    def forward(
        self, z: Float[Tensor, "B T C"], features: Float[Tensor, "B T D"]
    ) -> tuple[Float[Tensor, "B T C"], Float[Tensor, " B"]]:
        """Noise u and log|det du/dz|."""

    @abstractmethod
    def log_prob(
        self, z: Float[Tensor, "B T C"], features: Float[Tensor, "B T D"], *, equal_cotangents: bool = False
    ) -> Float[Tensor, " B"]:
        """log p(z | past), summed over positions: nats.

        `equal_cotangents` promises a loss that weights all sequences alike, which saves work at large vocabularies.
        """

    @abstractmethod
    def walk(self, features: Float[Tensor, "B D"], adjust: AdjustWeights | None = None) -> Walk:
        """The conditionals of one position, from the features of its past."""

    def invert(
        self, u: Float[Tensor, "B C"], features: Float[Tensor, "B D"], adjust: AdjustWeights | None = None
    ) -> Float[Tensor, "B C"]:
        """The latents of one position, from its noise and the features of its past."""
        walk = self.walk(features, adjust)
        z: list[Tensor] = []
        for u_g in u.split(self.group, -1):
            z.append(walk.send(z[-1] if z else None).inverse(u_g))
        return torch.cat(z, -1)

    def complete(
        self,
        u: Float[Tensor, "B C"],
        features: Float[Tensor, "B D"],
        known: Float[Tensor, "B C"],
        is_known: Bool[Tensor, "B P"],
        adjust: AdjustWeights | None = None,
    ) -> tuple[Float[Tensor, "B C"], Float[Tensor, "B C"], Float[Tensor, "B P"]]:
        """One position of which some tokens are given: (z, u, log p).

        Given tokens keep their latents `known` and get the noise that belongs to them, the others are inverted from
        `u`. log p [B, P] is that of the given tokens' latents given all before them, and zero elsewhere.
        """
        P, channels = is_known.shape[1], u.shape[1]
        walk = self.walk(features, adjust)
        z: list[Tensor] = []
        noise: list[Tensor] = []
        log_p = u.new_zeros(is_known.shape)
        # looked at on the host, so that nothing is computed twice where all rows agree
        some, every = is_known.any(0).tolist(), is_known.all(0).tolist()
        mask = is_known.to(u.device)
        for g, (u_g, known_g) in enumerate(zip(u.split(self.group, -1), known.split(self.group, -1), strict=True)):
            conditional, j = walk.send(z[-1] if z else None), g * self.group * P // channels
            if not some[j]:
                z.append(conditional.inverse(u_g))
                noise.append(u_g)
                continue
            given_u, log_det = conditional.forward(known_g)
            density = log_det + standard_normal_log_prob(given_u)
            here = mask[:, j, None]
            z.append(known_g if every[j] else torch.where(here, known_g, conditional.inverse(u_g)))
            noise.append(torch.where(here, given_u, u_g))
            log_p[:, j] += torch.where(here[:, 0], density, 0.0)
        return torch.cat(z, -1), torch.cat(noise, -1), log_p


class ChannelCoupling(Coupling):
    """A coupling that draws one channel at a time, or m, all their parameters from one autoregressive head."""

    group = 1
    head: AutoregressiveHead

    @abstractmethod
    def conditional(self, parameters: list[Tensor], adjust: AdjustWeights | None) -> Conditional:
        """From parameters [n, O] of n groups of channels, a map of [n, m]."""

    def walk(self, features: Float[Tensor, "B D"], adjust: AdjustWeights | None = None) -> Walk:
        state = self.head.start(features)
        for _ in range(self.head.groups):
            z = yield self.conditional([p[0] for p in self.head.step(state)], adjust)
            assert z is not None
            state = self.head.observe(state, z)

    def invert(
        self, u: Float[Tensor, "B C"], features: Float[Tensor, "B D"], adjust: AdjustWeights | None = None
    ) -> Float[Tensor, "B C"]:
        """Few rows are inverted in sweeps over all G groups at once, until nothing changes: G always suffice.

        There a call costs the same for one group as for all of them, and a block near the identity needs about
        three sweeps, where a walk needs G steps.
        """
        B = len(u)
        if torch.is_grad_enabled() or u.numel() > _FEW:
            return super().invert(u, features, adjust)
        G, m = self.head.groups, self.group
        noise, z = u.view(B, G, m).transpose(0, 1).reshape(-1, m), u
        for _ in range(G):
            parameters = [p.reshape(G * B, -1) for p in self.head(features[:, None], z[:, None])]
            before, z = (
                z,
                self.conditional(parameters, adjust).inverse(noise).view(G, B, m).transpose(0, 1).flatten(1),
            )
            if ((z - before).abs() <= 4 * torch.finfo(u.dtype).eps * (1 + z.abs())).all():
                break
        return z


class AffineCoupling(ChannelCoupling):
    """z_i = exp(s_i) u_i + m_i, with (m_i, s_i) from the past positions and the channels < i (docs/math.md, eq. 7).

    The K = 1 case of Mix-1 in closed form. With a `group` of m channels, i counts groups of m: all channels of a
    token at once for m = d, TarFlow's coupling at one token per position. Paper: section 3.2.
    """

    def __init__(self, *, width: int, channels: int, hidden: int, features: int, group: int = 1) -> None:
        super().__init__()
        self.group = group
        self.head = AutoregressiveHead(
            width=width,
            groups=channels // group,
            channels=group,
            hidden=hidden * group,
            outputs=(group, group),
            features=features,
            skip=True,
        )

    def forward(
        self, z: Float[Tensor, "B T C"], features: Float[Tensor, "B T D"]
    ) -> tuple[Float[Tensor, "B T C"], Float[Tensor, " B"]]:
        mean, log_std = (p.permute(1, 2, 0, 3).flatten(2) for p in self.head(features, z))
        return (z - mean) * torch.exp(-log_std), -log_std.flatten(1).sum(-1)

    def log_prob(
        self, z: Float[Tensor, "B T C"], features: Float[Tensor, "B T D"], *, equal_cotangents: bool = False
    ) -> Float[Tensor, " B"]:
        u, log_det = self(z, features)
        return log_det + standard_normal_log_prob(u)

    def conditional(self, parameters: list[Tensor], adjust: AdjustWeights | None) -> Conditional:
        mean, log_std = parameters

        def forward(z: Tensor) -> tuple[Tensor, Tensor]:
            return (z - mean) * torch.exp(-log_std), -log_std.sum(-1)

        return Conditional(forward, lambda u: u * log_std.exp() + mean)


class Mix1Coupling(ChannelCoupling):
    r"""Channel-wise mixture-CDF coupling (docs/math.md, eq. 8).

        u_i = Phi^-1( sum_k w_k Phi((z_i - m_k) / s_k) ),    log du_i/dz_i = log p(z_i) - log phi(u_i)

    with all 3 K parameters from the past positions and the channels < i. Paper: section 3.2.1.

    Start: component means at `spread` times the quantiles of a standard normal and widths that bring the variance of
    the mixture to one; near 0 that is the identity, which is right on top of other blocks. The block that meets the
    codebook should start from it instead, see `start_from`.
    """

    def __init__(
        self, *, width: int, channels: int, components: int, hidden: int, features: int, spread: float
    ) -> None:
        super().__init__()
        self.head = AutoregressiveHead(
            width=width,
            groups=channels,
            channels=1,
            hidden=hidden,
            outputs=(components,) * 3,
            features=features,
            skip=True,
        )
        level = (torch.arange(components, dtype=torch.float64) + 0.5) / components
        means = spread * torch.special.ndtri(level)
        variance = (1.0 - means.square().mean()).clamp_min((1.0 / components) ** 2)
        with torch.no_grad():
            self.head.biases[1].copy_(means.float().expand(channels, -1))
            self.head.biases[2].fill_(0.5 * variance.log())

    @torch.no_grad()
    def start_from(self, codebook: Codebook) -> None:
        r"""Start as the Mix-d coupling of this codebook with uniform weights (docs/math.md, eq. 10).

        With K = V, component k of channel i takes the mean mu_{k,i} and the width sigma_k, and the log-weights of
        channel i the evidence of the earlier channels of its token, which for equal sigma is linear in them:
        sum_{j<i} log N(z_j; mu_kj, sigma^2) = sum_{j<i} (mu_kj z_j - mu_kj^2 / 2) / sigma^2 + terms without k.
        From there training is free to leave Mix-d; a start that ignores the codebook costs it most of its steps.
        """
        mean, dim = codebook.mean.T, codebook.mean.shape[1]
        evidence = self.head.evidence
        assert evidence is not None
        assert self.head.biases[0].shape[1] == codebook.vocab_size
        unit = codebook.log_std.exp().mean()
        self.head.scale[1] = unit
        per_channel = mean / unit.square()
        for c in range(self.head.groups):
            i = c % dim
            self.head.biases[0][c] = -0.5 * (mean[:i] * per_channel[:i]).sum(0)
            self.head.biases[1][c] = mean[i] / unit
            self.head.biases[2][c] = codebook.log_std
            evidence[c, c - i : c, 0] = per_channel[:i]

    def _mixture(self, z: Tensor, features: Tensor) -> tuple[Tensor, list[Tensor]]:
        """z as [C, B, T], as the head lays out its parameters [C, B, T, K]."""
        return z.permute(2, 0, 1).contiguous(), self.head(features, z)

    def forward(
        self, z: Float[Tensor, "B T C"], features: Float[Tensor, "B T D"]
    ) -> tuple[Float[Tensor, "B T C"], Float[Tensor, " B"]]:
        z_CBT, (log_w, mean, log_std) = self._mixture(z, features)
        with full_precision(z):
            u, log_det = numerics.mixture_cdf(z_CBT, log_w, mean, log_std)
        return u.permute(1, 2, 0), log_det.sum((0, 2))

    def log_prob(
        self, z: Float[Tensor, "B T C"], features: Float[Tensor, "B T D"], *, equal_cotangents: bool = False
    ) -> Float[Tensor, " B"]:
        z_CBT, (log_w, mean, log_std) = self._mixture(z, features)
        with full_precision(z):
            return numerics.mixture_log_density(z_CBT, log_w, mean, log_std).sum((0, 2))

    def conditional(self, parameters: list[Tensor], adjust: AdjustWeights | None) -> Conditional:
        log_w, mean, log_std = parameters

        def forward(z: Tensor) -> tuple[Tensor, Tensor]:
            u, log_det = numerics.mixture_cdf(z[:, 0], log_w, mean, log_std)
            return u[:, None], log_det

        def inverse(u: Tensor) -> Tensor:
            changed = log_w if adjust is None else adjust(log_w)
            return numerics.mixture_cdf_inverse(u[:, 0], changed, mean, log_std)[:, None]

        return Conditional(forward, inverse)
