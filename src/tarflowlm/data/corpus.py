"""Prepared corpora (`meta.json`, hash-checked token shards in three splits, the tokenizer), and
windows of tokens.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from tarflowlm.data.sources import SPLITS
from tarflowlm.data.tokenizer import Tokenizer, load_tokenizer
from tarflowlm.errors import UserError, first_line
from tarflowlm.files import sha256_of

META = "meta.json"
FORMAT, VERSION = "tarflowlm-corpus", 1
Array = npt.NDArray[Any]


class TokenArray:
    """A read-only 1-d view of tokens in several parts, all but the last of one length,
    memory-mapped or in memory. `tokens[start:stop]` copies the tokens there;
    `numpy.asarray(tokens)` gives one array.
    """

    def __init__(self, parts: Sequence[Array]) -> None:
        assert all(len(part) == len(parts[0]) for part in parts[:-1])
        # plain views: indexing an np.memmap spends most of its time building np.memmap results
        self._parts = [np.asarray(part) for part in parts]
        self._part_length, self._length = max(1, len(parts[0])), sum(map(len, parts))

    @classmethod
    def of(cls, tokens: "TokenArray | Array") -> "TokenArray":
        """`tokens` itself, or a view of a 1-d array."""
        return tokens if isinstance(tokens, TokenArray) else cls([tokens])

    @property
    def dtype(self) -> np.dtype[Any]:
        return self._parts[0].dtype

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: slice) -> Array:
        (start, stop, step), pieces = index.indices(len(self)), [np.empty(0, self.dtype)]
        assert step == 1, index
        while start < stop:
            part, offset = divmod(start, self._part_length)
            pieces.append(self._parts[part][offset : offset + stop - start])
            start += len(pieces[-1])
        return np.concatenate(pieces)

    def windows(self, starts: Array, length: int) -> torch.Tensor:
        """Int64 [N, length]: the tokens `start .. start + length - 1` for each of `starts` [N]."""
        return torch.from_numpy(
            np.stack([self[s : s + length] for s in starts.tolist()]).astype(np.int64)
        )

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Array:
        whole = self._parts[0] if len(self._parts) == 1 else np.concatenate(self._parts)
        return np.array(whole, dtype=dtype, copy=copy)


class Corpus:
    """A prepared corpus on disk: the content `meta` of meta.json, the `tokenizer` it was encoded
    with, and tokens. The tokens are memory-mapped and read only where they are used.
    """

    def __init__(self, path: Path, meta: dict[str, Any], tokenizer: Tokenizer) -> None:
        self.path, self.meta, self.tokenizer = path, meta, tokenizer

    def split(self, name: str) -> TokenArray:
        """The tokens of split "train", "valid" or "test"."""
        return self._tokens[name]

    def num_tokens(self, name: str) -> int:
        """Number of tokens of a split."""
        return int(self.meta["splits"][name]["tokens"])

    def num_characters(self, name: str) -> int:
        """Number of characters of the normalised text of a split."""
        return int(self.meta["splits"][name]["characters"])

    @property
    def fingerprint(self) -> str:
        """sha256 (hex) over the hashes of all shards: equal for equal tokens in equal splits."""
        hashes = [
            [shard["sha256"] for shard in self.meta["splits"][split]["shards"]] for split in SPLITS
        ]
        return hashlib.sha256(json.dumps(hashes).encode("ascii")).hexdigest()

    def changed_file(self, current: Sequence[Path] | None = None) -> Path | None:
        """The first source file that has changed since, or None. Equal size and time count as
        unchanged. `current` are the files of the source now, matched by name since a package may be
        reinstalled. None means the recorded paths; then a missing file counts as unchanged.
        """
        recorded = {Path(record["path"]).name: record for record in self.meta["files"]}
        if current is None:
            current = [
                path for record in recorded.values() if (path := Path(record["path"])).is_file()
            ]
        elif different := recorded.keys() ^ {path.name for path in current}:
            return Path(min(different))
        for path in current:
            record, now = recorded[path.name], path.stat()
            is_same = (now.st_size, now.st_mtime_ns) == (record["size"], record["mtime_ns"])
            if not is_same and (
                now.st_size != record["size"] or sha256_of(path) != record["sha256"]
            ):
                return path
        return None

    def verify(self) -> None:
        """UserError for a shard that differs from what was written; `open_corpus` checks only their
        sizes.
        """
        for split in SPLITS:
            for shard in self.meta["splits"][split]["shards"]:
                if sha256_of(self.path / shard["file"]) != shard["sha256"]:
                    raise UserError(
                        f"{self.path / shard['file']} is damaged: prepare the corpus again"
                    )

    @cached_property
    def _tokens(self) -> dict[str, TokenArray]:
        dtype = token_dtype(self.meta["vocab_size"])

        def mapped(shard: dict[str, Any]) -> Array:
            # an empty file cannot be mapped
            return (
                np.memmap(self.path / shard["file"], dtype, "r")
                if shard["tokens"]
                else np.zeros(0, dtype)
            )

        return {
            split: TokenArray([mapped(s) for s in self.meta["splits"][split]["shards"]])
            for split in SPLITS
        }

    def __repr__(self) -> str:
        sizes = ", ".join(f"{split} {self.num_tokens(split):,}" for split in SPLITS)
        return f"Corpus({str(self.path)!r}: {self.meta['source']}, tokens: {sizes})"


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """The smallest little-endian unsigned type that holds `vocab_size` ids."""
    return np.dtype("u1" if vocab_size <= 1 << 8 else "<u2" if vocab_size <= 1 << 16 else "<u4")


def open_corpus(path: str | os.PathLike[str]) -> Corpus:
    """The corpus prepared in directory `path`. UserError if a file is missing, truncated or
    foreign.
    """
    folder = Path(path)
    try:
        meta = json.loads((folder / META).read_text(encoding="utf-8"))
        if (meta["format"], meta["version"]) != (FORMAT, VERSION):
            raise ValueError(f"format {meta['format']!r}, version {meta['version']!r}")
        corpus = Corpus(folder, meta, load_tokenizer(folder))
        if corpus.tokenizer.fingerprint != meta["tokenizer_fingerprint"]:
            raise ValueError("tokenizer.json is not the one this corpus was encoded with")
        for split in SPLITS:
            for shard in meta["splits"][split]["shards"]:
                size = shard["tokens"] * token_dtype(meta["vocab_size"]).itemsize
                if (folder / shard["file"]).stat().st_size != size:
                    raise ValueError(f"{shard['file']} does not have {size:,} bytes")
    except FileNotFoundError as error:
        raise UserError(
            f"{folder} is not a complete corpus, {error.filename} is missing: prepare it again"
        ) from None
    except (OSError, LookupError, TypeError, ValueError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else first_line(error)
        raise UserError(
            f"the corpus {folder} cannot be used ({reason}): prepare it again"
        ) from None
    return corpus


class WindowSampler:
    """An endless stream of batches of windows, fixed by `seed` alone.

    Epoch e uses a generator seeded with (seed, e) to draw an offset in [0, window) and a
    permutation of the non-overlapping windows from there on, so no token is seen twice in an epoch.
    The permutations of successive epochs form one sequence, cut into global batches of `world *
    batch` windows, of which rank r takes the r-th `batch`. The stream is the same for equal `world
    * batch`, so another number of ranks can resume it.
    """

    def __init__(
        self,
        tokens: TokenArray | Array,
        *,
        window: int,
        batch: int,
        seed: int,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        assert min(window, batch) >= 1, (window, batch)
        assert 0 <= rank < world, (rank, world)
        self.tokens = TokenArray.of(tokens)
        _check_length(len(self.tokens), window)
        self.window, self.batch, self.seed, self.rank, self.world = window, batch, seed, rank, world
        self.epoch = self.position = (
            0  # completed passes over the text, windows used in this one by all ranks
        )
        self._starts = self._epoch_starts(0)

    def next(self) -> torch.Tensor:
        """The next batch of this rank: int64 [batch, window]."""
        parts, missing = list[Array](), self.world * self.batch
        while missing:
            if self.position == len(self._starts):
                self.epoch, self.position = self.epoch + 1, 0
                self._starts = self._epoch_starts(self.epoch)
            parts.append(self._starts[self.position : self.position + missing])
            self.position += len(parts[-1])
            missing -= len(parts[-1])
        starts = np.concatenate(parts)[self.rank * self.batch : (self.rank + 1) * self.batch]
        return self.tokens.windows(starts, self.window)

    def state_dict(self) -> dict[str, int]:
        """The position in the stream, and the stream's seed, window and number of tokens; small
        JSON.
        """
        return {"epoch": self.epoch, "position": self.position, **self._identity()}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue where `state` was taken. UserError if that stream had another text, window or
        seed.
        """
        for name, ours in self._identity().items():
            if state[name] != ours:
                raise UserError(
                    f"cannot resume the data stream: it had {name}={state[name]}, this run has {ours}"
                )
        self.epoch, self.position = state["epoch"], state["position"]
        self._starts = self._epoch_starts(self.epoch)
        assert 0 <= self.position <= len(self._starts), state

    def _identity(self) -> dict[str, int]:
        return {"seed": self.seed, "window": self.window, "num_tokens": len(self.tokens)}

    def _epoch_starts(self, epoch: int) -> Array:
        generator = np.random.Generator(np.random.PCG64([self.seed, epoch]))
        # a text of less than two windows allows fewer offsets: one window must remain
        offset = int(generator.integers(min(self.window, len(self.tokens) - self.window + 1)))
        num_windows = (len(self.tokens) - offset) // self.window
        return offset + self.window * generator.permutation(num_windows).astype(np.int64)


def eval_windows(tokens: TokenArray | Array, window: int, limit: int | None = None) -> torch.Tensor:
    """Consecutive windows without overlap, int64 [N, window]: `sliding_windows` with the stride of
    a window.
    """
    return sliding_windows(tokens, window, window, limit)[0]


def sliding_windows(
    tokens: TokenArray | Array, window: int, stride: int, limit: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Windows every `stride` tokens, and how many leading tokens of each are context only: int64
    [N, window], [N]. The tokens after the context continue those of the window before, so every
    token counts once; the first window has no context. `limit` keeps at most that many windows,
    evenly spaced over the text, all with `window - stride` tokens of context, as nearly every
    window of the text has. Fewer than `stride` tokens at the end are left out.
    """
    if not 1 <= stride <= window:
        raise UserError(
            f"stride {stride}: must be at least 1 and at most the context of {window} tokens"
        )
    if limit is not None and limit < 1:
        raise UserError(f"windows {limit}: must be at least 1")
    _check_length(len(view := TokenArray.of(tokens)), window)
    num_windows = (len(view) - window) // stride + 1
    if limit is not None and limit < num_windows:
        starts = np.arange(limit) * num_windows // limit * stride
        return view.windows(starts, window), torch.full((limit,), window - stride)
    # a view: overlapping windows share memory
    windows = torch.from_numpy(np.asarray(view).astype(np.int64)).unfold(0, window, stride)
    context = torch.full((num_windows,), window - stride)
    context[0] = 0
    return windows, context


def _check_length(num_tokens: int, window: int) -> None:
    if num_tokens < window:
        rule = "use a longer text or a smaller window"
        raise UserError(
            f"the text has {num_tokens} tokens, fewer than one window of {window}: {rule}"
        )
