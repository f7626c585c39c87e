"""Rows of coloured tokens in HTML: the legend, escaping, probabilities."""

import re

from tarflowlm.terminal.tokens import Row, Token
from tarflowlm_apps.grid import LEGEND, spans, to_html

HOSTILE = '<script>alert("1")</script>&amp;\'"'


def test_text_is_escaped_and_nothing_is_loaded():
    html = to_html([Row(HOSTILE, [Token(HOSTILE, "final")])])
    assert set(re.findall(r"<(\w+)", html)) == {"div", "span"}
    assert html.count("&lt;script&gt;") == 2
    assert not re.search(r"url\(|https?:|@import", html)


def test_legend_names_the_kinds_that_occur():
    html = to_html([Row("1", [Token("x", "noise")]), Row("2", [Token("x", "changed")])])
    assert re.findall(r">([^<>]+)<", html.split("tl-row")[0]) == [
        LEGEND["noise"],
        LEGEND["changed"],
    ]
    assert "<span" not in to_html([])


def test_line_ends_and_probabilities_of_tokens():
    assert spans([Token("↵\n")]) == '<span class="tl-final"><i>↵</i>\n</span>'
    assert 'title="p = 0.25"' in spans([Token("a", probability=0.25)])
