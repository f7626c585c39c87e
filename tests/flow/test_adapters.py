"""The maps as transforms of torch.distributions: log-determinants, round trips, densities."""

import pytest
import torch
from torch.distributions import Independent, Normal, TransformedDistribution
from torch.distributions.transforms import ComposeTransform

from helpers import normal, tiny_flow
from tarflowlm.flow.adapters import BijectionTransform, MixtureCdfTransform, RosenblattTransform

N, D = 4, 2


@pytest.fixture
def transforms():
    """name -> (transform, an input with a batch of 3)."""
    model = tiny_flow()
    block = model.prior.block(1)
    return {
        "mixture": (MixtureCdfTransform(*(normal(N, 5, seed=i) for i in range(3))), normal(3, N)),
        "rosenblatt": (
            RosenblattTransform(normal(5), normal(5, D, seed=1), normal(5, seed=2)),
            normal(3, N, D),
        ),
        "block": (BijectionTransform(block), normal(3, N, D)),
        "prior": (BijectionTransform(model.prior), normal(3, N, D)),
    }


@pytest.fixture(params=["mixture", "rosenblatt", "block", "prior"])
def case(request, transforms):
    return transforms[request.param]


def base(shape: torch.Size, dims: int) -> Independent:
    zeros = torch.zeros(shape, dtype=torch.float64)
    return Independent(Normal(zeros, zeros + 1), dims)


def test_log_determinants_are_those_of_autograd(case):
    transform, z = case
    event = transform.domain.event_dim
    assert transform.codomain.event_dim == event
    u, log_det = transform.call_and_ladj(z)
    assert torch.equal(u, transform(z))
    torch.testing.assert_close(log_det, transform.log_abs_det_jacobian(z, u))
    assert log_det.shape == z.shape[: z.ndim - event]
    jacobian = torch.autograd.functional.jacobian(transform, z).reshape(z.numel(), z.numel())
    torch.testing.assert_close(log_det.sum(), torch.linalg.slogdet(jacobian).logabsdet)
    if event == 0:
        assert (torch.diagonal(jacobian) > 0).all()
        assert transform.sign == 1


def test_round_trips(case):
    transform, z = case
    u = transform(z)
    torch.testing.assert_close(transform.inv(u), z, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(transform(transform.inv(u)), u)
    assert transform.with_cache() is transform


def test_a_transformed_distribution_has_the_density_of_the_flow(case):
    transform, z = case
    event = transform.domain.event_dim
    latents = TransformedDistribution(base(z.shape, 0), [transform.inv])
    u, log_det = transform.call_and_ladj(z)
    expected = base(z.shape, event).log_prob(u) + log_det
    torch.testing.assert_close(latents.log_prob(z), expected)
    torch.manual_seed(0)
    drawn = latents.sample((2,))
    assert drawn.shape == (2, *z.shape)
    assert latents.log_prob(drawn).shape == (2, *z.shape[: z.ndim - event])
    back = ComposeTransform([transform, transform.inv])
    torch.testing.assert_close(back(z), z, rtol=1e-6, atol=1e-8)
