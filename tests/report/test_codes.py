"""Projection and distances against other ways to compute them."""

import math

import numpy as np
import pytest
import torch

from tarflowlm.report.codes import codes_of, nearest_neighbours, project
from tarflowlm.runs.checkpoint import load_checkpoint


@pytest.fixture
def vectors():
    rng = np.random.default_rng(1)
    return rng.normal(size=(40, 6)) @ rng.normal(size=(6, 6)) + 3


def test_the_projection_is_that_of_the_covariance(vectors):
    points, explained = project(vectors)
    values, directions = np.linalg.eigh(np.cov(vectors.T))
    expected = (vectors - vectors.mean(0)) @ directions[:, [-1, -2]]
    # a principal direction has no sign of its own
    np.testing.assert_allclose(np.abs(points), np.abs(expected), rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(explained, values[[-1, -2]] / values.sum(), rtol=1e-9)
    np.testing.assert_allclose(points.T @ points / 39, np.diag(values[[-1, -2]]), atol=1e-9)


def test_the_projection_is_linear_with_orthonormal_directions(vectors):
    """So that discs of radius sigma are what spheres look like, and mirrored input changes no shape."""
    points, _ = project(vectors)
    directions = np.linalg.lstsq(vectors - vectors.mean(0), points, rcond=None)[0]
    np.testing.assert_allclose(directions.T @ directions, np.eye(2), atol=1e-9)
    largest = np.take_along_axis(directions, np.abs(directions).argmax(0)[None], 0)
    assert (largest > 0).all()


@pytest.mark.parametrize("shape", [(5, 1), (2, 4), (1, 3)])
def test_too_few_dimensions_or_points_give_zeros(shape):
    vectors = np.random.default_rng(2).normal(size=shape)
    points, explained = project(vectors)
    assert points.shape == (shape[0], 2)
    assert np.isfinite(points).all()
    np.testing.assert_allclose(points[:, 1], 0, atol=1e-12)
    assert explained[1] == pytest.approx(0, abs=1e-12)


def test_nearest_neighbours_by_brute_force(vectors):
    queries = np.array([3, 0, 17, 39])
    nearest, distance = nearest_neighbours(vectors, queries, chunk=3)
    for query, found, far in zip(queries, nearest, distance, strict=True):
        others = {i: math.dist(vectors[query], vectors[i]) for i in range(40) if i != query}
        assert found == min(others, key=others.__getitem__)
        assert far == pytest.approx(min(others.values()))


def test_codes_of_a_flow(runs):
    checkpoint = load_checkpoint(runs["progressive"])
    counts = np.arange(27)[::-1].copy()
    counts[5] = 1000
    codes = codes_of(checkpoint.model, checkpoint.tokenizer, counts)
    assert codes.symbols[:3] == ["␣", "a", "b"]
    assert codes.compared.tolist() == [5, *range(5), *range(6, 27)]
    assert codes.is_counted
    with torch.no_grad():
        mean, std = checkpoint.model.codebook.mean, checkpoint.model.codebook.log_std.exp()
        np.testing.assert_allclose(codes.std, std, rtol=1e-6)
        between = torch.cdist(mean, mean) + torch.diag(torch.full((27,), torch.inf))
    np.testing.assert_allclose(codes.distance, (between.min(1).values / std)[codes.compared], rtol=1e-4)
    np.testing.assert_array_equal(codes.nearest, between.argmin(1)[codes.compared])
    np.testing.assert_allclose(codes.points, project(mean.detach().double().numpy())[0])


def test_codes_of_a_baseline_are_its_embedding(runs):
    checkpoint = load_checkpoint(runs["baseline"])
    codes = codes_of(checkpoint.model, checkpoint.tokenizer, None)
    weight = checkpoint.model.embedding.weight.detach()
    between = torch.cdist(weight, weight) + torch.diag(torch.full((27,), torch.inf))
    norm = weight.square().sum(1).mean().sqrt()
    np.testing.assert_allclose(codes.distance, between.min(1).values / norm, rtol=1e-4)
    assert codes.std is None
    assert not codes.is_counted
    assert codes.noun == "input embedding"
