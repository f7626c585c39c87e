"""The tail index of weights: right for samples of known tail index, silent where there is nothing
to fit.
"""

import math

import pytest
import torch

from helpers import tiny_flow
from tarflowlm.generation import generate
from tarflowlm.generation.particles import UNRELIABLE, pareto_k


def exponential(*shape: int) -> torch.Tensor:
    uniform = torch.rand(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return -torch.log1p(-uniform)


@pytest.mark.parametrize("k", [0.2, 0.5, 0.8, 1.2])
def test_the_index_of_pareto_weights_is_found(k):
    """log w = k e + shift with e exponential: w has the tail w^(-1/k). The weak prior pulls towards
    1/2.
    """
    found = torch.tensor([pareto_k(k * e - 300.0) for e in exponential(40, 2000)])
    M = math.ceil(3 * 2000**0.5)
    assert found.mean().item() == pytest.approx((M * k + 5) / (M + 10), abs=0.05)
    # the standard deviation of an efficient estimate, (1 + k) / sqrt(M)
    assert found.std().item() < 1.5 * (1 + k) / M**0.5


def test_weights_without_a_heavy_tail_have_a_small_index():
    generator = torch.Generator().manual_seed(0)
    assert pareto_k(torch.rand(1000, generator=generator).log()) < 0.1
    assert pareto_k(0.3 * torch.randn(1000, generator=generator)) < 0.5


def test_heavy_tails_of_few_weights_are_seen_more_often_than_light_ones():
    light, heavy = (
        torch.tensor([pareto_k(k * e) for e in exponential(200, 64)]).gt(UNRELIABLE).double().mean()
        for k in (0.1, 2.0)
    )
    assert light < 0.1
    assert heavy > 0.8


@pytest.mark.parametrize(
    "log_w",
    [
        exponential(24),
        torch.zeros(100),
        torch.full((100,), -torch.inf),
        torch.full((100,), torch.nan),
    ],
)
def test_there_is_no_index_for_few_or_equal_or_impossible_weights(log_w):
    assert math.isnan(pareto_k(log_w))


@pytest.mark.slow
def test_particles_report_the_index_when_there_are_enough():
    model, template = tiny_flow(couplings=("mixd", "mix1"), scale=0.6), torch.tensor([-1, 1, -1, 3])
    for particles in (1, 24, 32):
        found = generate(model, num_tokens=4, num=3, prompt=template, particles=particles)
        assert found.evidence.pareto_k.shape == (3,)
        assert found.evidence.pareto_k.isnan().all() == (particles < 25)
    assert generate(model, num_tokens=4).evidence is None
