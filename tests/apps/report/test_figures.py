"""The projection of codes against another way to compute it, and curves of few points."""

from dataclasses import replace

import numpy as np
import pytest

from tarflowlm.runs.records import read_record
from tarflowlm_apps.report.figures import draw_bits, project


@pytest.mark.parametrize(("count", "style"), [(2, "None"), (4, "-")])
def test_few_validations_are_markers(runs, count, style):
    """A line from the start to the end would run far above the training curve."""
    from matplotlib.figure import Figure

    record = read_record(runs["joint"])
    valid = {name: np.resize(column, count) for name, column in record.valid.items()}
    figure = Figure()
    draw_bits(figure, [replace(record, valid=valid)], over=["tokens"])
    shown, training, *_ = figure.axes[0].lines
    assert (shown.get_linestyle(), shown.get_marker()) == (style, "o")
    assert training.get_linestyle() == "-"


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
