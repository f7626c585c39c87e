"""The maps as transforms of torch.distributions, zuko and normflows: log-determinants, round trips, densities."""

import pytest
import torch
from torch.distributions import Independent, Normal, TransformedDistribution
from torch.distributions.transforms import ComposeTransform

from tarflowlm.flow import adapters
from tarflowlm.flow.adapters import BijectionTransform, MixtureCdfTransform, RosenblattTransform

N, D = 4, 2


@pytest.fixture
def transforms(normal, tiny_flow):
    """name -> (transform, an input with a batch of 3)."""
    model = tiny_flow()
    block = model.prior.block(1)
    coupling = adapters.ConditionedCoupling(block.coupling, normal(3, N, 8, seed=5))
    return {
        "mixture": (MixtureCdfTransform(*(normal(N, 5, seed=i) for i in range(3))), normal(3, N)),
        "rosenblatt": (RosenblattTransform(normal(5), normal(5, D, seed=1), normal(5, seed=2)), normal(3, N, D)),
        "coupling": (BijectionTransform(coupling), normal(3, N, D)),
        "block": (BijectionTransform(block), normal(3, N, D)),
        "prior": (BijectionTransform(model.prior), normal(3, N, D)),
    }


@pytest.fixture(params=["mixture", "rosenblatt", "coupling", "block", "prior"])
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


def test_zuko_gives_the_prior_s_density_and_trains_it(normal, tiny_flow):
    pytest.importorskip("zuko")
    prior, z = tiny_flow().prior, normal(3, N, D)
    flow = adapters.zuko_flow(prior, N, D)
    torch.testing.assert_close(flow().log_prob(z), prior.log_prob(z))
    assert set(prior.parameters()) == set(flow.parameters())
    torch.manual_seed(0)
    with torch.no_grad():
        drawn, log_p = flow().rsample_and_log_prob((5,))
    torch.testing.assert_close(log_p, prior.log_prob(drawn))
    (-flow().log_prob(z).mean()).backward()
    assert all(p.grad is not None for p in prior.parameters() if p.numel())


def test_normflows_gives_the_prior_s_density_and_trains_it(normal, tiny_flow):
    nf = pytest.importorskip("normflows")
    prior, z = tiny_flow().prior, normal(3, N, D)
    flow = nf.NormalizingFlow(
        nf.distributions.DiagGaussian((N, D), trainable=False).double(), [adapters.normflows_flow(prior)]
    )
    torch.testing.assert_close(flow.log_prob(z), prior.log_prob(z))
    torch.manual_seed(0)
    drawn, log_p = flow.sample(5)
    torch.testing.assert_close(log_p, prior.log_prob(drawn))
    x, log_det = flow.flows[0](z)
    u, back = flow.flows[0].inverse(x)
    torch.testing.assert_close(u, z)
    torch.testing.assert_close(log_det, -back)
    flow.forward_kld(z).backward()
    assert all(p.grad is not None for p in prior.parameters() if p.numel())
