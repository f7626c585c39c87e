"""Texts as tokens of several kinds: symbols, kinds, passes; and on a terminal."""

import pytest
import torch

from helpers import tiny_ar
from tarflowlm.data import ByteTokenizer
from tarflowlm.generation import Generation
from tarflowlm.generation.texts import Written
from tarflowlm.pretrained import Pretrained
from tarflowlm.terminal.texts import pass_rows, print_samples, symbols, text_tokens, visible


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


def test_a_sample_gives_the_terminal_no_commands(capsys):
    tokens = torch.tensor([list(b"a\x1b[2Jb\rc\nd")])
    tokenizer = ByteTokenizer()
    texts = [tokenizer.decode(tokens[0].tolist())]
    lm = Pretrained(tiny_ar(vocab_size=256), tokenizer)
    print_samples(Written(range(1), texts, Generation(tokens), (), 1), lm)
    shown = capsys.readouterr().out
    assert "a\ufffd[2Jb\ufffdc" in shown
    assert "\x1b" not in shown
