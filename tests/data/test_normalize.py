"""Texts become text8 as in the reference."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tarflowlm.data import TEXT8_ALPHABET, normalize_text8

NAMES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
DIGITS = str.maketrans({str(i): f" {word} " for i, word in enumerate(NAMES)})
UPPER = str.maketrans("ABCDEFGHIJKLMNOPQRSTUVWXYZ", "abcdefghijklmnopqrstuvwxyz")


def reference(text: str) -> str:
    text = text.replace("<|endoftext|>", " ").translate(UPPER).translate(DIGITS)
    return " " + re.sub("[^a-z]+", " ", text).strip()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", " "),
        (" \n\t.", " "),
        ("in 1984,", " in one nine eight four"),
        ("naïve Ünder", " na ve nder"),
        ("a<|endoftext|>b", " a b"),
        ("x\ud800y \x00 \x0b\U0001f600z", " x y z"),
        ("\u0130\u212a", " "),  # str.lower() would turn these into an ASCII i and k
    ],
)
def test_text8_examples(text, expected):
    assert normalize_text8(text) == expected


@settings(derandomize=True, max_examples=200, deadline=None)
@given(st.text(st.one_of(st.characters(), st.sampled_from("aZ 09.\n<|endoftext|>")), max_size=60))
def test_text8_equals_the_two_line_reference_and_is_idempotent(text):
    result = normalize_text8(text)
    assert result == reference(text)
    assert normalize_text8(result) == result
    assert set(result) <= set(TEXT8_ALPHABET)
