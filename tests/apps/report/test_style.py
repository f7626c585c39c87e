"""Figures: embeddable SVG, atomic PNG, and labels that do not overlap."""

import warnings

from tarflowlm_apps.report.style import literal, render

SIZE = {"width": 5.0, "height": 4.0}


def test_figure_is_a_png_and_an_embeddable_svg(tmp_path):
    import matplotlib

    def draw(figure):
        figure.subplots().plot([1, 2], [3, 4])

    before = dict(matplotlib.rcParams)
    svg = render(draw, "one", tmp_path, **SIZE)
    assert (tmp_path / "one.png").read_bytes().startswith(b"\x89PNG\r\n")
    assert svg.startswith("<svg")
    assert "var(--ink)" in svg
    assert "<metadata" not in svg
    assert 'id="one-figure_1"' in svg
    assert render(draw, "one", **SIZE) == svg
    assert dict(matplotlib.rcParams) == before


def test_symbols_are_no_mathematics_and_need_no_font():
    def draw(figure):
        axes = figure.subplots()
        for symbol in ("$x^2$", "$$", "あ", "_{a}^$"):
            axes.text(0.5, 0.5, literal(symbol))

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ">x^2" not in render(draw, "two", **SIZE)
    assert literal("$x^2$") == r"\$x^2\$"
    assert literal("x" * 99) == "x" * 15 + "…" + "x" * 14
