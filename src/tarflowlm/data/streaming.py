"""From tokens to text, as they come: characters come whole, and a text ends before its stop."""

import codecs
from collections.abc import Sequence

from torch import Tensor

from tarflowlm.data.tokenizer import Tokenizer


def first_stop(text: str, stops: Sequence[str], start: int = 0) -> int:
    """Where the first complete one of `stops` begins, from `start` on; else the text's length."""
    found = [(at + len(stop), at) for stop in stops if (at := text.find(stop, start)) >= 0]
    return min(found, default=(0, len(text)))[1]


class TextStream:
    """A text as its tokens come. What may begin a stop waits until it is known not to be one."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        stops: Sequence[str] = (),
        *,
        start: int = 0,
        end: int | None = None,
    ) -> None:
        """Stops count from character `start` on. The token `end` is a stop, too."""
        self.stops, self.start, self.end = stops, start, end
        self.text, self.has_stopped, self.has_ended = "", False, False
        self.shown = 0
        self.length = 0  # tokens read
        self._bytes = tokenizer.token_bytes
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def add(self, tokens: Tensor) -> str:
        """Read the next tokens [n]; returns the characters that have become certain."""
        if self.has_stopped:
            return ""
        places = tokens.tolist()
        if self.end in places:
            places = places[: places.index(self.end)]
            self.has_ended = True
        self.length += len(places)
        piece = self._extend(self._decoder.decode(b"".join(self._bytes[i] for i in places)))
        if self.has_ended:
            piece += self.close()
            self.has_stopped = True
        return piece

    def close(self) -> str:
        """The text has ended: returns what still waited."""
        if self.has_stopped:
            return ""
        return self._extend(self._decoder.decode(b"", final=True), is_last=True)

    def _extend(self, piece: str, *, is_last: bool = False) -> str:
        self.text += piece
        # nothing before what was shown can belong to a stop
        at = first_stop(self.text, self.stops, max(self.start, self.shown))
        self.has_stopped = at < len(self.text)
        self.text = self.text[:at]
        ready = at if self.has_stopped or is_last else at - self._waiting()
        found = self.text[self.shown : ready]
        self.shown = max(self.shown, ready)
        return found

    def _waiting(self) -> int:
        """Characters at the end of the text that may begin a stop."""
        longest = min(max(map(len, self.stops), default=0) - 1, len(self.text) - self.start)
        for count in range(longest, 0, -1):
            if any(stop.startswith(self.text[-count:]) for stop in self.stops):
                return count
        return 0
