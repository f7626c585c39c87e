"""The Mix-d coupling: a mixture over one codebook per token, of which the network predicts the weights alone.

At V = 50,257 a [tokens, V] tensor would be larger than the rest of a step: weights exist for `held_rows` tokens at a
time. Shape legend: as in `couplings`.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tarflowlm.flow import numerics
from tarflowlm.flow.codebook import Codebook
from tarflowlm.flow.couplings import AdjustWeights, Conditional, Conditionals, Coupling
from tarflowlm.flow.heads import TokenFeatures
from tarflowlm.flow.precision import full_precision, widen


class MixDCoupling(Coupling):
    r"""Token-wise mixture-Rosenblatt coupling (docs/math.md, eq. 9).

        p(z_t | past) = sum_k pi_k(past) N(z_t; mu_k, sigma_k^2 I_d),   u_t the Rosenblatt transform of z_t

    One codebook of components for all positions; the network predicts the K weights alone. `tied` to the encoder's
    codebook in block 1, otherwise a codebook of its own. With patches, the P tokens of a position have weights of
    their own, independent given the past or in-patch autoregressive (`TokenFeatures`).
    Paper: section 3.2.2, appendix B.
    """

    def __init__(
        self,
        *,
        width: int,
        patch: int,
        latent_dim: int,
        components: int,
        tied: Codebook | None,
        in_patch: bool,
    ) -> None:
        super().__init__()
        self.patch, self.latent_dim, self.group = patch, latent_dim, latent_dim
        self.token_features = TokenFeatures(width=width, patch=patch, latent_dim=latent_dim, in_patch=in_patch)
        self.own = None if tied is not None else Codebook(components, latent_dim, separation=2.0)
        # in a tuple, so that the encoder's parameters are not registered a second time
        self._tied = (tied,)
        num_components = tied.vocab_size if tied is not None else components
        self.weight_head = nn.Linear(width, num_components)
        nn.init.zeros_(self.weight_head.weight)
        nn.init.zeros_(self.weight_head.bias)

    @property
    def is_tied(self) -> bool:
        """True where the components are the encoder's codebook."""
        return self.own is None

    @property
    def components(self) -> Codebook:
        components = self._tied[0] if self.own is None else self.own
        assert components is not None
        return components

    def _tokens(self, z: Tensor) -> Tensor:
        """[..., P d] -> [..., P, d]."""
        return z.reshape(*z.shape[:-1], self.patch, self.latent_dim)

    def forward(
        self, z: Float[Tensor, "B T C"], features: Float[Tensor, "B T D"]
    ) -> tuple[Float[Tensor, "B T C"], Float[Tensor, " B"]]:
        tokens = self._tokens(z).reshape(-1, self.latent_dim)
        token_features = self.token_features(features, z).flatten(0, -2)
        rows = numerics.held_rows(self.weight_head.out_features, z.device)
        parts = list(zip(tokens.split(rows), token_features.split(rows), strict=True))
        if len(parts) == 1 or not torch.is_grad_enabled():
            mapped = [self._map(*part) for part in parts]
        else:
            # the weights of one part at a time: no [tokens, K] tensor waits for the backward
            mapped = [checkpoint(self._map, *part, use_reentrant=False, preserve_rng_state=False) for part in parts]
        u, log_det = (torch.cat(list(column)) for column in zip(*mapped, strict=True))
        return u.reshape(z.shape), log_det.view(len(z), -1).sum(-1)

    def _map(self, z: Tensor, token_features: Tensor) -> tuple[Tensor, Tensor]:
        """Noise [n, d] and log|det| [n] of tokens [n, d], from the features [n, D] of their weights."""
        log_w, book = widen(self.weight_head(token_features)), self.components
        with full_precision(z):
            return numerics.rosenblatt(z, log_w, book.mean, book.log_std)

    def log_prob(
        self,
        z: Float[Tensor, "B T C"],
        features: Float[Tensor, "B T D"],
        *,
        equal_cotangents: bool = False,
        relative: bool = False,
    ) -> Float[Tensor, " B"]:
        """`relative` takes off log sum_k N_k of every token, the decoder's normaliser where components are tied."""
        token_features = self.token_features(features, z)
        head, book = self.weight_head, self.components
        per_token = numerics.mixture_log_prob_from_features(
            self._tokens(z),
            token_features,
            head.weight,
            head.bias,
            book.mean,
            book.log_std,
            equal_cotangents=equal_cotangents,
            relative=relative,
        )
        return per_token.flatten(1).sum(-1)

    def invert(
        self, u: Float[Tensor, "B C"], features: Float[Tensor, "B D"], adjust: AdjustWeights | None = None
    ) -> Float[Tensor, "B C"]:
        """A sweep of a decoder inverts many positions at once: the weights of some at a time."""
        rows = numerics.held_rows(self.weight_head.out_features, u.device)
        parts = zip(u.split(rows), features.split(rows), strict=True)
        return torch.cat([super(MixDCoupling, self).invert(*part, adjust) for part in parts])

    def complete(
        self,
        u: Float[Tensor, "B C"],
        features: Float[Tensor, "B D"],
        known: Float[Tensor, "B C"],
        is_known: Bool[Tensor, "B P"],
        adjust: AdjustWeights | None = None,
    ) -> tuple[Float[Tensor, "B C"], Float[Tensor, "B C"], Float[Tensor, "B P"]]:
        """So it is with many particles."""
        rows = numerics.held_rows(self.weight_head.out_features, u.device)
        parts = zip(u.split(rows), features.split(rows), known.split(rows), is_known.split(rows), strict=True)
        done = [super(MixDCoupling, self).complete(*part, adjust) for part in parts]
        z, noise, log_p = (torch.cat(column) for column in zip(*done, strict=True))
        return z, noise, log_p

    def conditionals(self, features: Float[Tensor, "B D"], adjust: AdjustWeights | None = None) -> Conditionals:
        book, state = self.components, self.token_features.start(features)
        for _ in range(self.patch):
            z = yield self._conditional(widen(self.weight_head(self.token_features.step(state))), book, adjust)
            assert z is not None
            state = self.token_features.observe(state, z)

    @staticmethod
    def _conditional(log_w: Tensor, book: Codebook, adjust: AdjustWeights | None) -> Conditional:
        def inverse(u: Tensor) -> Tensor:
            changed = log_w if adjust is None else adjust(log_w)
            return numerics.rosenblatt_inverse(u, changed, book.mean, book.log_std)

        return Conditional(lambda z: numerics.rosenblatt(z, log_w, book.mean, book.log_std), inverse)
