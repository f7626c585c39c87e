"""A coupling that fills in what it is sure of, and leaves the rest to the blocks above it."""

from jaxtyping import Float
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


class Fills(MixDCoupling):
    """Mix-d where it is sure of a token, and the identity elsewhere (docs/math.md, eq. 9a).

    A token has the Mix-d map where max_k w_k > `certainty` over tokens k, and u_t = z_t elsewhere.
    The choice depends on the latents before it, so the map stays a flow. It is put around the
    coupling of a block when another block is put on top. Ours, not in the paper.
    """

    def __init__(self, mixd: MixDCoupling, certainty: float) -> None:
        Coupling.__init__(self)
        # the same modules under the same names, so that weights of `mixd` are weights of this
        vars(self).update(vars(mixd))
        self.certainty = certainty

    @property
    def is_tied(self) -> bool:
        """False: where it is the identity, no components are mixed."""
        return False

    def conditional(
        self,
        log_w: Float[Tensor, "rows K"],
        adjust: AdjustWeights | None = None,
        uniform: Float[Tensor, " rows"] | None = None,
    ) -> Conditional:
        num_tokens = log_w.shape[1] - isinstance(self.components, NoisyCodebook)
        largest = log_w.softmax(-1)[:, :num_tokens].amax(-1)
        sure = (largest > self.certainty).nonzero()[:, 0]
        chosen = None if uniform is None else uniform[sure]
        mixd = super().conditional(log_w[sure], adjust, chosen)

        def forward(z: Tensor) -> tuple[Tensor, Tensor]:
            u, log_det = mixd.forward(z[sure])
            return z.index_copy(0, sure, u), z.new_zeros(len(z)).index_copy(0, sure, log_det)

        def inverse(u: Tensor) -> Tensor:
            return u.index_copy(0, sure, mixd.inverse(u[sure])) if len(sure) else u

        return Conditional(forward, inverse)

    def log_prob(self, z: Latents, features: Features, *, relative: bool = False) -> ByPosition:
        assert not relative, "only a tied Mix-d block has a relative density"
        return Coupling.log_prob(self, z, features)
