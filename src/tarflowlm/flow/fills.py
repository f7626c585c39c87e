"""A coupling that fills in what it is sure of, and leaves the rest to the blocks above it."""

from jaxtyping import Float, Int
from torch import Tensor

from tarflowlm.flow.codebook import NoisyCodebook
from tarflowlm.flow.couplings import (
    AdjustWeights,
    ByPosition,
    Conditional,
    Coupling,
    Features,
    Latents,
)
from tarflowlm.flow.mixd import MixDCoupling
from tarflowlm.flow.numerics import log_standard_normal


class Fills(MixDCoupling):
    """Mix-d where it is sure of a token, and the identity elsewhere (docs/math.md, eq. 9a).

    A token has the Mix-d map where max_k w_k > `certainty` over tokens k, and u_t = z_t elsewhere.
    The choice depends on the latents before it, so the map stays a flow. Where it acts u_t is
    standard normal; the blocks above model the rest, whose density here is N(z_t; 0, I).

    It is put around the coupling of a block when another block is put on top: as the last block
    of its stage, that coupling was the model of all tokens. Ours, not in the paper.
    """

    def __init__(self, mixd: MixDCoupling, certainty: float) -> None:
        Coupling.__init__(self)
        # the same modules under the same names, so that weights of `mixd` are weights of this
        vars(self).update(vars(mixd))
        self.certainty = certainty

    @property
    def is_tied(self) -> bool:
        return False

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, certainty={self.certainty}"

    def sure(self, log_w: Float[Tensor, "rows K"]) -> Int[Tensor, " sure"]:
        """The rows with a token whose weight is above `certainty`."""
        num_tokens = log_w.shape[1] - isinstance(self.components, NoisyCodebook)
        largest = log_w.softmax(-1)[:, :num_tokens].amax(-1)
        return (largest > self.certainty).nonzero()[:, 0]

    def conditional(
        self, log_w: Float[Tensor, "rows K"], adjust: AdjustWeights | None = None
    ) -> Conditional:
        sure = self.sure(log_w)
        mixd = super().conditional(log_w[sure], adjust)

        def forward(z: Tensor) -> tuple[Tensor, Tensor]:
            u, log_det = mixd.forward(z[sure])
            return z.index_copy(0, sure, u), z.new_zeros(len(z)).index_copy(0, sure, log_det)

        def inverse(u: Tensor) -> Tensor:
            return u.index_copy(0, sure, mixd.inverse(u[sure])) if len(sure) else u

        def log_density(z: Tensor) -> Tensor:
            elsewhere = log_standard_normal(z).sum(-1)
            return elsewhere.index_copy(0, sure, mixd.log_density(z[sure]))

        return Conditional(forward, inverse, log_density)

    def log_prob(self, z: Latents, features: Features) -> ByPosition:
        return Coupling.log_prob(self, z, features)
