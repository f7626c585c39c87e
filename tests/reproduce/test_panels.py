"""Panels of figure 6: pieces of a text, marks on a page, and a picture."""

import re
from itertools import pairwise
from pathlib import Path

import pytest

from tarflowlm.report.style import render
from tarflowlm.reproduce.panels import COLUMNS, LINES, Marked, draw_panels, panels_page, pieces, spans_of


def decode_bytes(tokens) -> str:
    return bytes(tokens).decode("utf-8", errors="replace")


@pytest.mark.parametrize("data", ["añb→c🙂d".encode(), "🙂".encode()[:3], "a→".encode()[:3] + b"b\xff\xffc", b""])
def test_pieces_add_up_to_the_text(data):
    parts = pieces(decode_bytes, list(data))
    assert len(parts) == len(data)
    assert "".join(parts) == decode_bytes(data)


def test_a_character_belongs_to_the_token_that_completes_it():
    parts = pieces(decode_bytes, list("a→b".encode()))
    assert (parts[0], parts[-1]) == ("a", "b")
    assert [part for part in parts[1:-1] if part] == ["→"]


def test_spans_join_neighbours_and_skip_empty_parts():
    assert spans_of(["ab", "c", "", "de", "f"], [True, True, True, False, True]) == [[0, 3], [5, 6]]
    assert spans_of(["a", "b"], [False, False]) == []


def test_runs_cover_the_text():
    marked = Marked("hello", [[0, 2], [4, 5]])
    assert [run for run in marked.runs() if run[0]] == [("he", True), ("ll", False), ("o", True)]


def rows(*texts: str, model: str = "a <model>", seed: int = 0):
    found = []
    for number, text in enumerate(texts):
        row = {"model": model, "seed": seed, "text": text, "tokens as in the end": 0.5}
        found.append(row | {"block": len(texts) - number, "direction": "left to right", "tokens": 9, "edits": 1,
                            "replaced": [[0, 1]], "edited": [[0, 1]]})  # fmt: skip
    return found


def test_a_page_escapes_marks_and_is_self_contained():
    page = panels_page("Title & more", ["a <note>"], rows("<b>&\n\0x", "'q'", "end") + rows("1", "2", model="other"))
    assert "<title>Title &amp; more</title>" in page
    assert "<del>&lt;</del>b&gt;&amp;\n␀x</p>" in page
    assert "<ins>&#x27;</ins>q&#x27;</p>" in page
    for text in (
        "a &lt;note&gt;",
        "<h2>a &lt;model&gt;, seed 0</h2>",
        "Block 2, left to right",
        "1 of 9 tokens edited",
    ):
        assert text in page
    assert page.count("<article") == 3
    assert 'name="viewport"' in page
    assert "legend" in page
    assert not re.search("https?:|<script|<link|src=|url[(]", page)


def test_a_picture_grows_with_its_texts_up_to_a_limit(tmp_path: Path):
    pytest.importorskip("matplotlib")
    heights = []
    for length in (COLUMNS, 2 * COLUMNS, COLUMNS * LINES, COLUMNS * LINES + 5):
        text = "$x_é\n"[:length].ljust(length, "a")

        def draw(figure, text=text) -> None:
            draw_panels(figure, rows(text, text, text))
            heights.append(figure.get_size_inches()[1])

        render(draw, tmp_path / "panels.png", width=10.0, height=10.0)
    assert (tmp_path / "panels.png").read_bytes()[:4] == b"\x89PNG"
    lines = [after - before for before, after in pairwise(heights)]
    assert lines[0] > 0
    assert lines[1] == pytest.approx((LINES - 2) * lines[0])
    assert lines[2] == 0
