"""Words and sentences are counted as a reader does."""

import pytest
import torch

from tarflowlm.data import ByteTokenizer
from tarflowlm.data.counting import Count, words_pattern
from tarflowlm.data.prompts import TextStream

SENTENCES = [
    ("One. Two", ["One."]),
    ('"Who is it?" said the fox. He ran', ['"Who is it?" said the fox.']),
    ('"Who is it?" The fox ran', ['"Who is it?"']),
    ("Mr. Fox met Mrs. Wolf at 3.5. They", ["Mr. Fox met Mrs. Wolf at 3.5."]),
    ("Well... Then", ["Well..."]),
    ("No end", []),
]


@pytest.mark.parametrize(("text", "sentences"), SENTENCES)
def test_a_sentence_ends_before_a_capital(text, sentences):
    ends = Count("sentences", 1).ends(text, is_whole=False)
    starts = [0, *ends]
    assert [text[a:b].strip() for a, b in zip(starts, ends, strict=False)] == sentences


def test_the_end_of_a_text_ends_a_sentence_and_a_word():
    count = Count("sentences", 2)
    assert count.end("One. Two.", is_whole=False) is None
    assert count.end("One. Two.", is_whole=True) == 9
    assert Count("words", 2).end("one - two", is_whole=False) is None
    assert Count("words", 2).end("one - two", is_whole=True) == 9
    assert Count("sentences", 1, has_capitals=False).end("one. two", is_whole=False) == 4


def test_a_stream_shows_no_more_than_its_count():
    text = 'A fox, it ran.\n\nSo "there"! Then it'
    for unit, number, shown in (
        ("words", 2, "A fox,"),
        ("words", 4, "A fox, it ran."),
        ("sentences", 1, "A fox, it ran."),
        ("sentences", 2, 'A fox, it ran.\n\nSo "there"!'),
    ):
        stream = TextStream(ByteTokenizer(), count=Count(unit, number))
        pieces = [stream.add(torch.tensor([byte])) for byte in text.encode()]
        assert stream.has_stopped
        assert "".join(pieces) == stream.text == shown


def test_words_are_found_whole_in_either_case():
    pattern = words_pattern(["old king", "a.b"])
    assert pattern.search("An OLD\nKing, ")
    assert pattern.search("an a.b")
    assert not pattern.search("an old kingdom, aab")
