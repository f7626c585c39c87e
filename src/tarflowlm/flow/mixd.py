"""The Mix-d coupling: per token a mixture over one shared codebook, of which the network predicts the weights.

At V = 50,257 a [tokens, V] tensor would outgrow the rest of a training step, so weights are held for only
`held_rows` tokens at a time. Shape legend: as in `couplings`.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tarflowlm.flow import full_precision, numerics, widen
from tarflowlm.flow.codebook import Codebook
from tarflowlm.flow.couplings import AdjustWeights, Conditional, Conditionals, Coupling
from tarflowlm.flow.heads import TokenFeatures


class MixDCoupling(Coupling):
    r"""Mix-d: the Rosenblatt transform of a mixture per token (docs/math.md, eq. 9).

        p(z_t | c) = sum_k w_k N(z_t; mu_k, sigma_k^2 I_d),   w = softmax(weight_head(c)),   u_t = Rosenblatt(z_t)

    All positions share one codebook of components, and the network predicts only the K weights. `tied` names the
    encoder's codebook (K = V), to whose log sigma `widening` is added; without it the coupling owns a codebook. Each
    of the P tokens of a position has features c and weights of its own, independent or autoregressive inside the
    patch (`TokenFeatures`, eq. 16).
    Paper: section 3.2.2, appendix B.
    """

    def __init__(
        self, *, width: int, patch: int, latent_dim: int, components: int, tied: Codebook | None, in_patch: bool,
        widening: float = 0.0,
    ) -> None:  # fmt: skip
        super().__init__()
        self.patch, self.latent_dim, self.group, self.widening = patch, latent_dim, latent_dim, widening
        self.token_features = TokenFeatures(width=width, patch=patch, latent_dim=latent_dim, in_patch=in_patch)
        self.own = None if tied is not None else Codebook(components, latent_dim, separation=2.0)
        # in a tuple, so that the encoder's parameters are not registered a second time
        self._tied, self.is_tied = (tied,), tied is not None and widening == 0
        num_components = tied.vocab_size if tied is not None else components
        self.weight_head = nn.Linear(width, num_components)
        nn.init.zeros_(self.weight_head.weight)
        nn.init.zeros_(self.weight_head.bias)

    @torch.no_grad()
    def start_from(self, mean: Tensor, log_std: Tensor) -> None:
        """Start the components of its own as a codebook, widened."""
        assert self.own is not None
        self.own.mean.copy_(mean)
        self.own.log_std.copy_(log_std + self.widening)

    @property
    def components(self) -> Codebook:
        """The codebook of the mixture: the encoder's, or the coupling's own."""
        components = self._tied[0] if self.own is None else self.own
        assert components is not None
        return components

    @property
    def _mixture(self) -> tuple[Tensor, Tensor]:
        """mu [K, d] and log s [K] of the components; those of the encoder widened."""
        book, wider = self.components, self.widening if self.own is None else 0.0
        return book.mean, book.log_std + wider if wider else book.log_std

    def forward(self, z: Float[Tensor, "B N C"], features: Float[Tensor, "B N D"]) -> tuple[Tensor, Tensor]:
        token_features = self.token_features(features, z).flatten(0, -2)
        rows = numerics.held_rows(self.weight_head.out_features, z.device)
        parts = list(zip(z.reshape(-1, self.latent_dim).split(rows), token_features.split(rows), strict=True))
        if len(parts) == 1 or not torch.is_grad_enabled():
            mapped = [self._map(*part) for part in parts]
        else:
            # recomputed part by part, so that no [tokens, K] tensor is kept for the backward pass
            mapped = [checkpoint(self._map, *part, use_reentrant=False, preserve_rng_state=False) for part in parts]
        u, log_det = (torch.cat(list(column)) for column in zip(*mapped, strict=True))
        return u.reshape(z.shape), log_det.view(*z.shape[:2], -1).sum(-1)

    def _map(self, z: Tensor, token_features: Tensor) -> tuple[Tensor, Tensor]:
        log_w = widen(self.weight_head(token_features))
        with full_precision(z):
            return numerics.rosenblatt(z, log_w, *self._mixture)

    def log_prob(self, z: Tensor, features: Tensor, *, relative: bool = False) -> Float[Tensor, "B N"]:
        """log p(z_n | c_n) of every position, in nats.

        `relative` subtracts log sum_k N_k(z_t) of every token, for tied components the decoder's normaliser
        (docs/math.md, eq. 12). One pass over the codebook gives both sums.
        """
        parameters = self.weight_head.weight, self.weight_head.bias, *self._mixture
        by_token, features = z.unflatten(-1, (self.patch, self.latent_dim)), self.token_features(features, z)
        return numerics.mixture_log_prob_from_features(by_token, features, *parameters, relative=relative).sum(-1)

    def invert(self, u: Tensor, features: Tensor, adjust: AdjustWeights | None = None) -> Tensor:
        rows = numerics.held_rows(self.weight_head.out_features, u.device)
        if len(u) <= rows:
            if self.patch > 1:
                return super().invert(u, features, adjust)
            return self._conditional(widen(self.weight_head(features)), self._mixture, adjust).inverse(u)
        parts = zip(u.split(rows), features.split(rows), strict=True)
        return torch.cat([super(MixDCoupling, self).invert(*part, adjust) for part in parts])

    def complete(
        self, u: Tensor, features: Tensor, known: Tensor, is_known: Tensor, adjust: AdjustWeights | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        rows = numerics.held_rows(self.weight_head.out_features, u.device)
        parts = zip(u.split(rows), features.split(rows), known.split(rows), is_known.split(rows), strict=True)
        columns = zip(*(super(MixDCoupling, self).complete(*part, adjust) for part in parts), strict=True)
        z, noise, log_p = (torch.cat(column) for column in columns)
        return z, noise, log_p

    def conditionals(
        self, features: Float[Tensor, "B D"], adjust: AdjustWeights | None = None, *, earlier: Sequence[Tensor] = ()
    ) -> Conditionals:
        walk, z = self.token_features.walk(features, earlier=earlier), None
        for _ in range(len(earlier), self.patch):
            z = yield self._conditional(widen(self.weight_head(walk.send(z))), self._mixture, adjust)

    @staticmethod
    def _conditional(log_w: Tensor, book: tuple[Tensor, Tensor], adjust: AdjustWeights | None) -> Conditional:
        def inverse(u: Tensor) -> Tensor:
            return numerics.rosenblatt_inverse(u, log_w if adjust is None else adjust(log_w), *book)

        p = (log_w, *book)
        return Conditional(lambda z: numerics.rosenblatt(z, *p), inverse, lambda z: numerics.mixture_log_prob(z, *p))
