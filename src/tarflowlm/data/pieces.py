"""Long texts in pieces, cut where no tokenizer that we train or support joins across the cut."""

import re
from collections.abc import Iterator

# GPT-2-like pre-tokenizers attach a space to the word that follows it, and never join a letter to a space
# after it
_CUT = re.compile(r"(?<=[A-Za-z])(?= [A-Za-z])")


def text_pieces(text: str, size: int) -> Iterator[str]:
    """Consecutive pieces of `text` of about `size` characters, whose concatenation is `text`.

    Each piece but the last ends where a word ends and begins with the space before the next one; text without
    such places (say, Chinese) stays whole.
    """
    assert size > 0, size
    start = 0
    while len(text) - start > size:
        cut = _CUT.search(text, start + size)
        if cut is None:
            break
        yield text[start : cut.start()]
        start = cut.start()
    if start < len(text):
        yield text[start:] if start else text
