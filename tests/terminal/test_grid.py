"""Rows of coloured tokens: kinds, symbols, escaping."""

import re

import pytest
import torch

from tarflowlm.data import ByteTokenizer
from tarflowlm.terminal.grid import (
    Row,
    Token,
    pass_rows,
    spans,
    symbols,
    text_tokens,
    to_html,
    visible,
)

HOSTILE = '<script>alert("1")</script>&amp;\'"'


def encode(text: str) -> torch.Tensor:
    return torch.tensor(list(text.encode()))


def kinds(tokens) -> str:
    return "".join(token.kind[0] for token in tokens)


@pytest.mark.parametrize("text", ["a naïve — word", "añb→c🙂d", ""])
def test_symbols_concatenate_to_the_text(text):
    tokens, tokenizer = encode(text), ByteTokenizer()
    assert len(symbols(tokens, tokenizer)) == len(tokens)
    for end in range(len(tokens) + 1):
        assert "".join(symbols(tokens[:end], tokenizer)) == tokenizer.decode(tokens[:end])


def test_control_characters_are_visible():
    assert visible("a\0\x7f\nb\x9b\u202e") == "a␀\\x7f↵\nb\\x9b\\u202e"
    assert spans([Token("↵\n")]) == '<span class="tl-final"><i>↵</i>\n</span>'


def test_noise_shows_no_boxes():
    tokens = torch.tensor([*b"a\x00\xe4b"])
    shown = text_tokens(tokens, ByteTokenizer(), {"noise": torch.ones(4, dtype=torch.bool)})
    assert "".join(token.symbol for token in shown) == "a··b"


def test_kinds_of_a_text():
    before, after = encode("the cat"), encode("the hat")
    given = torch.tensor([True] * 3 + [False] * 4)
    shown = text_tokens(after, ByteTokenizer(), {"given": given, "changed": after != before})
    assert kinds(shown) == "gggfcff"


def test_rows_of_passes():
    passes = [encode(text) for text in ("qxz", "qaz", "qat", "cat")]
    rows = pass_rows(passes, ByteTokenizer(), given=torch.tensor([False, False, True]))
    assert [row.label.split(":")[0] for row in rows] == [
        "noise",
        "after block 3",
        "after block 2",
        "after block 1",
    ]
    assert rows[1].label == "after block 3: 1 of 3 changed"
    assert [kinds(row.tokens) for row in rows] == ["nnn", "ncn", "nfc", "cfg"]
    rows = pass_rows(passes, ByteTokenizer(), probabilities=[torch.tensor([0.25, 1, 1])] * 4)
    assert [token.probability for token in rows[0].tokens] == [0.25, 1, 1]
    assert 'title="p = 0.25"' in spans(rows[0].tokens)


def test_text_is_escaped_and_nothing_is_loaded():
    html = to_html([Row(HOSTILE, [Token(HOSTILE, "final")])])
    assert set(re.findall(r"<(\w+)", html)) == {"div", "span"}
    assert html.count("&lt;script&gt;") == 2
    assert not re.search(r"url\(|https?:|@import", html)


def test_legend_names_the_kinds_that_occur():
    html = to_html([Row("1", [Token("x", "noise")]), Row("2", [Token("x", "changed")])])
    assert re.findall(r">([^<>]+)<", html.split("tl-row")[0]) == ["new in this row", "noise"]
    assert "<span" not in to_html([])
