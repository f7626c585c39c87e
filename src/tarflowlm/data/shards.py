"""Token arrays on disk: little-endian shards of equal length, how they are written, and one view over them."""

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np
import numpy.typing as npt

from tarflowlm.errors import UserError

Array = npt.NDArray[Any]


class TokenArray:
    """A read-only 1-d view of tokens stored in several parts, memory-mapped or in memory.

    All parts but the last have the same length. Slices within one part are views; everything else is copied.
    `numpy.asarray(tokens)` gives one array.
    """

    def __init__(self, parts: Sequence[Array]) -> None:
        assert parts, "a token array has at least one part"
        assert all(len(part) == len(parts[0]) for part in parts[:-1])
        # plain views: indexing an np.memmap spends most of its time building np.memmap results
        self._parts = [np.asarray(part) for part in parts]
        self._part_length = max(1, len(parts[0]))
        self._length = sum(len(part) for part in parts)

    @classmethod
    def of(cls, tokens: "TokenArray | Array") -> "TokenArray":
        """`tokens` itself, or a view of a 1-d array."""
        if isinstance(tokens, TokenArray):
            return tokens
        assert tokens.ndim == 1, tokens.shape
        return cls([tokens])

    @property
    def dtype(self) -> np.dtype[Any]:
        """The storage type (uint8, uint16 or uint32 for shards)."""
        return self._parts[0].dtype

    def __len__(self) -> int:
        return self._length

    @overload
    def __getitem__(self, index: int) -> int: ...
    @overload
    def __getitem__(self, index: slice | Array) -> Array: ...
    def __getitem__(self, index: int | slice | Array) -> int | Array:
        if isinstance(index, slice):
            return self._slice(index)
        if isinstance(index, np.ndarray):
            return self._take(index)
        position = int(index)
        if not -len(self) <= position < len(self):
            raise IndexError(f"token {position} of {len(self)}")
        part, offset = divmod(position % len(self), self._part_length)
        return int(self._parts[part][offset])

    def windows(self, starts: Array, length: int) -> Array:
        """[N, length]: the tokens `start .. start + length - 1` for each of `starts` [N]."""
        return self._take(starts[:, None] + np.arange(length))

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Array:
        whole = self._parts[0] if len(self._parts) == 1 else np.concatenate(self._parts)
        return np.array(whole, dtype=dtype, copy=copy)

    def _slice(self, index: slice) -> Array:
        start, stop, step = index.indices(len(self))
        if step != 1:
            return self._take(np.arange(start, stop, step))
        if start >= stop:
            return self._parts[0][:0]
        first, last = start // self._part_length, (stop - 1) // self._part_length
        pieces = [
            self._parts[i][max(0, start - i * self._part_length) : stop - i * self._part_length]
            for i in range(first, last + 1)
        ]
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)

    def _take(self, positions: Array) -> Array:
        if len(self._parts) == 1:
            return self._parts[0][positions]
        if positions.size and not 0 <= positions.min() <= positions.max() < len(self):
            raise IndexError(f"positions {positions.min()} .. {positions.max()} of {len(self)} tokens")
        part_of, offsets = np.divmod(positions, self._part_length)
        result = np.empty(positions.shape, dtype=self.dtype)
        for part in np.unique(part_of):
            here = part_of == part
            result[here] = self._parts[part][offsets[here]]
        return result


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """The smallest little-endian unsigned type that holds `vocab_size` ids."""
    if vocab_size <= 1 << 8:
        return np.dtype("u1")
    return np.dtype("<u2") if vocab_size <= 1 << 16 else np.dtype("<u4")


class ShardWriter:
    """Writes a stream of tokens as `<stem>-00000.bin`, `<stem>-00001.bin`, ..., of `shard_tokens` tokens each.

    At least one file is written, an empty one for no tokens. Use as a context manager; `shards` then lists the files
    and their tokens. Given the `shards` of an earlier writer as of its last `sync`, it continues from there;
    UserError if its files have lost some of their bytes.
    """

    def __init__(
        self,
        folder: Path,
        stem: str,
        dtype: np.dtype[Any],
        shard_tokens: int,
        shards: Sequence[dict[str, Any]] = (),
    ) -> None:
        assert shard_tokens > 0, shard_tokens
        self._folder, self._stem, self._dtype, self._shard_tokens = folder, stem, dtype, shard_tokens
        self.shards: list[dict[str, Any]] = [dict(shard) for shard in shards]
        """For each file its name ("file"), "tokens", and, once it is complete, "sha256"."""
        if self.shards:
            self._reopen_last()
        else:
            self._open_next()

    def write(self, tokens: Array) -> None:
        """Append `tokens` [N]: ids below the vocabulary size that `dtype` was chosen for."""
        data = tokens.astype(self._dtype)
        while len(data):
            room = self._shard_tokens - self.shards[-1]["tokens"]
            if room == 0:
                self._close()
                self._open_next()
                continue
            block = data[:room].tobytes()
            self._file.write(block)
            self._digest.update(block)
            self.shards[-1]["tokens"] += len(data[:room])
            data = data[room:]

    def sync(self) -> None:
        """Return once all tokens are on disk."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def _reopen_last(self) -> None:
        sizes = [shard["tokens"] * self._dtype.itemsize for shard in self.shards]
        paths = [self._folder / shard["file"] for shard in self.shards]
        for path, size in zip(paths, sizes, strict=True):
            if not path.is_file() or path.stat().st_size < size:
                raise UserError(f"{path} lost some of its {size:,} bytes: remove {self._folder} and prepare again")
        os.truncate(paths[-1], sizes[-1])
        self._digest = hashlib.sha256(paths[-1].read_bytes())
        self._file = paths[-1].open("ab")

    def _open_next(self) -> None:
        name = f"{self._stem}-{len(self.shards):05d}.bin"
        self._file = (self._folder / name).open("wb")
        self._digest = hashlib.sha256()
        self.shards.append({"file": name, "tokens": 0})

    def _close(self) -> None:
        self.sync()
        self._file.close()
        self.shards[-1]["sha256"] = self._digest.hexdigest()

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self._close()


def map_shard(path: Path, dtype: np.dtype[Any]) -> Array:
    """The tokens of one shard, memory-mapped; an empty file gives an empty array (it cannot be mapped)."""
    if path.stat().st_size == 0:
        return np.zeros(0, dtype=dtype)
    return np.memmap(path, dtype=dtype, mode="r")
