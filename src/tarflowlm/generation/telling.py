"""Tokens told while a text is written: as soon as they are final, in order, each of them once."""

from collections.abc import Callable

import torch
from torch import Tensor

from tarflowlm.generation.sampling import BLANK

OnTokens = Callable[[Tensor], None]
"""Called with the next tokens [num, n] of all samples, on the CPU."""


class Telling:
    """What `on_tokens` has been told of a text, which is written in one window or several."""

    def __init__(self, on_tokens: OnTokens, given: Tensor) -> None:
        """`given` [num, T] holds the given tokens, BLANK elsewhere; those that begin all texts are told at once."""
        self.on_tokens, self.given = on_tokens, given
        self.start = self.told = 0
        """The first token of the present window, and of what has not been told."""
        self(int((given != BLANK).all(0).long().cumprod(0).sum()), lambda span: given[:, span])

    def __call__(self, final: int, tokens: Callable[[slice], Tensor]) -> None:
        """The first `final` tokens of the window are final; `tokens(span)` are those of a span of the window."""
        end = min(self.start + final, self.given.shape[1])
        if end <= self.told:
            return
        found = tokens(slice(self.told - self.start, end - self.start)).cpu()
        given = self.given[:, self.told : end]
        self.told = end
        self.on_tokens(torch.where(given == BLANK, found, given))
