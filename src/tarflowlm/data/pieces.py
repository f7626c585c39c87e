"""Long texts in pieces, cut where no tokenizer that we train or support joins across the cut."""

import re
from collections.abc import Iterable, Iterator

# between a letter or digit and the one space or line end before the next: GPT-2-like pre-tokenizers attach a space
# to the word that follows it, never join a letter to a space after it, and keep such a line end to itself
_CUT = re.compile(r"(?<=[^\W_])(?=[ \n][^\W_])")
_LONGEST = 16
"""Pieces of this many times the size that was asked for are cut anywhere: memory must not depend on the text."""


def text_pieces(text: str, size: int) -> Iterator[str]:
    """As `pieces_of`, for one text."""
    return pieces_of([text], size)


def pieces_of(blocks: Iterable[str], size: int) -> Iterator[str]:
    """Consecutive pieces of about `size` characters of the text that `blocks` add up to.

    Where they are cut depends on the text and `size` alone, not on the blocks. Each piece but the last ends where a
    word ends and begins with the space or line end before the next one, unless there is no such place for
    `16 * size` characters.
    """
    assert size > 0, size
    buffer, searched = "", size
    for block in blocks:
        buffer += block
        start = 0
        while len(buffer) - start > size:
            match = _CUT.search(buffer, searched, start + _LONGEST * size + 2)
            if match is not None:
                cut = match.start()
            elif len(buffer) - start > _LONGEST * size + 2:
                cut = start + _LONGEST * size
            else:
                searched = max(searched, len(buffer) - 2)
                break
            yield buffer[start:cut]
            start, searched = cut, cut + size
        buffer, searched = buffer[start:], searched - start
    if buffer:
        yield buffer
