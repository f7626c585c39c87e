"""Permutations that need no memory, for texts of any size."""

from math import isqrt

import numpy as np
import numpy.typing as npt

Words = npt.NDArray[np.uint64]


class Permutation:
    """A Feistel network over 0 .. size - 1.

    With the least a such that a^2 >= size, a place is l a + r, and each of six random keys k maps
    (l, r) to (r, (l + hash(r, k)) mod a): a permutation of 0 .. a^2 - 1. What it maps beyond
    `size`, at most 2 a places, it maps again.
    """

    def __init__(self, size: int, generator: np.random.Generator) -> None:
        self._size = size
        self._keys = generator.integers(1 << 64, size=6, dtype=np.uint64) | np.uint64(1)

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, places: slice) -> npt.NDArray[np.int64]:
        """The images of consecutive places."""
        words = np.arange(*places.indices(self._size), dtype=np.uint64)
        return self._mapped(words).astype(np.int64)

    def _mapped(self, places: Words) -> Words:
        side = np.uint64(isqrt(self._size - 1) + 1)
        half = np.uint64(32)
        left, right = np.divmod(places, side)
        for key in self._keys:
            word = key * (right + key)
            word = key * (word ^ (word >> half))
            left, right = right, (left + (word >> half)) % side
        images = left * side + right
        is_beyond = images >= self._size
        if is_beyond.any():
            images[is_beyond] = self._mapped(images[is_beyond])
        return images
