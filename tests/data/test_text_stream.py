"""Texts shown while they are written: nothing of a stop, and no half of a character."""

import pytest
import torch

from tarflowlm.data.library import ByteTokenizer
from tarflowlm.data.prompts import TextStream


def streamed(text: str, stops: tuple[str, ...] = (), *, start: int = 0) -> tuple[str, TextStream]:
    """The shown part of a text that comes byte by byte."""
    stream = TextStream(ByteTokenizer(), stops, start=start)
    pieces = [stream.add(torch.tensor([token])) for token in text.encode()]
    return "".join([*pieces, stream.close()]), stream


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


def test_text_that_cannot_begin_a_stop_is_shown_at_once():
    stream = TextStream(ByteTokenizer(), ["abc"])
    pieces = [stream.add(torch.tensor([token])) for token in b"xabxab"]
    assert pieces == ["x", "", "", "abx", "", ""]
    assert stream.close() == "ab"
    assert stream.text == "xabxab"


def test_characters_come_whole():
    shown, stream = streamed("née ☃")
    assert shown == stream.text == "née ☃"
    stream = TextStream(ByteTokenizer())
    assert stream.add(torch.tensor(list("a☃".encode()[:-1]))) == "a"
    assert stream.close() == "\ufffd"
