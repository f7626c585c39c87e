"""The projection of codes against another way to compute it."""

import numpy as np
import pytest

from tarflowlm.runs.checkpoint import load_checkpoint
from tarflowlm.views.codes import codes_of, project


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


def test_codes_of_a_flow_are_its_codebook(runs):
    checkpoint = load_checkpoint(runs["progressive"])
    counts = np.arange(27)[::-1].copy()
    counts[5] = 1000
    codes = codes_of(checkpoint.model, checkpoint.tokenizer, counts)
    assert codes.symbols[:3] == ["␣", "a", "b"]
    assert codes.named.tolist() == [5, *range(5), *range(6, 27)]
    np.testing.assert_allclose(
        codes.std, checkpoint.model.codebook.log_std.detach().exp(), rtol=1e-6
    )


def test_codes_of_a_baseline_are_its_embedding(runs):
    checkpoint = load_checkpoint(runs["baseline"])
    codes = codes_of(checkpoint.model, checkpoint.tokenizer, None)
    weight = checkpoint.model.embedding.weight.detach().double().numpy()
    np.testing.assert_array_equal(codes.points, project(weight)[0])
    assert (codes.std, codes.noun, codes.named.tolist()) == (None, "input embedding", [*range(27)])
