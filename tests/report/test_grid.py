"""The rows of coloured tokens: what is shown, that it is escaped, and that it is light."""

import re
from html.parser import HTMLParser

import pytest

from tarflowlm.report.grid import GridRow, Token, grid

HOSTILE = '<script>alert("1")</script>&amp;\'"'


class Elements(HTMLParser):
    """Tags of a page, and the text of its spans with their attributes."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags, self.spans, self.open = [], [], []
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.open.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        if self.open[-1][0] == "span":
            self.spans.append((data, self.open[-1][1]))


def test_every_text_is_text():
    rows = [GridRow(HOSTILE, [Token(HOSTILE, "final", title=HOSTILE)])]
    found = Elements(grid(rows, legend=False))
    assert set(found.tags) == {"div", "style", "span"}
    assert found.spans == [(HOSTILE, {"class": "tl-final", "title": HOSTILE})]


def test_neighbours_that_look_alike_are_one_element():
    tokens = [Token("a", "final"), Token("b", "final"), Token("c", "draft"), Token("d", "draft", 0.6)]
    spans = Elements(grid([GridRow("", tokens)], legend=False)).spans
    assert [(text, look["class"], look.get("style")) for text, look in spans] == [
        ("ab", "tl-final", None),
        ("c", "tl-draft", None),
        ("d", "tl-draft", "opacity:0.7"),
    ]


def test_the_legend_names_what_occurs():
    rows = [GridRow("1", [Token("x", "noise")]), GridRow("2", [Token("x", "changed")])]
    assert [text for text, _ in Elements(grid(rows)).spans[2:]] == ["new in this row", "noise"]
    assert "tl-legend" not in grid(rows, legend=False).split("</style>")[1]


@pytest.mark.parametrize(("opacity", "shown"), [(-1.0, "0.3"), (0.0, "0.3"), (0.6, "0.7"), (2.0, None)])
def test_a_token_stays_readable(opacity, shown):
    found = re.search(r"opacity:([\d.]+)", grid([GridRow("", [Token("x", "final", opacity)])], legend=False))
    assert (found and found[1]) == shown


def test_control_characters_are_seen():
    html = grid([GridRow("", [Token("a\0\x7f\nb", "final")])], legend=False)
    assert "a\u2400\u2421\u21b5\nb" in html


def test_it_takes_nothing_from_elsewhere():
    assert not re.search(r"url\(|https?:|@import|<script|<link|<img", grid([GridRow("", [Token("x", "given")])]))


def test_nothing_to_show_is_no_error():
    assert "tl-row" not in grid([]).split("</style>")[1]
