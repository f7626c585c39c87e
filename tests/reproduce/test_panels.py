"""The page of figure 6: edits are marked, texts are escaped, nothing is loaded."""

import re

from tarflowlm.reproduce.passes import edited_spans, panels_page


def test_spans_join_neighbours_and_skip_empty_symbols():
    assert edited_spans(["ab", "c", "", "de", "f"], [True, True, True, False, True]) == [[0, 3], [5, 6]]
    assert edited_spans(["a", "b"], [False, False]) == []


def rows(*texts: str, model: str):
    found = []
    for number, text in enumerate(texts):
        row = {"model": model, "seed": 0, "text": text, "tokens as in the end": 0.5, "state": "noise"}
        if number:
            row |= {"state": "", "block": len(texts) - number, "direction": "left to right", "tokens": 9, "edits": 1}
            row["edited"] = [[0, 1]]
        found.append(row)
    return found


def test_page_marks_edits_and_escapes_texts():
    page = panels_page(
        "Title & more", ["a <note>"], [*rows("<b>&", "'q'", "end", model="a <m>"), *rows("1", model="b")]
    )
    assert "<title>Title &amp; more</title>" in page
    assert page.count('class="tl-row"') == 4
    assert '<span class="tl-noise">&lt;b&gt;&amp;</span>' in page
    assert '<span class="tl-changed">e</span><span class="tl-final">nd</span>' in page
    for text in ("a &lt;note&gt;", "<h2>a &lt;m&gt;, seed 0</h2>", "block 2, left to right: 1 of 9 edited"):
        assert text in page
    assert not re.search("https?:|<script|<link|src=|url[(]", page)
