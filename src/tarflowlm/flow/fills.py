"""Positions in which some tokens are settled and others are filled in.

`FillsIn` settles the tokens that a Mix-d block is sure of; `complete` keeps the given tokens.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tarflowlm.flow import full_precision
from tarflowlm.flow.codebook import NoisyCodebook
from tarflowlm.flow.couplings import (
    AdjustWeights,
    Conditional,
    Coupling,
    Gumbel,
    OneFeature,
    OneLatent,
)
from tarflowlm.flow.mixd import MixDCoupling
from tarflowlm.flow.numerics import LogWeights, standard_normal_log_prob


class FillsIn(MixDCoupling):
    r"""A tied Mix-d coupling below others, which acts only where it is sure (docs/math.md, eq. 9a).

        u_t = Rosenblatt(z_t) where max_k w_k > certainty over tokens k, and z_t elsewhere

    The choice depends on the latents before z_t, so the map stays a flow. Ours, not in the paper.
    """

    log_prob = Coupling.log_prob  # the mixture alone is not the density

    def __init__(self, mixd: MixDCoupling, certainty: float) -> None:
        """With the network of `mixd`, under the same names."""
        Coupling.__init__(self)
        vars(self).update(vars(mixd))
        self.certainty = certainty
        self.uses_encoder_codebook = False

    def conditional(self, log_w: Tensor | LogWeights) -> Conditional:
        if not isinstance(log_w, Tensor):
            log_w = log_w(slice(None))
        # counting operations runs on tensors without values: take all rows
        if log_w.is_meta:
            return super().conditional(log_w)
        num_tokens = log_w.shape[1] - isinstance(self.components, NoisyCodebook)
        largest = log_w.softmax(-1)[:, :num_tokens].amax(-1)
        sure = (largest > self.certainty).nonzero()[:, 0]
        mixture = super().conditional(log_w[sure])

        def forward(z: Tensor) -> tuple[Tensor, Tensor]:
            u, log_det = mixture.forward(z[sure])
            return z.index_copy(0, sure, u), z.new_zeros(len(z)).index_copy(0, sure, log_det)

        def inverse(u: Tensor, adjust: AdjustWeights | None, gumbel: Tensor | None) -> Tensor:
            if not len(sure):
                return u
            chosen = None if gumbel is None else gumbel[sure]
            return u.index_copy(0, sure, mixture.inverse(u[sure], adjust, chosen))

        return Conditional(forward, inverse)


def complete(
    coupling: Coupling,
    u: OneLatent,
    features: OneFeature,
    known: OneLatent,
    is_known: Bool[Tensor, "B P"],
    adjust: AdjustWeights | None = None,
    gumbel: Gumbel | None = None,
) -> tuple[OneLatent, OneLatent, Float[Tensor, "B P"]]:
    """Complete one position in which some tokens are given: (z, u, log p).

    Given tokens, where `is_known` on the CPU is True, keep their latents `known` and get their
    noise; the others are as in `invert`. log p, in nats, is the density of each given token's
    latents given everything before them, and 0 for the others (docs/math.md, section 9).
    """
    P, channels = is_known.shape[1], u.shape[1]
    mask = is_known.to(u.device)
    # on the host, to skip a direction that no row needs
    some, every = is_known.any(0).tolist(), is_known.all(0).tolist()
    conditionals = coupling.conditionals(features)
    z: list[Tensor] = []
    noise: list[Tensor] = []
    log_p = u.new_zeros(is_known.shape)
    groups = zip(u.split(coupling.group, -1), known.split(coupling.group, -1), strict=True)
    with full_precision(u):
        for g, (u_g, known_g) in enumerate(groups):
            conditional = conditionals.send(z[-1] if z else None)
            token = g * coupling.group * P // channels
            z_g = known_g
            if not every[token]:
                gumbel_g = None if gumbel is None else gumbel[:, g]
                z_g = conditional.inverse(u_g, adjust, gumbel_g)
            if some[token]:
                given_u, log_det = conditional.forward(known_g)
                density = log_det + standard_normal_log_prob(given_u)
                here = mask[:, token, None]
                z_g = torch.where(here, known_g, z_g)
                u_g = torch.where(here, given_u, u_g)
                log_p[:, token] += torch.where(here[:, 0], density, 0.0)
            z.append(z_g)
            noise.append(u_g)
    return torch.cat(z, -1), torch.cat(noise, -1), log_p
