"""A text on the terminal or in a pipe while it is written, up to the first of some stops."""

import codecs
import re
import sys
from collections.abc import Callable, Sequence

from torch import Tensor

from tarflowlm.data import Tokenizer

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
"""What a terminal may take for a command; not tabs and line ends."""


def printable(text: str) -> str:
    """The text for a terminal, which takes some characters for commands."""
    return _CONTROL.sub("\ufffd", text)


def write_out(piece: str) -> None:
    """A piece of text to stdout at once."""
    out = sys.stdout
    out.write(printable(piece) if out.isatty() else piece)
    out.flush()


def first_stop(text: str, stops: Sequence[str], start: int = 0) -> int:
    """Where the first of `stops` begins that is complete, at or after `start`; the length of the text without one."""
    found = [(at + len(stop), at) for stop in stops if (at := text.find(stop, start)) >= 0]
    return min(found, default=(0, len(text)))[1]


class TextStream:
    """Shows a text as its tokens come. What may be the beginning of a stop waits until it is known not to be one."""

    def __init__(
        self,
        show: Callable[[str], None],
        tokenizer: Tokenizer,
        stops: Sequence[str] = (),
        *,
        start: int = 0,
        shown: int = 0,
    ) -> None:
        """Stops count from character `start` on; the first `shown` characters are not shown."""
        self.show, self.stops, self.start, self.shown = show, stops, start, shown
        self.text, self.has_stopped = "", False
        self._bytes, self._decoder = tokenizer.token_bytes, codecs.getincrementaldecoder("utf-8")(errors="replace")

    def add(self, tokens: Tensor) -> None:
        """The next tokens [n] of the text."""
        if not self.has_stopped:
            self._extend(self._decoder.decode(b"".join(self._bytes[i] for i in tokens.tolist())))

    def close(self) -> str:
        """Show what still waits; the whole text, up to its stop."""
        if not self.has_stopped:
            self._extend(self._decoder.decode(b"", final=True), is_last=True)
        return self.text

    def _extend(self, piece: str, *, is_last: bool = False) -> None:
        self.text += piece
        # nothing before what was shown can belong to a stop
        at = first_stop(self.text, self.stops, max(self.start, self.shown))
        self.has_stopped = at < len(self.text)
        self.text = self.text[:at]
        ready = at if self.has_stopped or is_last else at - self._waiting()
        if ready > self.shown:
            self.show(self.text[self.shown : ready])
            self.shown = ready

    def _waiting(self) -> int:
        """Characters at the end of the text that may begin a stop."""
        longest = min(max(map(len, self.stops), default=0) - 1, len(self.text) - self.start)
        return next((n for n in range(longest, 0, -1) if any(s.startswith(self.text[-n:]) for s in self.stops)), 0)
