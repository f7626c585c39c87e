"""Figures: embeddable SVG, atomic PNG, and labels that do not overlap."""

import importlib.util
import warnings

import numpy as np
import pytest
from matplotlib.text import Text

from tarflowlm.errors import UserError
from tarflowlm.report.style import add_legend, label_points, line_style, literal, render

SIZE = {"width": 5.0, "height": 4.0}


def test_figure_is_a_png_and_an_embeddable_svg(tmp_path):
    import matplotlib

    def draw(figure):
        figure.subplots().plot([1, 2], [3, 4])

    before = dict(matplotlib.rcParams)
    svg = render(draw, tmp_path / "one.png", **SIZE)
    assert (tmp_path / "one.png").read_bytes().startswith(b"\x89PNG\r\n")
    assert svg.startswith("<svg")
    assert "var(--ink)" in svg
    assert "<metadata" not in svg
    assert 'id="one-figure_1"' in svg
    assert render(draw, None, name="one", **SIZE) == svg
    assert dict(matplotlib.rcParams) == before


def test_failed_figure_leaves_no_file(tmp_path):
    with pytest.raises(ZeroDivisionError):
        render(lambda figure: 1 / 0, tmp_path / "one.png", **SIZE)
    assert not list(tmp_path.iterdir())


def test_eighteen_lines_look_different():
    assert len({str(line_style(i)) for i in range(18)}) == 18


def test_long_legend_stays_in_the_figure():
    def draw(figure):
        figure.subplots()
        add_legend(figure, [("n" * 30, line_style(i)) for i in range(4)])
        figure.draw_without_rendering()
        box = figure.legends[0].get_window_extent()
        assert box.x0 >= 0
        assert box.x1 <= figure.bbox.width

    render(draw, None, width=4.2, height=4.0)


def test_point_labels_do_not_overlap():
    points = np.random.default_rng(0).normal(size=(150, 2))

    def draw(figure):
        axes = figure.subplots()
        axes.scatter(*points.T)
        placed = label_points(axes, points, [f"word{i}" for i in range(150)])
        figure.draw_without_rendering()
        # without the thin lines; glyphs fill less than the line height that matplotlib reports
        boxes = [Text.get_window_extent(text).expanded(0.98, 0.85) for text in axes.texts]
        assert not [(a, b) for i, a in enumerate(boxes) for b in boxes[:i] if a.overlaps(b)]
        assert placed == len(boxes)
        assert 40 < placed < 150

    render(draw, None, **SIZE)


def test_symbols_are_no_mathematics_and_need_no_font():
    def draw(figure):
        axes = figure.subplots()
        label_points(axes, np.random.default_rng(0).uniform(0.2, 0.8, size=(4, 2)), ["$x^2$", "$$", "あ", "_{a}^$"])

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ">x^2" not in render(draw, None, **SIZE)
    assert literal("$x^2$") == r"\$x^2\$"
    assert literal("x" * 99) == "x" * 15 + "…" + "x" * 14


def test_missing_matplotlib_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'tarflowlm\[plots\]'"):
        render(lambda figure: None, None, **SIZE)
