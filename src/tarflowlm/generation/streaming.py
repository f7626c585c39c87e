"""What a caller of `generate` can watch: its progress, and tokens as they become final."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from tarflowlm.generation.sampling import BLANK
from tarflowlm.progress import SILENT, Progress


@dataclass(frozen=True)
class Watch:
    """Callbacks of `generate`. An exception that one of them raises ends the generation."""

    progress: Progress = SILENT
    """Advances once per position and block: `num_positions` times in all. Only `advance` is called."""
    on_tokens: Callable[[Tensor], bool | None] | None = None
    """Called with the next final tokens [num, n] of all samples, on the CPU, in order and each once; given tokens are
    among them. If it returns True, the text ends with the window that is being written."""


class TokenStream:
    """Passes the tokens of a text on to `Watch.on_tokens` as they become final."""

    def __init__(self, watch: Watch, given: Tensor) -> None:
        """`given` [num, T] holds the given tokens, BLANK elsewhere; those that begin all texts are sent at once."""
        self.on_tokens, self.given = watch.on_tokens, given
        self.start = self.sent = 0
        """The first token of the present window, and the first that has not been sent."""
        self.has_ended = False
        self.send(int((given != BLANK).all(0).long().cumprod(0).sum()), lambda span: given[:, span])

    def send(self, final: int, tokens: Callable[[slice], Tensor]) -> None:
        """The first `final` tokens of the window are final; `tokens(span)` are those of a span of the window."""
        end = min(self.start + final, self.given.shape[1])
        if self.on_tokens is None or end <= self.sent:
            return
        found, given = tokens(slice(self.sent - self.start, end - self.start)).cpu(), self.given[:, self.sent : end]
        self.sent = end
        self.has_ended |= bool(self.on_tokens(torch.where(given == BLANK, found, given)))
