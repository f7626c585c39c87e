"""What is done to a text before it is encoded: its lines are joined, or it becomes text8."""

import re
from itertools import pairwise
from typing import Any

from tarflowlm.config import TEXT8_ALPHABET

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_LETTERS_OR_SPACE = bytes(code if chr(code) in TEXT8_ALPHABET else ord(" ") for code in range(256))


def normalize_text8(text: str) -> str:
    """Text in the TEXT8 alphabet, as `wikifil.pl` writes it (Mahoney 2006); idempotent.

    ASCII upper case becomes lower case and each digit its English name between spaces. Everything
    else that is not `a`-`z`, `<|endoftext|>` included, becomes a space, and runs of spaces one
    space. The result begins with one space and has none at its end; a text without letters or
    digits gives `" "`.
    """
    # on bytes, whose methods are fast; other characters than ASCII become "?", and later a space
    data = text.encode("ascii", errors="replace").replace(b"<|endoftext|>", b" ").lower()
    for digit, name in enumerate(DIGITS):
        data = data.replace(str(digit).encode(), f" {name} ".encode())
    return " " + b" ".join(data.translate(_LETTERS_OR_SPACE).split()).decode("ascii")


TEXT8_NORMALIZER: dict[str, Any] = {
    "type": "Sequence",
    "normalizers": [
        {"type": "Replace", "pattern": {"String": "<|endoftext|>"}, "content": " "},
        # first, since the lower case of some other letters is in a-z
        {"type": "Replace", "pattern": {"Regex": "[^\\x00-\\x7f]"}, "content": " "},
        {"type": "Lowercase"},
        *(
            {"type": "Replace", "pattern": {"String": str(digit)}, "content": f" {name} "}
            for digit, name in enumerate(DIGITS)
        ),
        {"type": "Replace", "pattern": {"Regex": "[^a-z]+"}, "content": " "},
        {"type": "Strip", "strip_left": True, "strip_right": True},
        {"type": "Prepend", "prepend": " "},
    ],
}
"""`normalize_text8` in the library's terms; in a tokenizer.json it also tells ours to normalise."""


def unwrapped(text: str) -> str:
    """A text with the lines of every paragraph joined by a space, or by nothing after a hyphen.

    A paragraph ends before a line that is empty or indented.
    """
    joined = re.sub(r"(?<=\S)(?<!-)[ \t]*\n(?=\S)", " ", text)
    return re.sub(r"(?<=-)\n(?=\S)", "", joined)


def is_wrapped(text: str) -> bool:
    """Whether the lines of a text end where the next word would have made them too long."""
    lines = text.split("\n")
    width = sorted(map(len, lines))[len(lines) * 9 // 10]
    inner = [
        len(line) + 1 + len(following.split()[0]) > width - 4
        for line, following in pairwise(lines)
        if " " in line.strip() and following[:1].strip()
    ]
    is_full = len(inner) > max(50, len(lines) / 3) and sum(inner) > 0.8 * len(inner)
    return 40 <= width <= 100 and is_full
