"""Texts on a terminal."""

import torch

from helpers import tiny_ar
from tarflowlm.data.tokenizer import ByteTokenizer
from tarflowlm.generation import Generation
from tarflowlm.generation.texts import Written
from tarflowlm.pretrained import Pretrained
from tarflowlm.terminal.texts import print_samples


def test_a_sample_gives_the_terminal_no_commands(capsys):
    tokens = torch.tensor([list(b"a\x1b[2Jb\rc\nd")])
    tokenizer = ByteTokenizer()
    texts = [tokenizer.decode(tokens[0].tolist())]
    lm = Pretrained(tiny_ar(vocab_size=256), tokenizer)
    print_samples(Written(range(1), texts, Generation(tokens), (), 1), lm)
    shown = capsys.readouterr().out
    assert "a\ufffd[2Jb\ufffdc" in shown
    assert "\x1b" not in shown
