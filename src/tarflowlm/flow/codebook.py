"""The Gaussian codebook: the encoder q(z|x) and the decoder p(x|z), which share its parameters."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from tarflowlm.errors import UserError
from tarflowlm.flow import numerics, wide_dtype


def spread_means(num_components: int, dim: int) -> Tensor:
    """K well separated points in R^d, with zero mean and unit variance per channel: [K, d].

    Farthest-point selection from 8 K Gaussian candidates, which costs K^2; above K = 4,096 they are
    K Gaussian draws.
    """
    if num_components > 4096:
        points = torch.randn(num_components, dim)
    else:
        candidates = torch.randn(8 * num_components, dim)
        if candidates.is_meta:
            return candidates[:num_components]
        chosen = [0]
        distance = (candidates - candidates[0]).norm(dim=-1)
        for _ in range(num_components - 1):
            chosen.append(int(distance.argmax()))
            distance = torch.minimum(distance, (candidates - candidates[chosen[-1]]).norm(dim=-1))
        points = candidates[chosen]
    points = points - points.mean(0)
    return points / points.std(0, unbiased=False).clamp_min(1e-3)


def typical_neighbour_distance(points: Tensor) -> float:
    """Median distance to the nearest neighbour, of the first 1,024 of the `points` [K, d]."""
    if len(points) < 2 or points.is_meta:
        return 2.0
    sample = points[:1024]
    # in one dimension the products of cdist may cancel
    distance = (sample - points.T).abs() if points.shape[1] == 1 else torch.cdist(sample, points)
    distance[torch.arange(len(sample)), torch.arange(len(sample))] = math.inf
    return distance.min(-1).values.median().item()


class Codebook(nn.Module):
    r"""One isotropic Gaussian N_k(z) = N(z; mu_k, sigma_k^2 I_d) per token k.

        q(z | x) = prod_t N_{x_t}(z_t),     p(x_t = k | z_t) = N_k(z_t) / sum_j N_j(z_t)

    `mean` [V, d] is mu, `log_std` [V] is log sigma (docs/math.md, eqs. 1 and 2; paper: section
    3.1).

    Start: sigma is the typical distance between neighbours over `separation`. At the default of 12
    almost every sample decodes to its token, so the bound starts near log V nats per token.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> codebook = Codebook(vocab_size=5, dim=4)
        >>> tokens = torch.tensor([0, 3, 1])
        >>> z = codebook.encode(tokens, torch.randn(3, 4))
        >>> codebook.decode(z)
        tensor([0, 3, 1])
        >>> codebook.log_likelihood(tokens, z).exp().round(decimals=4).tolist()
        [1.0, 1.0, 1.0]
    """

    def __init__(
        self, vocab_size: int, dim: int, *, separation: float = 12.0, mean: Tensor | None = None
    ) -> None:
        """`mean` is given, with any sigma, where weights are about to be loaded."""
        super().__init__()
        if vocab_size < 1 or dim < 1 or not 0 < separation < math.inf:
            what = f"vocab_size {vocab_size}, dim {dim}, separation {separation}"
            raise UserError(f"{what}: give sizes of at least 1 and a separation above 0")
        log_std = 0.0
        if mean is None:
            mean = spread_means(vocab_size, dim)
            log_std = math.log(typical_neighbour_distance(mean) / separation)
        self.mean = nn.Parameter(mean)
        self.log_std = nn.Parameter(torch.full((vocab_size,), log_std))

    @property
    def vocab_size(self) -> int:
        return self.mean.shape[0]

    def encode(
        self, tokens: Int[Tensor, "*batch"], noise: Float[Tensor, "*batch d"]
    ) -> Float[Tensor, "*batch d"]:
        """z = mu_x + sigma_x * noise with noise ~ N(0, I), differentiable in mu and sigma.

        UserError for noise of another shape.
        """
        wanted = [*tokens.shape, self.mean.shape[1]]
        if list(noise.shape) != wanted:
            found = f"noise {list(noise.shape)} for tokens {list(tokens.shape)}"
            raise UserError(f"{found}: give {wanted}")
        flat = tokens.flatten()  # index_select has a much faster backward than indexing
        std = self.log_std.index_select(0, flat).exp().view(*tokens.shape, 1)
        return self.mean.index_select(0, flat).view_as(noise) + std * noise

    def log_q(
        self, tokens: Int[Tensor, "*batch"], noise: Float[Tensor, "*batch d"]
    ) -> Float[Tensor, "*batch"]:
        """log q(z_t | x_t) of every token, in nats, at z = encode(tokens, noise)."""
        log_std = self.log_std.index_select(0, tokens.flatten()).view_as(tokens)
        per_channel = log_std + 0.5 * math.log(2 * math.pi)
        return -0.5 * noise.square().sum(-1) - noise.shape[-1] * per_channel

    def log_normaliser(self, z: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch"]:
        """log sum_k N_k(z) = log q(z|x) - log p(x|z) for every x, in nats."""
        return numerics.log_normaliser(z, self.mean, self.log_std)

    def log_likelihood(
        self, tokens: Int[Tensor, "*batch"], z: Float[Tensor, "*batch d"]
    ) -> Float[Tensor, "*batch"]:
        """log p(x_t | z_t) = log N_{x_t}(z_t) - log sum_j N_j(z_t), in nats.

        Near zero it is a small difference of large numbers, so both are in float64 where possible.
        """
        flat = tokens.flatten()
        z_wide, mean, log_std = (x.to(wide_dtype(z)) for x in (z, self.mean, self.log_std))
        # at z, not at the noise it was drawn with: z has been rounded since
        rows = z_wide.reshape(-1, z.shape[-1])
        own_mean, own_log_std = mean.index_select(0, flat), log_std.index_select(0, flat)
        own = numerics.log_own_density(rows, own_mean, own_log_std).view_as(tokens)
        difference = own - numerics.log_normaliser(z_wide, mean, log_std)
        # rounding must not make a probability larger than one
        return difference.clamp(max=0.0).to(z.dtype)

    def log_posterior(self, z: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch V"]:
        """log p(x = k | z) for every token k, in nats, held at once: for small vocabularies."""
        densities = numerics.log_component_densities(z, self.mean, self.log_std)
        return torch.log_softmax(densities, dim=-1)

    def decode(self, z: Float[Tensor, "*batch d"]) -> Int[Tensor, "*batch"]:
        """The most probable token of every latent vector."""
        return self.finder()(z)

    def finder(self) -> Callable[[Tensor], Tensor]:
        """`decode` for many calls while the parameters stay as they are, which share one table."""
        return numerics.component_finder(self.mean, self.log_std)


class NoisyCodebook:
    """The components of a codebook and, last, N(0, I): the outputs of a block with `certainty`."""

    def __init__(self, codebook: Codebook) -> None:
        self.codebook = codebook
        self.vocab_size = codebook.vocab_size + 1

    @property
    def mean(self) -> Float[Tensor, "K d"]:
        return F.pad(self.codebook.mean, (0, 0, 0, 1))

    @property
    def log_std(self) -> Float[Tensor, " K"]:
        return F.pad(self.codebook.log_std, (0, 1))
