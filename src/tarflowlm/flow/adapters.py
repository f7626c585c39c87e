"""The maps of this package as transforms of torch.distributions, which zuko takes as well
(docs/flow.md).

Direction: a transform maps latents z to noise u, so that p(z) = N(u; 0, I) |det du/dz|, as
everywhere here and in zuko. torch.distributions.TransformedDistribution maps the other way and
takes `transform.inv`.
"""

from collections.abc import Callable

from torch import Tensor
from torch.distributions import constraints
from torch.distributions.transforms import Transform

from tarflowlm.flow.numerics import mixture_cdf, mixture_cdf_inverse, rosenblatt, rosenblatt_inverse
from tarflowlm.flow.stack import Bijection


class FlowTransform(Transform):
    """A map z -> (u, log|det du/dz|) and its inverse, over the last `event_dim` axes; never
    cached.
    """

    bijective = True

    def __init__(
        self,
        forward: Callable[[Tensor], tuple[Tensor, Tensor]],
        inverse: Callable[[Tensor], Tensor],
        event_dim: int,
    ) -> None:
        super().__init__()
        self.call_and_ladj, self.invert = (
            forward,
            inverse,
        )  # the former is the name under which zuko calls it
        self.domain = self.codomain = constraints.independent(constraints.real, event_dim)

    def with_cache(self, cache_size: int = 1) -> "FlowTransform":
        return self  # without a cache: parameters may change between two calls with the same tensor

    def _call(self, x: Tensor) -> Tensor:
        return self.call_and_ladj(x)[0]

    def _inverse(self, y: Tensor) -> Tensor:
        return self.invert(y)

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """log|det du/dz| in nats; maps x again, where `call_and_ladj` gives u and this at once."""
        return self.call_and_ladj(x)[1]


class MixtureCdfTransform(FlowTransform):
    """`numerics.mixture_cdf` elementwise: z [...] to u [...]; log_w, mean, log_std [..., K]."""

    sign = +1

    def __init__(self, log_w: Tensor, mean: Tensor, log_std: Tensor) -> None:
        p = (log_w, mean, log_std)
        super().__init__(
            lambda z: mixture_cdf(z, *p), lambda u: mixture_cdf_inverse(u, *p), event_dim=0
        )


class RosenblattTransform(FlowTransform):
    """`numerics.rosenblatt` on vectors: z [..., d] to u [..., d]; log_w [..., K], mean [K, d],
    log_std [K].
    """

    def __init__(self, log_w: Tensor, mean: Tensor, log_std: Tensor) -> None:
        p = (log_w, mean, log_std)
        super().__init__(
            lambda z: rosenblatt(z, *p), lambda u: rosenblatt_inverse(u, *p), event_dim=1
        )


class BijectionTransform(FlowTransform):
    """Any `Bijection` on sequences, such as `model.prior` or one of its blocks: z [..., N, C] to u
    [..., N, C].

    The inverse of a block has no gradients. The parameters stay those of the module.
    """

    def __init__(self, bijection: Bijection) -> None:
        def forward(z: Tensor) -> tuple[Tensor, Tensor]:
            u, log_det = bijection(z.reshape(-1, *z.shape[-2:]))
            return u.reshape(z.shape), log_det.reshape(*z.shape[:-2], -1).sum(-1)

        def inverse(u: Tensor) -> Tensor:
            return bijection.inverse(u.reshape(-1, *u.shape[-2:])).view(u.shape)

        super().__init__(forward, inverse, event_dim=2)
