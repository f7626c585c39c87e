"""Rules that a drawn text keeps: which token may come next, and whether the whole text fits.

Candidates are weighted by the probability of the tokens that may come, so a rule also acts on what
was drawn before. A text that does not fit has no weight.
"""

import math
from abc import ABC, abstractmethod
from bisect import bisect_left
from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import groupby
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tarflowlm.data import Tokenizer
from tarflowlm.data.counting import Count, words_pattern
from tarflowlm.data.prompts import tokens_after_word
from tarflowlm.errors import UserError, check_package

Mask = Tensor | NDArray[Any]
"""True for the tokens [V] that may be drawn."""


class Rule(ABC):
    """What a text keeps. Its tokens [n] come without hidden context; given ones are `is_given`."""

    @abstractmethod
    def mask(self, text: Tensor, is_given: Tensor) -> Tensor | None:
        """The tokens [V] that may come next; None for all."""

    def goes_on(self, text: Tensor, is_given: Tensor) -> bool:
        """Whether a text fits so far, of which a given piece has just been written."""
        return self.fits(text, is_given)

    def fits(self, text: Tensor, is_given: Tensor) -> bool:
        """Whether a whole text fits."""
        return True

    def is_over(self, text: Tensor, is_given: Tensor) -> bool:
        """Whether a text is over, whatever follows: then it is shown to here."""
        return False


class Own(Rule):
    """A mask, or a function of a user from the tokens so far to a mask."""

    def __init__(self, allowed: Mask | Callable[[Tensor], Mask], vocab_size: int) -> None:
        self.allowed, self.vocab_size = allowed, vocab_size

    def mask(self, text: Tensor, is_given: Tensor) -> Tensor:
        mask = self.allowed(text) if callable(self.allowed) else self.allowed
        return checked_mask(mask, self.vocab_size)


class Forbidden(Rule):
    """No drawn token completes one of the words, small or capital, as a whole word."""

    def __init__(self, tokenizer: Tokenizer, words: Sequence[str]) -> None:
        self.tokenizer = tokenizer
        self.words = words_pattern(words)
        # a token is at least one character
        self.longest = max(map(len, words)) + 1
        after = tokens_after_word(tokenizer)
        self.goes_on_word = None if after is None else ~after

    def mask(self, text: Tensor, is_given: Tensor) -> Tensor | None:
        """A word that ends here has to go on."""
        ends = self._forbidden(text[-self.longest :], is_given[-self.longest :], at_end=True)
        return self.goes_on_word if ends else None

    def fits(self, text: Tensor, is_given: Tensor) -> bool:
        return not self._forbidden(text, is_given)

    def _forbidden(self, text: Tensor, is_given: Tensor, *, at_end: bool = False) -> bool:
        """Whether one of the words, at the end or anywhere, is not wholly given."""
        shown, drawn = "", ""
        for given, run in groupby(
            zip(text.tolist(), is_given.tolist(), strict=True), key=lambda one: one[1]
        ):
            piece = self.tokenizer.decode([token for token, _ in run])
            shown += piece
            drawn += ("-" if given else "+") * len(piece)
        return any(
            "+" in drawn[found.start() : found.end()]
            for found in self.words.finditer(shown)
            if not at_end or found.end() == len(shown)
        )


class Enough(Rule):
    """A number of sentences or words: given words come before they are full."""

    def __init__(self, tokenizer: Tokenizer, count: Count) -> None:
        self.tokenizer, self.count = tokenizer, count

    def mask(self, text: Tensor, is_given: Tensor) -> None:
        return None

    def goes_on(self, text: Tensor, is_given: Tensor) -> bool:
        return not self.is_over(text, is_given)

    def fits(self, text: Tensor, is_given: Tensor) -> bool:
        return self.count.end(self.tokenizer.decode(text), is_whole=True) is not None

    def is_over(self, text: Tensor, is_given: Tensor) -> bool:
        return self.count.end(self.tokenizer.decode(text), is_whole=False) is not None


class Matching(Rule):
    """A regular expression matches what is drawn after a prompt (llguidance tells the tokens)."""

    def __init__(self, tokenizer: Tokenizer, pattern: str, *, after_space: bool = False) -> None:
        """The first token brings a space that was left to it `after_space`.

        UserError for a wrong pattern, and without the package.
        """
        check_package("llguidance", "matches", "--matches")
        from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper

        self.vocab_size = tokenizer.vocab_size
        self.start = LLMatcher(
            LLTokenizer(TokenizerWrapper(_Vocabulary(tokenizer))),
            LLMatcher.grammar_from_regex(rf" (?:{pattern})" if after_space else pattern),
            log_level=0,
        )
        if self.start.is_error():
            _, *reasons = self.start.get_error().split("error: ")
            reason = " ".join(reasons[-1].splitlines()[0].split()) if reasons else "cannot be read"
            raise UserError(f"matches {pattern!r:.80}: {reason:.100}; give a regular expression")
        self.after: dict[tuple[int, ...], Any] = {(): self.start}
        """The matcher after tokens that were drawn."""

    def mask(self, text: Tensor, is_given: Tensor) -> Tensor:
        matcher = self._matcher(text, is_given)
        bits = np.frombuffer(matcher.compute_bitmask(), np.uint8)
        mask = torch.from_numpy(np.unpackbits(bits, bitorder="little")[: self.vocab_size])
        return mask.bool()

    def fits(self, text: Tensor, is_given: Tensor) -> bool:
        matcher = self._matcher(text, is_given)
        return matcher.is_accepting() and not matcher.is_error()

    def is_over(self, text: Tensor, is_given: Tensor) -> bool:
        matcher = self._matcher(text, is_given)
        return matcher.is_stopped() and not matcher.is_error()

    def _matcher(self, text: Tensor, is_given: Tensor) -> Any:
        drawn = tuple(text[~is_given].tolist())
        # candidates share their beginnings, and the longest known one is mostly a token shorter
        known = next(n for n in range(len(drawn), -1, -1) if drawn[:n] in self.after)
        for n in range(known, len(drawn)):
            matcher = self.after[drawn[:n]].deep_copy()
            if not matcher.is_stopped():
                matcher.consume_token(drawn[n])
            self.after[drawn[: n + 1]] = matcher
        return self.after[drawn]


class _Vocabulary:
    """The tokens of a tokenizer, and one for the end, as llguidance reads them."""

    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.encode = tokenizer.encode
        self.tokens = [*tokenizer.token_bytes]
        end = len(self.tokens) if tokenizer.end is None else tokenizer.end
        self.tokens[end : end + 1] = [b"\xff<end>"]
        self.eos_token_id = end
        self.special_token_ids = [end]

    def __call__(self, text: bytes) -> list[int]:
        """The tokens of a text that must come; none for one that cannot."""
        with suppress(UserError, UnicodeDecodeError):
            return self.encode(text.decode()).tolist()
        return []


class Rules:
    """All rules of a plan, on texts [n, t] of which tokens are given or drawn."""

    def __init__(self, rules: Sequence[Rule], end: int | None) -> None:
        """A text is over after it has drawn the token `end`, and where a rule says so."""
        self.rules, self.end = rules, end

    def mask(self, texts: Tensor, is_given: Tensor) -> Tensor:
        """The tokens that may come next, [n, V] or [n, 1]; all of them after a text is over."""
        free = torch.ones(1, dtype=torch.bool)
        found = []
        for text, given in zip(texts, is_given, strict=True):
            is_over = self._is_over(text, given)
            masks = [] if is_over else [rule.mask(text, given) for rule in self.rules]
            found.append(math.prod((one for one in masks if one is not None), start=free))
        return torch.stack(torch.broadcast_tensors(*found))

    def are_over(self, texts: Tensor, is_given: Tensor) -> Tensor:
        """Which texts are over, [n]."""
        return torch.tensor([self._is_over(*one) for one in zip(texts, is_given, strict=True)])

    def go_on(self, texts: Tensor, is_given: Tensor) -> Tensor:
        """Which texts fit so far, [n], when a given piece has just been written."""
        every = zip(texts, is_given, strict=True)
        return torch.tensor([all(rule.goes_on(*one) for rule in self.rules) for one in every])

    def whole(self, texts: Tensor, is_given: Tensor) -> tuple[Tensor, Tensor]:
        """How many tokens of each text are shown, and whether it fits, both [n]."""
        lengths, fits = [], []
        for text, given in zip(texts, is_given, strict=True):
            places = range(len(text))
            length = bisect_left(places, True, key=lambda n: self._is_over(text[:n], given[:n]))
            lengths.append(length)
            # the end of a document is no text
            cut = length - (length > 0 and bool(self._ends(text[:length], given[:length])[-1]))
            fits.append(all(rule.fits(text[:cut], given[:cut]) for rule in self.rules))
        return torch.tensor(lengths), torch.tensor(fits)

    def _is_over(self, text: Tensor, is_given: Tensor) -> bool:
        has_ended = bool(self._ends(text, is_given).any())
        return has_ended or any(rule.is_over(text, is_given) for rule in self.rules)

    def _ends(self, text: Tensor, is_given: Tensor) -> Tensor:
        return torch.zeros(len(text)).bool() if self.end is None else (text == self.end) & ~is_given


def checked_mask(mask: object, vocab_size: int) -> Tensor:
    """A boolean tensor or array [V] as a tensor. UserError for anything else."""
    if isinstance(mask, np.ndarray) and mask.dtype == bool:
        mask = torch.tensor(mask)
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.shape != (vocab_size,):
        raise UserError(f"allowed {mask!r:.60}: give a boolean mask of shape [{vocab_size}]")
    return mask.cpu()
