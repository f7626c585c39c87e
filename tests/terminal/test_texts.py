"""Texts as tokens of several kinds: symbols, kinds, passes; and on a terminal."""

from dataclasses import replace

import pytest
import torch

from helpers import tiny_ar
from tarflowlm.data import ByteTokenizer
from tarflowlm.generation import Generation
from tarflowlm.generation.sampling import Evidence
from tarflowlm.generation.texts import Written
from tarflowlm.pretrained import Pretrained
from tarflowlm.terminal.texts import print_samples, trust
from tarflowlm.terminal.tokens import pass_rows, symbols, text_tokens, visible


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
    assert "".join(token.symbol for token in shown) == "····"


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
    # given tokens are no change, and nothing is marked while a text is first written
    assert [row.label.split(": ")[1] for row in rows[1:]] == [
        "1 of 2 written, 1 still noise",
        "0 of 2 changed, 1 still noise",
        "1 of 2 changed",
    ]
    assert [kinds(row.tokens) for row in rows] == ["nnn", "nfn", "nfg", "cfg"]
    assert "".join(token.symbol for token in rows[1].tokens) == "·a·"
    rows = pass_rows(passes, ByteTokenizer(), probabilities=[torch.tensor([0.25, 1, 1])] * 4)
    assert [token.probability for token in rows[0].tokens] == [0.25, 1, 1]


def test_rows_of_passes_that_leave_noise():
    """A letter that a pass leaves as noise is open, even where it was noise of the same letter."""
    passes = [encode(text) for text in ("qxzw", "ctzs", "catz")]
    noise = [torch.tensor(mask).bool() for mask in ([0, 1, 1, 1], [0, 0, 1, 0], [0, 0, 0, 1])]
    rows = pass_rows(passes, ByteTokenizer(), noise=noise)
    assert [kinds(row.tokens) for row in rows] == ["nnnn", "ffnf", "fcco"]
    assert rows[2].label == "after block 1: 2 of 4 changed, 1 still noise"
    # an open letter is a letter of the text
    assert "".join(token.symbol for token in rows[2].tokens) == "catz"


def test_trust_is_told_in_one_way():
    nan = torch.full((2,), torch.nan, dtype=torch.float64)
    ess = torch.tensor([4.6, 12.0], dtype=torch.float64)
    evidence = Evidence(nan, ess, nan, nan, torch.tensor([16, 16]))
    assert trust(evidence, slice(0, 2)) == (
        "rests on about 4.6 to 12.0 independent candidates of 16"
    )
    one = slice(0, 1)
    told = "rests on about 4.6 independent candidates of 16"
    assert trust(evidence, one) == told
    # each length of a gap is a candidate
    assert trust(replace(evidence, ess=ess + 12), one) == told.replace("4.6", "16.0")
    few = "rests on about 3.9 independent candidates of 16, which is rough; "
    rough = replace(evidence, ess=ess - 0.74)
    assert trust(rough, one) == f"{few}try --particles 64"
    assert trust(rough, one, "raise it") == f"{few}raise it"
    assert "rough" not in trust(replace(evidence, ess=ess - 0.64), one)


def test_a_sample_gives_the_terminal_no_commands(capsys):
    tokens = torch.tensor([list(b"a\x1b[2Jb\rc\nd")])
    tokenizer = ByteTokenizer()
    texts = [tokenizer.decode(tokens[0].tolist())]
    lm = Pretrained(tiny_ar(vocab_size=256), tokenizer)
    print_samples(Written(range(1), texts, Generation(tokens), (), 1), lm)
    shown = capsys.readouterr().out
    assert "a\ufffd[2Jb\ufffdc" in shown
    assert "\x1b" not in shown
