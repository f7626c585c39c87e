"""Gumbel numbers: their law; each is a function of its row's seed, its place and choice."""

import math

import pytest
import torch
from torch import Tensor

from tarflowlm.generation import sampling
from tarflowlm.generation.sampling import Gumbel


def numbers(seeds: Tensor, places: int, groups: int, choices: int) -> Tensor:
    """All numbers [B, N, G, K], in float64."""
    gumbel = Gumbel(seeds, places, (groups, choices))
    return torch.stack([gumbel.at(slice(None), n) for n in range(places)], 1).double()


def test_they_have_the_gumbel_law():
    g = numbers(torch.arange(10), 100, 2, 50).flatten().sort().values
    count = len(g)
    assert g.isfinite().all()
    # six standard errors; the fourth central moment of the law is 5.4 squared variances
    variance = math.pi**2 / 6
    assert g.mean().item() == pytest.approx(0.577216, abs=6 * math.sqrt(variance / count))
    assert g.var().item() == pytest.approx(variance, rel=6 * math.sqrt(4.4 / count))
    # Kolmogorov's distance; a larger one has a probability of 2 exp(-2 * 2.3^2) = 5e-5
    law = (-(-g).exp()).exp()
    steps = torch.arange(count + 1, dtype=torch.float64) / count
    distance = torch.maximum(steps[1:] - law, law - steps[:-1]).max().item()
    assert distance < 2.3 / math.sqrt(count)
    # the largest of n numbers is about log n
    assert g[-1].item() == pytest.approx(math.log(count), abs=8)
    assert g[0].item() == pytest.approx(-math.log(math.log(count)), abs=0.5)


@pytest.mark.parametrize("axis", [0, 1, 2, 3], ids=["seeds", "places", "groups", "choices"])
@pytest.mark.parametrize("first", [0, 2**62 - 20])
def test_neighbours_are_not_correlated(axis, first):
    g = numbers(first + torch.arange(20), 20, 10, 20).movedim(axis, 0).flatten(1)
    off_diagonal = torch.corrcoef(g).fill_diagonal_(0.0)
    assert off_diagonal.abs().max() < 6 / math.sqrt(g.shape[1])


def test_hardly_any_number_occurs_twice():
    """Places and choices step by the same constant: no diagonal repeats."""
    g = numbers(torch.arange(4), 50, 1, 50).flatten()
    # of 10^4 numbers of 24 digits about three are equal by chance
    assert len(g) - len(g.unique()) < 15


def test_a_number_does_not_depend_on_how_it_is_asked_for(monkeypatch):
    seeds, places, choices = torch.tensor([5, 2**61, 0]), 6, (2, 3)
    table = Gumbel(seeds, places, choices)
    assert table.table is not None
    monkeypatch.setattr(sampling, "TABLE", 0)
    asked = Gumbel(seeds, places, choices)
    assert asked.table is None
    every = torch.stack([asked.at(slice(None), n) for n in range(places)], 1)
    assert torch.equal(every, table.table)
    rows = torch.tensor([2, 0])
    for one in (table, asked):
        assert torch.equal(one.at(rows, 3), every[rows, 3])
    # nor on other rows, or the number of places
    alone = Gumbel(seeds[1:2], 2, choices)
    assert torch.equal(alone.at(slice(None), 1), every[1:2, 1])


def test_the_largest_sum_is_a_draw_from_the_weights():
    log_w = torch.tensor([0.5, -1.0, 2.0, -4.0, 0.0], dtype=torch.float64)
    w = log_w.softmax(0)
    count = 40_000
    drawn = (log_w + numbers(torch.arange(400), 100, 1, 5)).argmax(-1)
    found = torch.bincount(drawn.flatten(), minlength=5) / count
    assert ((found - w).abs() < 5 * (w * (1 - w) / count).sqrt()).all()
