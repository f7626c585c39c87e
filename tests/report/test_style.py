"""Labels that do not overlap, and figures that are saved whole and fit for a page."""

import importlib.util
import warnings

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.text import Text

from tarflowlm.errors import UserError
from tarflowlm.report.style import (
    NARROW,
    add_legend,
    is_narrow,
    label_points,
    line_style,
    literal,
    render,
    render_narrow,
    spread,
    two_panels,
)


@given(
    st.lists(st.tuples(st.floats(-0.5, 1.5), st.floats(0.001, 0.3)), min_size=1, max_size=12),
)
def test_spread_intervals_do_not_overlap(pairs):
    pairs.sort()
    centres, spans = (np.array(column) for column in zip(*pairs, strict=True))
    placed = spread(centres, spans)
    low, high = placed - spans / 2, placed + spans / 2
    assert (low[1:] >= high[:-1] - 1e-9).all()
    assert low[0] >= -1e-9
    if spans.sum() <= 1:
        assert high[-1] <= 1 + 1e-9


def test_spread_leaves_what_is_apart():
    centres = np.array([0.1, 0.5, 0.9])
    np.testing.assert_allclose(spread(centres, np.full(3, 0.1)), centres)


def test_eighteen_lines_look_different():
    assert len({str(line_style(i)) for i in range(18)}) == 18


def test_a_figure_is_a_png_and_an_embeddable_svg(tmp_path):
    def draw(figure):
        figure.subplots().plot([1, 2], [3, 4])

    svg = render(draw, tmp_path / "one.png", width=3.0, height=2.0)
    assert (tmp_path / "one.png").read_bytes().startswith(b"\x89PNG\r\n")
    assert [path.name for path in tmp_path.iterdir()] == ["one.png"]
    assert svg.startswith("<svg")
    assert "var(--ink)" in svg
    assert "<metadata" not in svg
    assert 'id="one-figure_1"' in svg
    assert render(draw, tmp_path / "one.png", width=3.0, height=2.0) == svg


def test_a_narrow_figure_has_its_panels_below_each_other_and_its_own_ids(tmp_path):
    places = []

    def draw(figure):
        first, second = two_panels(figure)
        add_legend(figure, [("a run", line_style(0)), ("another", line_style(1))])
        figure.draw_without_rendering()
        places.append((is_narrow(figure), first.get_position().x0 == second.get_position().x0))
        assert [text.get_text() for text in figure.legends[0].get_texts()] == ["a run", "another"]

    wide = render(draw, tmp_path / "one.png", width=2 * NARROW, height=3.0)
    narrow = render_narrow(draw, "narrow-one", height=4.0)
    assert places == [(False, False), (True, True)]
    assert 'id="narrow-one-figure_1"' in narrow
    assert 'id="narrow-one-' not in wide


def test_long_names_of_a_legend_stay_in_the_figure():
    def draw(figure):
        figure.subplots()
        add_legend(figure, [("n" * 30, line_style(i)) for i in range(4)])
        figure.draw_without_rendering()
        box = figure.legends[0].get_window_extent()
        assert box.x0 >= 0
        assert box.x1 <= figure.bbox.width

    render_narrow(draw, "x", height=4.0)


def test_a_figure_that_fails_leaves_no_file(tmp_path):
    def draw(figure):
        figure.subplots()
        raise RuntimeError

    with pytest.raises(RuntimeError):
        render(draw, tmp_path / "one.png", width=3.0, height=2.0)
    assert not list(tmp_path.iterdir())


def test_style_does_not_leak(tmp_path):
    import matplotlib

    before = dict(matplotlib.rcParams)
    render(lambda figure: figure.subplots(), tmp_path / "one.png", width=3.0, height=2.0)
    assert dict(matplotlib.rcParams) == before


def test_point_labels_do_not_overlap_and_say_how_many_fit(tmp_path):
    points = np.random.default_rng(0).normal(size=(150, 2))
    counts = []

    def draw(figure):
        axes = figure.subplots()
        axes.scatter(*points.T)
        counts.append(label_points(axes, points, [f"word{i}" for i in range(150)]))
        figure.draw_without_rendering()
        boxes = [Text.get_window_extent(text) for text in axes.texts]  # without the thin lines
        # glyphs fill less than the line height that matplotlib reports
        shrunk = [box.expanded(0.98, 0.85) for box in boxes]
        overlapping = [(a, b) for i, a in enumerate(shrunk) for b in shrunk[:i] if a.overlaps(b)]
        assert not overlapping
        counts.append(len(boxes))

    render(draw, tmp_path / "one.png", width=5.0, height=4.0)
    assert counts[0] == counts[1]
    assert 40 < counts[0] < 150


def test_symbols_are_shown_letter_by_letter(tmp_path):
    """No mathematics between dollar signs, no complaint about scripts that the font lacks."""
    texts = ["$x^2$", "$$", r"\xe2", "あ", "_{a}^$"]
    shown = []

    def draw(figure):
        axes = figure.subplots()
        label_points(axes, np.random.default_rng(0).uniform(0.2, 0.8, size=(5, 2)), texts)
        figure.draw_without_rendering()
        shown.extend(text._preprocess_math(text.get_text()) for text in axes.texts)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        render(draw, tmp_path / "one.png", width=5.0, height=4.0)
    assert shown == [(text, False) for text in texts]
    assert literal("x" * 99) == "x" * 15 + "…" + "x" * 14


def test_without_matplotlib_the_remedy_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'tarflowlm\[plots\]'"):
        render(lambda figure: None, tmp_path / "one.png", width=3.0, height=2.0)
