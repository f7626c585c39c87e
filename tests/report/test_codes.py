"""Projection and distances against other ways to compute them."""

import math

import numpy as np
import pytest
import torch

from tarflowlm.report.figures import codes_of, nearest_neighbours, project
from tarflowlm.runs.checkpoint import load_checkpoint


@pytest.fixture
def vectors():
    rng = np.random.default_rng(1)
    return rng.normal(size=(40, 6)) @ rng.normal(size=(6, 6)) + 3


def test_projection_is_on_the_axes_of_the_covariance(vectors):
    points, explained = project(vectors)
    values, directions = np.linalg.eigh(np.cov(vectors.T))
    # a principal direction has no sign of its own
    expected = (vectors - vectors.mean(0)) @ directions[:, [-1, -2]]
    np.testing.assert_allclose(np.abs(points), np.abs(expected), rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(explained, values[[-1, -2]] / values.sum(), rtol=1e-9)
    # orthonormal, so that a sphere becomes a disc; and with a fixed sign
    axes = np.linalg.lstsq(vectors - vectors.mean(0), points, rcond=None)[0]
    np.testing.assert_allclose(axes.T @ axes, np.eye(2), atol=1e-9)
    assert (np.take_along_axis(axes, np.abs(axes).argmax(0)[None], 0) > 0).all()


def test_nearest_neighbours_by_brute_force(vectors):
    queries = np.array([3, 0, 17, 39])
    for query, found, distance in zip(queries, *nearest_neighbours(vectors, queries, chunk=3), strict=True):
        others = {i: math.dist(vectors[query], vectors[i]) for i in range(40) if i != query}
        assert found == min(others, key=others.__getitem__)
        assert distance == pytest.approx(min(others.values()))


def test_codes_of_a_flow_are_its_codebook(runs):
    checkpoint = load_checkpoint(runs["progressive"])
    counts = np.arange(27)[::-1].copy()
    counts[5] = 1000
    codes = codes_of(checkpoint.model, checkpoint.tokenizer, counts)
    assert codes.symbols[:3] == ["␣", "a", "b"]
    assert codes.compared.tolist() == [5, *range(5), *range(6, 27)]
    with torch.no_grad():
        std = checkpoint.model.codebook.log_std.exp()
        between = torch.cdist(checkpoint.model.codebook.mean, checkpoint.model.codebook.mean)
        between.fill_diagonal_(torch.inf)
    np.testing.assert_allclose(codes.std, std, rtol=1e-6)
    np.testing.assert_allclose(codes.distance, (between.min(1).values / std)[codes.compared], rtol=1e-4)
    np.testing.assert_array_equal(codes.nearest, between.argmin(1)[codes.compared])


def test_codes_of_a_baseline_are_its_embedding(runs):
    checkpoint = load_checkpoint(runs["baseline"])
    codes = codes_of(checkpoint.model, checkpoint.tokenizer, None)
    weight = checkpoint.model.embedding.weight.detach()
    between = torch.cdist(weight, weight).fill_diagonal_(torch.inf)
    norm = weight.square().sum(1).mean().sqrt()
    np.testing.assert_allclose(codes.distance, between.min(1).values / norm, rtol=1e-4)
    assert (codes.std, codes.is_counted, codes.noun) == (None, False, "input embedding")
