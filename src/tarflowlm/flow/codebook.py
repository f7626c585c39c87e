"""The Gaussian codebook: the encoder q(z|x), and the decoder p(x|z) that is tied to it."""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from tarflowlm.flow.numerics import (
    log_component_densities,
    log_own_density,
    mixture_log_prob,
    most_probable_component,
    wide_dtype,
)


def spread_means(num_components: int, dim: int, generator: torch.Generator | None = None) -> Tensor:
    """num_components well separated points in R^dim, zero mean and unit variance per channel: [K, d].

    Gaussian candidates, eight for every place, thinned by farthest-point selection. For large vocabularies
    (K > 4,096) the selection is left out: it costs K^2, and in d >= 16 random points are far apart already.
    """
    if num_components > 4096:
        points = torch.randn(num_components, dim, generator=generator)
    else:
        candidates = torch.randn(8 * num_components, dim, generator=generator)
        if candidates.is_meta:
            return candidates[:num_components]
        chosen = [0]
        distance = (candidates - candidates[0]).norm(dim=-1)
        for _ in range(num_components - 1):
            chosen.append(int(distance.argmax()))
            distance = torch.minimum(distance, (candidates - candidates[chosen[-1]]).norm(dim=-1))
        points = candidates[chosen]
    if num_components == 1:
        return torch.zeros(1, dim)
    points = points - points.mean(0)
    return points / points.std(0, unbiased=False).clamp_min(1e-3)


def typical_neighbour_distance(points: Tensor) -> float:
    """Median distance from a point to its nearest neighbour (over at most 1,024 of the points)."""
    if len(points) < 2 or points.is_meta:
        return 2.0
    sample = points[: min(len(points), 1024)]
    distance = torch.cdist(sample, points)
    distance[torch.arange(len(sample)), torch.arange(len(sample))] = math.inf
    return distance.min(-1).values.median().item()


class Codebook(nn.Module):
    r"""One isotropic Gaussian for every token k (docs/math.md, eqs. 1 and 2).

        q(z | x) = prod_t N(z_t; mu_{x_t}, sigma_{x_t}^2 I_d),     p(x_t = k | z_t) = N_k(z_t) / sum_j N_j(z_t)

    `mean` [V, d] is mu, `log_std` [V] is log sigma. Paper: section 3.1.

    Initialisation. The means start far apart with unit variance per channel, which is the scale the Transformer
    and a Gaussian base expect; sigma starts at `separation` times smaller than the typical distance between
    neighbours. At the default of 12 a sample is decoded right all but surely, so the bound starts at log V per token,
    that of a uniform language model: training begins with predicting tokens and not with untangling a blurred code.
    """

    def __init__(
        self, vocab_size: int, dim: int, *, separation: float = 12.0, generator: torch.Generator | None = None
    ) -> None:
        super().__init__()
        mean = spread_means(vocab_size, dim, generator)
        self.mean = nn.Parameter(mean)
        self.log_std = nn.Parameter(
            torch.full((vocab_size,), math.log(typical_neighbour_distance(mean) / separation))
        )

    @property
    def vocab_size(self) -> int:
        return self.mean.shape[0]

    def encode(self, tokens: Int[Tensor, "*batch"], noise: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
        """z = mu_x + sigma_x * noise, differentiable in mu and sigma; noise ~ N(0, I)."""
        # index_select's backward is much quicker than that of indexing
        flat = tokens.flatten()
        mean = self.mean.index_select(0, flat).view_as(noise)
        std = self.log_std.index_select(0, flat).exp().view(*tokens.shape, 1)
        return mean + std * noise

    def log_q(self, tokens: Int[Tensor, "*batch"], noise: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch"]:
        """log q(z_t | x_t) in nats at z = encode(tokens, noise)."""
        d = noise.shape[-1]
        log_std = self.log_std.index_select(0, tokens.flatten()).view_as(tokens)
        return -0.5 * noise.square().sum(-1) - d * (log_std + 0.5 * math.log(2 * math.pi))

    def log_components(self, z: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch V"]:
        """log N_k(z) for every token k, in nats: a [tokens, V] tensor, for small vocabularies."""
        return log_component_densities(z, self.mean, self.log_std)

    def log_normaliser(self, z: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch"]:
        """log sum_k N_k(z) in nats, tile by tile: log q(z|x) - log p(x|z) for whatever x; no [tokens, V] tensor."""
        return mixture_log_prob(z, None, self.mean, self.log_std)

    def log_likelihood(self, tokens: Int[Tensor, "*batch"], z: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch"]:
        """log p(x_t | z_t) = log N_x(z) - log sum_j N_j(z) in nats, tile by tile: no [tokens, V] tensor.

        Near zero it is a small difference of large numbers, so both are computed in float64 (float32 where the device
        has no other) and rounded in the end.
        """
        wide, flat = wide_dtype(z), tokens.flatten()
        z_wide, mean, log_std = z.to(wide), self.mean.to(wide), self.log_std.to(wide)
        # at z itself: once z is rounded, the noise that it was drawn with no longer fits
        rows = z_wide.reshape(-1, z.shape[-1])
        own = log_own_density(rows, mean.index_select(0, flat), log_std.index_select(0, flat))
        difference = own.view_as(tokens) - mixture_log_prob(z_wide, None, mean, log_std)
        # no rounding makes a probability larger than one
        return difference.clamp(max=0.0).to(z.dtype)

    def log_posterior(self, z: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch V"]:
        """log p(x = k | z) of every token k, in nats: a [tokens, V] tensor, for small vocabularies."""
        return torch.log_softmax(self.log_components(z), dim=-1)

    def decode(self, z: Float[Tensor, "*batch d"]) -> Int[Tensor, "*batch"]:
        """The most probable token of every latent vector, the first of equals."""
        return most_probable_component(z, self.mean, self.log_std)
