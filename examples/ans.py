"""Entropy coding for examples/compress.py: symbols onto a stack of bits, and off it."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

TOTAL = 1 << 32
"""The sum of the frequencies of all symbols. It is large, because nearly all of the thousand cells
or more of a Gaussian have the least frequency, and together they must stay improbable.
"""


class Table:
    """Integer frequencies of symbols, in proportion to `mass` [n] and each at least `least`."""

    def __init__(self, mass: npt.NDArray[np.float64], *, least: int = 1) -> None:
        free = TOTAL - least * len(mass)
        self.frequency = least + np.floor(mass * (free / mass.sum())).astype(np.int64)
        self.frequency[self.frequency.argmax()] += TOTAL - self.frequency.sum()
        self.start = np.concatenate(([0], self.frequency.cumsum()))


@dataclass
class Stack:
    """Bits as one integer, last in first out: asymmetric numeral systems (Duda 2013).

    `push` adds -log2 p bits for a symbol; `pop` draws a symbol from p by removing as many.
    """

    state: int

    def push(self, symbol: int, table: Table) -> None:
        turns, rest = divmod(self.state, int(table.frequency[symbol]))
        self.state = turns * TOTAL + int(table.start[symbol]) + rest

    def pop(self, table: Table) -> int:
        turns, place = divmod(self.state, TOTAL)
        symbol = int(table.start.searchsorted(place, side="right")) - 1
        self.state = turns * int(table.frequency[symbol]) + place - int(table.start[symbol])
        return symbol
