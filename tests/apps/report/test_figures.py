"""The projection of codes against another way to compute it."""

import numpy as np
import pytest

from tarflowlm_apps.report.figures import project


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
