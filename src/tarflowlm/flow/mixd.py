"""The Mix-d coupling: per token a mixture over one shared codebook, of which the network predicts
the weights.

At V = 50,257 a [tokens, V] tensor would outgrow the rest of a training step, so weights are held
for only some tokens at a time (`chunks.held`). Shape legend: as in `couplings`.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tarflowlm import chunks
from tarflowlm.flow import full_precision, numerics, widen
from tarflowlm.flow.codebook import Codebook, NoisyCodebook
from tarflowlm.flow.couplings import AdjustWeights, Conditional, Conditionals, Coupling
from tarflowlm.flow.heads import TokenFeatures
from tarflowlm.flow.numerics import log_standard_normal


class MixDCoupling(Coupling):
    r"""Mix-d: the Rosenblatt transform of a mixture per token (docs/math.md, eq. 9).

        p(z_t | c) = sum_k w_k N(z_t; mu_k, sigma_k^2 I_d),   w = softmax(weight_head(c)),   u_t =
        Rosenblatt(z_t)

    All positions share one codebook of components, and the network predicts only the K weights.
    `tied` names the encoder's codebook (K = V), maybe with a component of noise (K = V + 1);
    without it the coupling owns a codebook. Each of the P tokens of a position has features c and
    weights of its own, independent or autoregressive inside the patch (`TokenFeatures`, eq. 16).

    With a `certainty` theta the map acts where max_k w_k > theta over tokens k, and is the identity
    elsewhere (eq.
    9a). Then u_t ~ N(0, I) only there, and blocks above model the rest. `log_prob` stays the
    density of all tokens. Paper: section 3.2.2, appendix B; certainty is ours.
    """

    certainty = 0.0

    def __init__(
        self,
        *,
        width: int,
        patch: int,
        latent_dim: int,
        components: int,
        in_patch: bool,
        tied: Codebook | NoisyCodebook | None,
    ) -> None:
        super().__init__()
        self.patch, self.latent_dim, self.group = patch, latent_dim, latent_dim
        self.token_features = TokenFeatures(
            width=width, patch=patch, latent_dim=latent_dim, in_patch=in_patch
        )
        self.own = None if tied is not None else Codebook(components, latent_dim, separation=2.0)
        # in a tuple, so that the encoder's parameters are not registered a second time
        self._tied, self.is_tied = (tied,), isinstance(tied, Codebook)
        num_components = tied.vocab_size if tied is not None else components
        self.weight_head = nn.Linear(width, num_components)
        nn.init.zeros_(self.weight_head.weight)
        nn.init.zeros_(self.weight_head.bias)

    @torch.no_grad()
    def start_from(self, mean: Tensor, log_std: Tensor) -> None:
        """Start the components of its own as a codebook."""
        assert self.own is not None
        self.own.mean.copy_(mean)
        self.own.log_std.copy_(log_std)

    @property
    def components(self) -> Codebook | NoisyCodebook:
        """The codebook of the mixture: the encoder's, or the coupling's own."""
        components = self._tied[0] if self.own is None else self.own
        assert components is not None
        return components

    @property
    def _mixture(self) -> tuple[Tensor, Tensor]:
        """mu [K, d] and log s [K] of the components."""
        return self.components.mean, self.components.log_std

    def _sure(self, log_w: Float[Tensor, "rows K"]) -> Tensor:
        """The rows with a token whose weight is above `certainty`."""
        num_tokens = log_w.shape[1] - isinstance(self.components, NoisyCodebook)
        return (log_w.softmax(-1)[:, :num_tokens].amax(-1) > self.certainty).nonzero()[:, 0]

    def forward(
        self, z: Float[Tensor, "B N C"], features: Float[Tensor, "B N D"]
    ) -> tuple[Tensor, Tensor]:
        token_features = self.token_features(features, z).flatten(0, -2)
        rows = chunks.rows_at_once(self.weight_head.out_features, chunks.held(z.device))
        parts = list(
            zip(z.reshape(-1, self.latent_dim).split(rows), token_features.split(rows), strict=True)
        )
        if len(parts) == 1 or not torch.is_grad_enabled():
            mapped = [self._map(*part) for part in parts]
        else:
            # recomputed part by part, so that no [tokens, K] tensor is kept for the backward pass
            mapped = [
                checkpoint(self._map, *part, use_reentrant=False, preserve_rng_state=False)
                for part in parts
            ]
        u, log_det = (torch.cat(list(column)) for column in zip(*mapped, strict=True))
        return u.reshape(z.shape), log_det.view(*z.shape[:2], -1).sum(-1)

    def _map(self, z: Tensor, token_features: Tensor) -> tuple[Tensor, Tensor]:
        log_w = widen(self.weight_head(token_features))
        with full_precision(z):
            return self._forward(z, log_w)

    def _forward(self, z: Tensor, log_w: Tensor) -> tuple[Tensor, Tensor]:
        if not self.certainty:
            return numerics.rosenblatt(z, log_w, *self._mixture)
        sure = self._sure(log_w)
        u, log_det = numerics.rosenblatt(z[sure], log_w[sure], *self._mixture)
        return z.index_copy(0, sure, u), z.new_zeros(len(z)).index_copy(0, sure, log_det)

    def log_prob(
        self, z: Tensor, features: Tensor, *, relative: bool = False
    ) -> Float[Tensor, "B N"]:
        """log p(z_n | c_n) of every position, in nats.

        `relative` subtracts log sum_k N_k(z_t) of every token, for tied components the decoder's
        normaliser (docs/math.md, eq. 12). One pass over the codebook gives both sums.
        """
        parameters = self.weight_head.weight, self.weight_head.bias, *self._mixture
        by_token, features = (
            z.unflatten(-1, (self.patch, self.latent_dim)),
            self.token_features(features, z),
        )
        return numerics.mixture_log_prob_from_features(
            by_token, features, *parameters, relative=relative
        ).sum(-1)

    def invert(self, u: Tensor, features: Tensor, adjust: AdjustWeights | None = None) -> Tensor:
        rows = chunks.rows_at_once(self.weight_head.out_features, chunks.held(u.device))
        if len(u) <= rows:
            if self.patch > 1:
                return super().invert(u, features, adjust)
            return self._conditional(widen(self.weight_head(features)), adjust).inverse(u)
        parts = zip(u.split(rows), features.split(rows), strict=True)
        return torch.cat([super(MixDCoupling, self).invert(*part, adjust) for part in parts])

    def complete(
        self,
        u: Tensor,
        features: Tensor,
        known: Tensor,
        is_known: Tensor,
        adjust: AdjustWeights | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        rows = chunks.rows_at_once(self.weight_head.out_features, chunks.held(u.device))
        parts = zip(
            u.split(rows),
            features.split(rows),
            known.split(rows),
            is_known.split(rows),
            strict=True,
        )
        columns = zip(
            *(super(MixDCoupling, self).complete(*part, adjust) for part in parts), strict=True
        )
        z, noise, log_p = (torch.cat(column) for column in columns)
        return z, noise, log_p

    def conditionals(
        self, features: Float[Tensor, "B D"], adjust: AdjustWeights | None = None
    ) -> Conditionals:
        walk, z = self.token_features.walk(features), None
        for _ in range(self.patch):
            z = yield self._conditional(widen(self.weight_head(walk.send(z))), adjust)

    def _conditional(self, log_w: Tensor, adjust: AdjustWeights | None) -> Conditional:
        book, sure = self._mixture, self._sure(log_w) if self.certainty else None

        def inverse(u: Tensor) -> Tensor:
            w = log_w if adjust is None else adjust(log_w)
            if sure is None:
                return numerics.rosenblatt_inverse(u, w, *book)
            return (
                u.index_copy(0, sure, numerics.rosenblatt_inverse(u[sure], w[sure], *book))
                if len(sure)
                else u
            )

        def log_density(z: Tensor) -> Tensor:
            log_p = numerics.mixture_log_prob(z, log_w, *book)
            return (
                log_p
                if sure is None
                else log_standard_normal(z).sum(-1).index_copy(0, sure, log_p[sure])
            )

        return Conditional(lambda z: self._forward(z, log_w), inverse, log_density)
