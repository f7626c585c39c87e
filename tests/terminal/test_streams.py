"""Texts shown while they are written: all of them, nothing of a stop, and no half of a
character.
"""

import io

import pytest
import torch
from rich.console import Console

from tarflowlm.data.tokenizer import ByteTokenizer
from tarflowlm.generation import Generation
from tarflowlm.terminal.texts import TextStream, first_stop, print_samples


def streamed(
    text: str, stops: tuple[str, ...] = (), *, start: int = 0, shown: int = 0
) -> tuple[str, TextStream]:
    """The shown part of a text that comes byte by byte."""
    pieces: list[str] = []
    stream = TextStream(pieces.append, ByteTokenizer(), stops, start=start, shown=shown)
    for token in text.encode():
        stream.add(torch.tensor([token]))
    stream.close()
    return "".join(pieces), stream


@pytest.mark.parametrize(
    ("stops", "start", "expected"),
    [
        ((), 0, "one two two three"),
        (("tw",), 0, "one "),
        (("two t", "three"), 0, "one "),
        (("two three", "thr"), 0, "one two two "),
        (("two tw", "wo t"), 0, "one t"),
        (("hree", " three"), 0, "one two two"),
        (("threes",), 0, "one two two three"),
        (("one",), 1, "one two two three"),
        (("two",), 5, "one two "),
        (("ttwo", "twotwo"), 0, "one two two three"),
    ],
)
def test_a_text_ends_before_the_first_stop_after_its_start(stops, start, expected):
    shown, stream = streamed("one two two three", stops, start=start)
    assert shown == stream.text == expected
    assert stream.has_stopped == (expected != "one two two three")
    assert first_stop("one two two three", stops, start) == len(expected)


def test_text_that_cannot_begin_a_stop_is_shown_at_once():
    pieces: list[str] = []
    stream = TextStream(pieces.append, ByteTokenizer(), ["abc"])
    for token in b"xabxab":
        stream.add(torch.tensor([token]))
    assert pieces == ["x", "abx"]
    assert stream.close() == "xabxab"


def test_characters_come_whole():
    shown, stream = streamed("née ☃", shown=2)
    assert (shown, stream.text) == ("e ☃", "née ☃")
    pieces: list[str] = []
    stream = TextStream(pieces.append, ByteTokenizer())
    stream.add(torch.tensor(list("a☃".encode()[:-1])))
    assert pieces == ["a"]
    assert stream.close() == "a\ufffd"


def test_a_sample_gives_the_terminal_no_commands():
    out = io.StringIO()
    tokens = torch.tensor([list(b"a\x1b[2Jb\rc\nd")])
    print_samples(Console(file=out, width=40), Generation(tokens), ByteTokenizer())
    assert "a\ufffd[2Jb\ufffdc" in out.getvalue()
    assert "\x1b" not in out.getvalue()
