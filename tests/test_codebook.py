"""The codebook as densities: against torch.distributions, Bayes' rule and finite values at the
extremes.
"""

import math

import pytest
import torch
from torch.distributions import Independent, Normal

from helpers import normal, randomise
from tarflowlm.errors import UserError
from tarflowlm.flow.codebook import Codebook, spread_means, typical_neighbour_distance
from tarflowlm.model import seeded

V, d = 7, 3


@pytest.fixture
def book() -> Codebook:
    """Overlapping components of different widths."""
    with seeded(0):
        return randomise(Codebook(V, d, separation=1.5))


def component(book: Codebook, tokens) -> Independent:
    return Independent(
        Normal(book.mean[tokens], book.log_std[tokens].exp()[..., None].expand(*tokens.shape, d)), 1
    )


def test_the_density_of_a_sample_equals_torch_distributions(book):
    tokens, noise = torch.arange(6).view(2, 3), normal(2, 3, d)
    expected = component(book, tokens).log_prob(book.encode(tokens, noise))
    torch.testing.assert_close(book.log_q(tokens, noise), expected, rtol=1e-10, atol=1e-10)


def test_the_posterior_is_bayes_rule_with_a_uniform_prior(book):
    z = normal(4, 5, d)
    density = component(book, torch.arange(V)).log_prob(z[..., None, :]).exp()
    posterior = book.log_posterior(z).exp()
    torch.testing.assert_close(
        posterior, density / density.sum(-1, keepdim=True), rtol=1e-10, atol=1e-12
    )
    torch.testing.assert_close(posterior.sum(-1), torch.ones(4, 5, dtype=torch.float64))
    assert torch.equal(book.decode(z), posterior.argmax(-1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("log_std", [-0.5, -2.0, -7.0])
def test_the_likelihood_of_a_token_keeps_its_small_values(log_std, dtype):
    """No worse in float32 than a softmax over all densities, though log N alone is rounded to
    1e-5.
    """
    with seeded(0):
        book = Codebook(27, 8)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        book.log_std.fill_(log_std).add_(0.1 * torch.randn(27, generator=generator))
        book = book.to(dtype)
        tokens = torch.randint(27, (20, 30), generator=generator)
        z = book.encode(tokens, torch.randn(20, 30, 8, generator=generator).to(dtype))
        found, softmax = (
            book.log_likelihood(tokens, z),
            book.log_posterior(z).gather(-1, tokens[..., None])[..., 0],
        )
        exact = book.double().log_posterior(z.double()).gather(-1, tokens[..., None])[..., 0]
    assert found.dtype == dtype
    assert found.max() <= 0
    assert (found - exact).abs().max() <= (softmax - exact).abs().max() + 1e-8
    torch.testing.assert_close(found.double(), exact, rtol=1e-6, atol=1e-8)


def test_the_posterior_is_normalised_far_from_every_component(book):
    z = torch.full((2, d), 1e4, dtype=torch.float64)
    torch.testing.assert_close(
        book.log_posterior(z).exp().sum(-1), torch.ones(2, dtype=torch.float64)
    )


@pytest.mark.parametrize(("vocab_size", "dim"), [(1, 4), (2, 1), (27, 5), (27, 16), (300, 8)])
def test_a_new_codebook_decodes_what_it_encodes(vocab_size, dim):
    with seeded(0):
        book = Codebook(vocab_size, dim)
    tokens = torch.arange(vocab_size).repeat(20)
    noise = torch.randn(len(tokens), dim, generator=torch.Generator().manual_seed(1))
    decoded = book.decode(book.encode(tokens, noise))
    assert (decoded == tokens).double().mean() > 0.999
    assert torch.equal(book.decode(book.encode(tokens, torch.zeros_like(noise))), tokens)


@pytest.mark.parametrize(("num", "dim"), [(2, 1), (27, 1), (27, 5), (27, 16), (500, 16), (5000, 4)])
def test_means_are_centred_and_of_unit_variance(num, dim):
    with seeded(0):
        means = spread_means(num, dim).double()
    assert means.shape == (num, dim)
    torch.testing.assert_close(
        means.mean(0), torch.zeros(dim, dtype=torch.float64), atol=1e-5, rtol=0
    )
    torch.testing.assert_close(
        means.var(0, unbiased=False), torch.ones(dim, dtype=torch.float64), atol=1e-4, rtol=0
    )


@pytest.mark.parametrize(("num", "dim"), [(27, 2), (27, 5), (200, 4)])
def test_means_are_further_apart_than_random_points(num, dim):
    def nearest(points):
        return torch.cdist(points, points).fill_diagonal_(math.inf).min().item()

    with seeded(0):
        assert nearest(spread_means(num, dim)) > 2 * nearest(torch.randn(num, dim))


def test_sigma_starts_at_the_stated_share_of_the_distance_between_neighbours():
    with seeded(0):
        book = Codebook(27, 5, separation=8.0)
    distance = typical_neighbour_distance(book.mean.detach())
    torch.testing.assert_close(book.log_std.exp(), torch.full((27,), distance / 8.0))
    assert typical_neighbour_distance(torch.linspace(-2, 2, 50_257)[:, None]) > 7e-5


def test_impossible_codebooks_are_refused_by_name():
    for sizes, separation in (((0, 4), 12.0), ((5, 0), 12.0), ((5, 4), 0.0), ((5, 4), math.inf)):
        what = f"vocab_size {sizes[0]}, dim {sizes[1]}, separation {separation}"
        with pytest.raises(UserError, match=what):
            Codebook(*sizes, separation=separation)
