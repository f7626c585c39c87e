"""Requests of visitors: checks of their values, as the page can be called with any, and work on a
thread.
"""

import threading
import time
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, wait
from contextlib import suppress
from typing import Any, Generic, TypeVar

import torch

from tarflowlm.data import Tokenizer
from tarflowlm.data.prompts import Reading, read, read_template
from tarflowlm.device import threads_for
from tarflowlm.errors import UserError
from tarflowlm.progress import Silent

R = TypeVar("R")

CHARACTERS, TOKENS, SAMPLES, PARTICLES = 4000, 1024, 4, 64
"""The most that one request may ask for: characters of a text, tokens of a sample, samples,
particles.
"""
MARK = "_"  # stands for one token to fill in


def number(value: Any, name: str, least: int | float, most: int | float) -> float:
    """A number within bounds; a whole number if both bounds are."""
    is_number = (
        isinstance(value, int | float) and not isinstance(value, bool) and least <= value <= most
    )
    is_whole = isinstance(least, int) and isinstance(most, int)
    if not is_number or (is_whole and value != int(value)):
        raise UserError(f"{name}: give a {'whole ' * is_whole}number from {least:,} to {most:,}")
    return float(value)


def whole(value: Any, name: str, least: int, most: int) -> int:
    return int(number(value, name, least, most))


def seed(value: Any) -> int:
    return whole(value, "seed", 0, 2**31)


def generator(value: Any) -> torch.Generator:
    return torch.Generator().manual_seed(seed(value))


def choice(value: Any, allowed: tuple[str, ...]) -> str:
    """One of the allowed words: the first one in place of any other value."""
    return value if value in allowed else allowed[0]


def text(value: Any, name: str) -> str:
    """A text that is not too long; empty for None."""
    if not isinstance(value, str | None) or len(value or "") > CHARACTERS:
        raise UserError(f"{name}: give a text of at most {CHARACTERS:,} characters")
    return value or ""


def from_address(asked: dict[str, str], usual: Sequence[Any], models: Sequence[str]) -> list[Any]:
    """The values of a request to write, as the link above its result names them; the usual ones for
    all others.
    """
    names = ("model", "text", "length", "temperature", "top_p", "num", "seed")
    found = dict(zip(names, usual, strict=True))
    found["text"] = text(asked.get("text", found["text"]), "text")
    found["model"] = choice(asked.get("model"), (found["model"], *models))
    for name in names[2:]:
        kind = float if name in ("temperature", "top_p") else int
        with suppress(ValueError):
            found[name] = kind(asked.get(name, found[name]))
    return list(found.values())


def reading(tokenizer: Tokenizer, value: Any, name: str = "text") -> Reading:
    """A text that is not empty, as the model reads it."""
    return read(tokenizer, text(value, name), name=name)


def num_characters(tokenizer: Tokenizer, tokens: torch.Tensor) -> int:
    """The characters of a text [T], and at least 1."""
    return max(int(tokenizer.characters_per_token[tokens.numpy()].sum()), 1)


def template(tokenizer: Tokenizer, value: Any) -> Reading:
    """A text with a blank for every mark; without any, a text to be continued."""
    found = text(value, "text")
    return (
        read_template(tokenizer, found, MARK)
        if MARK in found
        else read(tokenizer, found, goes_on=True)
    )


SECONDS, EVERY = (
    60.0,
    0.12,
)  # seconds that a piece of work may take at most, and between two looks at it
_TURN = threading.Lock()  # held while a model works: two at once would only slow each other down


class Halted(Exception):
    """Raised in the work once the visitor has left."""


class Job(Silent, Generic[R]):
    """A function on `rows` texts, run on a thread with the job as its `Progress`; it can be stopped
    wherever it advances.
    """

    def __init__(
        self, function: Callable[["Job[R]"], R], rows: int = 1, *, seconds: float = SECONDS
    ) -> None:
        self.function, self.rows, self.limit = function, rows, seconds
        # the final tokens so far, [num, n] each, and the seconds of the finished work
        self.tokens: list[torch.Tensor] = []
        self.advanced, self.seconds = 0, 0.0
        self._is_wanted, self._begun = True, 0.0

    def advance(self, count: int = 1) -> None:
        """Count progress. Raises Halted once the visitor has left, UserError when the time is
        over.
        """
        self.advanced += count
        if not self._is_wanted:
            raise Halted
        if time.perf_counter() - self._begun > self.limit:
            limit = f"{self.limit:g} seconds, the limit of this page"
            raise UserError(f"stopped after {limit}: ask for fewer tokens, samples or particles")

    def doing(self, words: str) -> str:
        """`words`, or that another visitor has the turn."""
        return words if self.advanced else "waiting for its turn"

    def follow(self, show: Callable[[], str]) -> Generator[str, None, R]:
        """Start the work; what `show` gives now and then until it is done. Returns its result,
        raises what it raised. Closing the iterator, as when a visitor leaves, ends the work where
        it advances next.
        """
        future = Future[R]()
        threading.Thread(target=self._run, args=(future,), daemon=True).start()
        try:
            while not future.done():
                yield show()
                wait([future], EVERY)
        finally:
            self._is_wanted = False
        return future.result()

    def _run(self, future: Future[R]) -> None:
        try:
            with _TURN, threads_for(self.rows):
                torch.set_flush_denormal(True)  # a property of the thread, as in the command line
                self._begun = time.perf_counter()
                self.advance(0)
                result = self.function(self)
                self.seconds = time.perf_counter() - self._begun
            future.set_result(result)
        except BaseException as error:
            future.set_exception(error)
