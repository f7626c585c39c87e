"""Words and sentences of a text."""

import re
from collections.abc import Sequence

from tarflowlm.config import Unit

NO_END = re.compile(r"\b(?:Mr|Mrs|Dr|St)\.\Z")
"""Full stops that end no sentence."""


class Count:
    """So many sentences or words.

    A word is a run of characters other than white space, with a letter or digit in it. A sentence
    ends with . ! ? or … and what closes a quotation, before white space and no small letter.
    """

    def __init__(self, unit: Unit, number: int, *, has_capitals: bool = True) -> None:
        """Without capitals a sentence ends before small letters, too."""
        self.unit, self.number = unit, number
        word = r"(?<!\S)\S*\w\S*"
        mark = r"[.!?…]+[\"'”’»)\]]*"
        follows = r"(?=\s+[^\sa-zß-ÿ])" if has_capitals else r"(?=\s+\S)"
        patterns = {
            "sentences": (mark + follows, rf"{mark}(?:{follows}|(?=\s*\Z))"),
            "words": (rf"{word}(?=\s)", word),
        }[unit]
        self.so_far, self.whole = map(re.compile, patterns)

    def ends(self, text: str, *, is_whole: bool) -> list[int]:
        """Where they end: those that what follows shows to be over, or in a whole text all."""
        pattern = self.whole if is_whole else self.so_far
        found = [one.end() for one in pattern.finditer(text)]
        if self.unit == "sentences":
            found = [end for end in found if not NO_END.search(text, max(0, end - 4), end)]
        return found

    def end(self, text: str, *, is_whole: bool) -> int | None:
        """Where a text with this number ends; None if there are fewer."""
        found = self.ends(text, is_whole=is_whole)
        return found[self.number - 1] if len(found) >= self.number else None


def words_pattern(words: Sequence[str]) -> re.Pattern[str]:
    """A pattern of any of the words as whole words, small or capital."""
    several = (r"\s+".join(map(re.escape, one.split())) for one in words)
    return re.compile(rf"(?<!\w)(?:{'|'.join(several)})(?!\w)", re.IGNORECASE)
