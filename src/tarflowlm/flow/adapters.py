"""The maps of this package in other hands: torch.distributions, zuko, normflows (docs/flow.md).

Direction: as everywhere here, a transform maps latents z to noise u, so that p(z) = N(u; 0, I) |det du/dz|. That is
also zuko's convention. torch.distributions.TransformedDistribution maps the other way and takes `transform.inv`; so
does normflows, whose `forward` is our inverse.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.distributions import constraints
from torch.distributions.transforms import Transform

from tarflowlm.errors import UserError
from tarflowlm.flow.bijection import Bijection
from tarflowlm.flow.couplings import Coupling
from tarflowlm.flow.numerics import (
    log_standard_normal,
    mixture_cdf,
    mixture_cdf_inverse,
    mixture_log_density,
    mixture_log_prob,
    rosenblatt,
    rosenblatt_inverse,
)


class _Map(Transform):
    """Bijective, and never cached: parameters may change between two calls with the same tensor."""

    bijective = True

    def with_cache(self, cache_size: int = 1) -> "_Map":
        """The transform itself, without a cache."""
        return self

    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """u, and log|det du/dz| in nats; how zuko calls a transform."""
        u = self(x)
        return u, self.log_abs_det_jacobian(x, u)


class MixtureCdfTransform(_Map):
    """`numerics.mixture_cdf` elementwise: z [...] to u [...], parameters [..., K]."""

    domain = codomain = constraints.real
    sign = +1

    def __init__(self, log_w: Tensor, mean: Tensor, log_std: Tensor) -> None:
        super().__init__()
        self.parameters = (log_w, mean, log_std)

    def _call(self, x: Tensor) -> Tensor:
        return mixture_cdf(x, *self.parameters)[0]

    def _inverse(self, y: Tensor) -> Tensor:
        return mixture_cdf_inverse(y, *self.parameters)

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """log du/dz of every element, in nats."""
        return mixture_log_density(x, *self.parameters) - log_standard_normal(y)


class RosenblattTransform(_Map):
    """`numerics.rosenblatt` on vectors: z [..., d] to u [..., d]; log_w [..., K], mean [K, d], log_std [K]."""

    domain = codomain = constraints.real_vector

    def __init__(self, log_w: Tensor, mean: Tensor, log_std: Tensor) -> None:
        super().__init__()
        self.parameters = (log_w, mean, log_std)

    def _call(self, x: Tensor) -> Tensor:
        return rosenblatt(x, *self.parameters)[0]

    def _inverse(self, y: Tensor) -> Tensor:
        return rosenblatt_inverse(y, *self.parameters)

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """log|det du/dz| of every vector, in nats."""
        return mixture_log_prob(x, *self.parameters) - log_standard_normal(y).sum(-1)


class BijectionTransform(_Map):
    """Any `Bijection` on sequences, such as `model.prior` or one of its blocks: z [..., N, C] to u [..., N, C].

    The inverse of a block has no gradients. The parameters stay those of the module.
    """

    domain = codomain = constraints.independent(constraints.real, 2)

    def __init__(self, bijection: Bijection) -> None:
        super().__init__()
        self.bijection = bijection

    def _call(self, x: Tensor) -> Tensor:
        return self.call_and_ladj(x)[0]

    def _inverse(self, y: Tensor) -> Tensor:
        return self.bijection.inverse(y.reshape(-1, *y.shape[-2:])).view(y.shape)

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """log|det du/dz| of every sequence, in nats; maps x again. `call_and_ladj` gives both at once."""
        return self.call_and_ladj(x)[1]

    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """u, and log|det du/dz| in nats; how zuko calls a transform."""
        u, log_det = self.bijection(x.reshape(-1, *x.shape[-2:]))
        return u.reshape(x.shape), log_det.reshape(*x.shape[:-2], -1).sum(-1)


class ConditionedCoupling(Bijection):
    """A coupling with its features [B, N, D] fixed: a bijection of [B, N, C], or of several such batches in a row."""

    def __init__(self, coupling: Coupling, features: Float[Tensor, "B N D"]) -> None:
        super().__init__()
        self.coupling, self.features = coupling, features

    def _repeated(self, z: Tensor) -> Tensor:
        return self.features.repeat(len(z) // len(self.features), 1, 1)

    def forward(self, z: Float[Tensor, "M N C"]) -> tuple[Float[Tensor, "M N C"], Float[Tensor, " M"]]:
        """u, and log|det du/dz| in nats."""
        u, log_det = self.coupling(z, self._repeated(z))
        return u, log_det.sum(-1)

    def inverse(self, u: Float[Tensor, "M N C"]) -> Float[Tensor, "M N C"]:
        """z. Given the features, positions do not depend on each other."""
        return self.coupling.invert(u.flatten(0, 1), self._repeated(u).flatten(0, 1)).view(u.shape)


def zuko_flow(bijection: Bijection, *shape: int) -> Any:
    """A `zuko.flows.Flow` over sequences of this shape (N, C), with a standard normal base; its parameters train.

    UserError without zuko.
    """
    try:
        import zuko
    except ImportError:
        raise UserError("zuko is not installed: pip install zuko") from None

    class Fixed(zuko.lazy.LazyTransform):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.bijection = bijection

        def forward(self, c: Any = None) -> Transform:
            return BijectionTransform(self.bijection)

    like = next(bijection.parameters())
    zeros = torch.zeros(shape, dtype=like.dtype, device=like.device)
    base = zuko.lazy.UnconditionalDistribution(zuko.distributions.DiagNormal, zeros, zeros + 1, 2, buffer=True)
    return zuko.lazy.Flow(Fixed(), base)


def normflows_flow(bijection: Bijection) -> Any:
    """A `normflows.flows.Flow`. Its `forward` maps noise to latents and its `inverse` latents to noise, as there.

    `forward` maps its result back for the log-determinant, and has no gradients through blocks. UserError without
    normflows.
    """
    try:
        from normflows.flows import Flow
    except ImportError:
        raise UserError("normflows is not installed: pip install normflows") from None

    class Adapted(Flow):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.bijection = bijection

        def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
            x = self.bijection.inverse(z)
            return x, -self.bijection(x)[1]

        def inverse(self, z: Tensor) -> tuple[Tensor, Tensor]:
            return self.bijection(z)

    return Adapted()
