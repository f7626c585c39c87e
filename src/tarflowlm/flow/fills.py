"""A Mix-d coupling that fills in what it is sure of, and leaves the rest to the blocks above."""

from torch import Tensor

from tarflowlm.flow.couplings import (
    AdjustWeights,
    ByPosition,
    Conditional,
    Coupling,
    Features,
    Latents,
)
from tarflowlm.flow.mixd import MixDCoupling
from tarflowlm.flow.plan import NoisyCodebook


class FillsIn(MixDCoupling):
    r"""A tied Mix-d coupling below others, which acts only where it is sure (docs/math.md, eq. 9a).

        u_t = Rosenblatt(z_t) where max_k w_k > certainty over tokens k, and z_t elsewhere

    The choice depends on the latents before z_t, so the map stays a flow. Ours, not in the paper.
    """

    def __init__(self, mixd: MixDCoupling, certainty: float) -> None:
        """With the network of `mixd`, under the same names."""
        Coupling.__init__(self)
        vars(self).update(vars(mixd))
        self.certainty = certainty
        self.is_tied = False

    def conditional(self, log_w: Tensor) -> Conditional:
        num_tokens = log_w.shape[1] - isinstance(self.components, NoisyCodebook)
        largest = log_w.softmax(-1)[:, :num_tokens].amax(-1)
        sure = (largest > self.certainty).nonzero()[:, 0]
        mixture = super().conditional(log_w[sure])

        def forward(z: Tensor) -> tuple[Tensor, Tensor]:
            u, log_det = mixture.forward(z[sure])
            return z.index_copy(0, sure, u), z.new_zeros(len(z)).index_copy(0, sure, log_det)

        def inverse(u: Tensor, adjust: AdjustWeights | None, uniform: Tensor | None) -> Tensor:
            if not len(sure):
                return u
            chosen = None if uniform is None else uniform[sure]
            return u.index_copy(0, sure, mixture.inverse(u[sure], adjust, chosen))

        return Conditional(forward, inverse)

    def log_prob(self, z: Latents, features: Features, *, relative: bool = False) -> ByPosition:
        assert not relative, "only a tied Mix-d block has a relative density"
        return Coupling.log_prob(self, z, features)
