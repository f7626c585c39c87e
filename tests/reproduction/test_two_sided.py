"""Bounds from both sides against the evidence of a flow whose integral is known."""

import torch

from helpers import tiny_flow
from reproduction.two_sided import log_ratio, temperatures, two_sided, write_texts

POINTS = 81


def evidence(model, x) -> torch.Tensor:
    """log p(x) [B] of texts of two tokens of three, d = 1, as a sum over a grid of eps."""
    axis = torch.linspace(-8.0, 8.0, POINTS, dtype=torch.float64)
    eps = torch.cartesian_prod(axis, axis)[..., None]
    log_q = -0.5 * eps.square().flatten(1).sum(-1) - torch.log(torch.tensor(2 * torch.pi))
    area = 2 * torch.log(axis[1] - axis[0])
    texts = torch.cartesian_prod(torch.arange(3), torch.arange(3))
    values = [
        (log_ratio(model, text.expand(len(eps), -1))(eps) + log_q).logsumexp(0) + area
        for text in texts
    ]
    return torch.stack(values)[3 * x[:, 0] + x[:, 1]]


def test_the_evidence_lies_between_and_the_bounds_meet():
    # wide codes, so that the gap of the bound is large
    shape = {"vocab_size": 3, "context": 2, "latent_dim": 1, "log_std": 0.0}
    model = tiny_flow(couplings=("affine", "mix1"), **shape).requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    x, eps = write_texts(model, 200, 2, generator)
    exact = evidence(model, x)
    g = log_ratio(model, x)
    gaps = []
    for number in (1, 30):
        below, above = two_sided(g, eps, number, generator)
        assert (below - exact).mean() < 0 < (above - exact).mean()
        gaps.append((above - below).mean())
    assert gaps[1] < gaps[0] / 2
    # the weights themselves are unbiased: E[w] = p(x) upwards and E[1 / w] = 1 / p(x) downwards
    for log_w in (below - exact, exact - above):
        ratio = log_w.exp()
        assert abs(ratio.mean() - 1) < 4 * ratio.std() / len(ratio) ** 0.5


def test_temperatures_rise_from_zero_to_one():
    found = temperatures(9)
    assert (found[0], found[-1], len(found)) == (0.0, 1.0, 10)
    assert found == sorted(found)
