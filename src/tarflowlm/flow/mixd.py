"""The Mix-d coupling: per token a mixture over one shared codebook, with predicted weights.

A [tokens, V] tensor would outgrow a training step, so weights come for some tokens at a time.
"""

from collections.abc import Generator
from itertools import repeat

import torch
from jaxtyping import Float
from torch import Tensor

from tarflowlm import chunks
from tarflowlm.flow import numerics, widen
from tarflowlm.flow.codebook import Codebook, NoisyCodebook
from tarflowlm.flow.couplings import (
    AdjustWeights,
    ByPosition,
    Conditional,
    Conditionals,
    Coupling,
    Features,
    Gumbel,
    Latents,
    OneFeature,
    OneLatent,
)
from tarflowlm.flow.token_heads import Linear, TokenFeatures, map_linearly, token_head


class MixDCoupling(Coupling):
    r"""Mix-d: the Rosenblatt transform of a mixture per token (docs/math.md, eq. 9).

        p(z_t | c) = sum_k w_k N(z_t; mu_k, sigma_k^2 I_d),    w = softmax(weight_head(c))
        u_t = Rosenblatt(z_t)

    The network predicts only the K weights of each token. All share one codebook: `tied`, which is
    the encoder's (K = V), maybe with a component of noise (K = V + 1), or the coupling's own.
    Paper: section 3.2.2, appendix B.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> mixd = MixDCoupling(
        ...     width=6, patch=1, latent_dim=4, components=3, in_patch=False, tied=None
        ... )
        >>> z, features = torch.randn(2, 5, 4), torch.randn(2, 5, 6)
        >>> u, log_det = mixd(z, features)
        >>> expected = log_det + numerics.log_standard_normal(u).sum(-1)
        >>> torch.allclose(mixd.log_prob(z, features), expected, atol=1e-4)
        True
    """

    def __init__(
        self,
        *,
        width: int,
        patch: int,
        latent_dim: int,
        components: int,
        in_patch: bool,
        tied: Codebook | NoisyCodebook | None,
        has_bias: bool = True,
    ) -> None:
        super().__init__()
        self.patch = patch
        self.latent_dim = self.group = latent_dim
        self.token_features = TokenFeatures(
            width=width, patch=patch, latent_dim=latent_dim, in_patch=in_patch
        )
        book = Codebook(components, latent_dim, separation=2.0) if tied is None else tied
        self.own = book if tied is None else None
        # in a tuple, so that the encoder's parameters are not registered a second time
        self._book = (book,)
        self.uses_encoder_codebook = isinstance(tied, Codebook)
        """Whether every token is a mixture of the encoder's codebook alone."""
        self.choices = book.vocab_size
        self.weight_head = token_head(width, self.choices, has_bias=has_bias)

    @property
    def components(self) -> Codebook | NoisyCodebook:
        """The codebook of the mixture."""
        return self._book[0]

    def conditional(self, log_w: Float[Tensor, "rows K"] | numerics.LogWeights) -> Conditional:
        """The map of tokens [rows, d] whose mixtures have these log-weights, in full precision."""
        book = mean, log_std = self.components.mean, self.components.log_std

        def forward(z: Tensor) -> tuple[Tensor, Tensor]:
            return numerics.rosenblatt(z, log_w, *book, maps=self.maps)

        def inverse(u: Tensor, adjust: AdjustWeights | None, gumbel: Tensor | None) -> Tensor:
            assert isinstance(log_w, Tensor)
            weights = log_w if adjust is None else adjust(log_w)
            if gumbel is None:
                return numerics.rosenblatt_inverse(u, weights, *book, maps=self.maps)
            k = (weights + gumbel).argmax(-1)
            return torch.addcmul(mean[k], log_std[k, None].exp(), u)

        return Conditional(forward, inverse)

    def log_weights(
        self, features: OneFeature, linear: Linear = map_linearly
    ) -> Generator[Tensor, Tensor | None, None]:
        """Yields log w [B, K] of every token in turn; the caller sends its latents [B, d]."""
        walk = self.token_features.walk(features, linear)
        z = None
        for _ in range(self.patch):
            z = yield linear(self.weight_head, walk.send(z))

    def conditionals(self, features: OneFeature, weights: None = None) -> Conditionals:
        walk = self.log_weights(features)
        z = None
        for _ in range(self.patch):
            z = yield self.conditional(walk.send(z))

    def forward(self, z: Latents, features: Features) -> tuple[Latents, ByPosition]:
        def of_rows(z: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
            def log_w(at: slice | Tensor) -> Tensor:
                return widen(self.weight_head(c[at]))

            return self.conditional(log_w).forward(z)

        token_features = self.token_features(features, z).flatten(0, -2)
        tokens = z.reshape(-1, self.latent_dim)
        rows = chunks.rows_at_once(self.choices, chunks.held(z.device))
        if self.uses_encoder_codebook and not torch.is_grad_enabled():
            rows = len(tokens)  # `rosenblatt` itself asks for the weights of some
        mapped = chunks.in_parts(of_rows, rows, tokens, token_features)
        u, log_det = (torch.cat(parts) for parts in zip(*mapped, strict=True))
        return u.reshape(z.shape), log_det.view(*z.shape[:2], self.patch).sum(-1)

    def log_prob(self, z: Latents, features: Features) -> ByPosition:
        return self.token_log_prob(z, features).sum(-1)

    def token_log_prob(
        self, z: Latents, features: Features, *, relative: bool = False
    ) -> Float[Tensor, "B N P"]:
        """log p(z_t | c_n, z_<t) of every token, in nats.

        `relative`: minus log prod_t sum_k N_k(z_t) (docs/math.md, eq. 12), where it
        `uses_encoder_codebook`.
        """
        return numerics.mixture_log_prob_from_features(
            z.unflatten(-1, (self.patch, self.latent_dim)),
            self.token_features(features, z),
            self.weight_head.weight,
            self.weight_head.bias,
            self.components.mean,
            self.components.log_std,
            relative=relative,
            maps=self.maps,
        )

    def invert(
        self,
        u: OneLatent,
        features: OneFeature,
        adjust: AdjustWeights | None = None,
        gumbel: Gumbel | None = None,
        weights: None = None,
    ) -> OneLatent:
        rows = chunks.rows_at_once(self.choices, chunks.held(u.device))
        numbers = repeat(None) if gumbel is None else gumbel.split(rows)
        parts = zip(u.split(rows), features.split(rows), numbers, strict=False)
        invert = super().invert
        return torch.cat([invert(v, c, adjust, g) for v, c, g in parts])
