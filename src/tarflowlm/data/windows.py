"""Windows of tokens: drawn without end for training, in order for evaluation."""

import logging
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate

import numpy as np
import numpy.typing as npt
import torch

from tarflowlm.data.order import Permutation
from tarflowlm.errors import UserError, counted

Array = npt.NDArray[np.integer]
"""Tokens or indices, 1-d."""
TABLE = 1 << 22
"""Windows from which on their order is not stored."""
EVALUATED = 1 << 24
"""Tokens that are evaluated of a larger text, unless a number of windows is given."""

log = logging.getLogger("tarflowlm")


class TokenArray:
    """A read-only 1-d view of tokens in one or more parts, memory-mapped or in memory.

    `tokens[start:stop]` copies the tokens there; `numpy.asarray(tokens)` gives one array.
    """

    def __init__(self, parts: Sequence[Array]) -> None:
        # plain views: indexing an np.memmap spends most of its time building np.memmap results
        self._parts = [np.asarray(part) for part in parts]
        self._starts = [0, *accumulate(map(len, parts))]

    @classmethod
    def of(cls, tokens: "TokenArray | Array") -> "TokenArray":
        """`tokens` itself, or a view of a 1-d array."""
        return tokens if isinstance(tokens, TokenArray) else cls([tokens])

    @property
    def dtype(self) -> np.dtype[np.integer]:
        return self._parts[0].dtype

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, index: slice) -> Array:
        start, stop, step = index.indices(len(self))
        assert step == 1, index
        pieces = [np.empty(0, self.dtype)]
        while start < stop:
            part = bisect_right(self._starts, start) - 1
            offset = start - self._starts[part]
            pieces.append(self._parts[part][offset : offset + stop - start])
            start += len(pieces[-1])
        return np.concatenate(pieces)

    def documents(self, end: int) -> list[Array]:
        """Views of the stretches that end with the token `end`, or with a part."""
        pieces = []
        for part in self._parts:
            pieces += np.split(part, np.flatnonzero(part == end) + 1)
        return [piece for piece in pieces if len(piece)]

    def windows(self, starts: Array, length: int) -> torch.Tensor:
        """Int64 [N, length]: the tokens `start .. start + length - 1` for each of `starts` [N]."""
        windows = np.stack([self[start : start + length] for start in starts.tolist()])
        return torch.from_numpy(windows.astype(np.int64))

    def __array__(self, dtype: npt.DTypeLike | None = None, copy: bool | None = None) -> Array:
        whole = self._parts[0] if len(self._parts) == 1 else np.concatenate(self._parts)
        return np.array(whole, dtype=dtype, copy=copy)


class WindowSampler:
    """An endless stream of batches of windows, fixed by `seed` alone.

    Epoch e uses a generator seeded with (seed, e) to draw an offset in [0, window) and a
    permutation of the non-overlapping windows from there on, so no token is seen twice in an epoch;
    from `TABLE` windows on it draws the keys of a `Permutation` instead, which needs no memory.
    In a text of fewer windows, documents that the token `end` follows are first put into an order
    of the epoch, with an end before the first one.

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
        end: int | None = None,
    ) -> None:
        assert min(window, batch) >= 1, (window, batch)
        assert 0 <= rank < world, (rank, world)
        self.tokens = TokenArray.of(tokens)
        _check_length(len(self.tokens), window, "or a smaller window")
        self.window = window
        self.batch = batch
        self.seed = seed
        self.rank = rank
        self.world = world
        self.epoch = 0  # completed passes over the text
        self.position = 0  # windows used in this one by all ranks
        self._documents: list[Array] = []
        if end is not None and len(self.tokens) // window < TABLE:
            self._documents = self.tokens.documents(end)
        self._begin_epoch()

    def next(self) -> torch.Tensor:
        """The next batch of this rank: int64 [batch, window]."""
        parts: list[torch.Tensor] = []
        missing = self.world * self.batch
        first = self.rank * self.batch
        while missing:
            if self.position == len(self._order):
                self.epoch += 1
                self.position = 0
                self._begin_epoch()
            chosen = self._order[self.position : self.position + missing]
            own = chosen[max(0, first) : max(0, first + self.batch)]
            if len(own):
                parts.append(self._text.windows(self._offset + self.window * own, self.window))
            self.position += len(chosen)
            missing -= len(chosen)
            first -= len(chosen)
        return torch.cat(parts)

    def state_dict(self) -> dict[str, int]:
        """Position in the stream, and its seed, window and number of tokens; small JSON."""
        return {"epoch": self.epoch, "position": self.position, **self._identity()}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue where `state` was taken. UserError for one of another text, window or seed."""
        for name, ours in self._identity().items():
            if state[name] != ours:
                what = f"it had {name}={state[name]}, this run has {ours}"
                raise UserError(f"cannot resume the data stream: {what}")
        self.epoch = state["epoch"]
        self.position = state["position"]
        self._begin_epoch()
        assert 0 <= self.position <= len(self._order), state

    def _identity(self) -> dict[str, int]:
        return {"seed": self.seed, "window": self.window, "num_tokens": len(self.tokens)}

    def _begin_epoch(self) -> None:
        generator = np.random.Generator(np.random.PCG64([self.seed, self.epoch]))
        self._text = self.tokens
        if len(self._documents) > 1:
            order = generator.permutation(len(self._documents)).tolist()
            joined = [self._documents[number] for number in order]
            self._text = TokenArray([joined[-1][-1:], *joined])
        # a text of less than two windows allows fewer offsets: one window must remain
        most = min(self.window, len(self._text) - self.window + 1)
        self._offset = int(generator.integers(most))
        size = (len(self._text) - self._offset) // self.window
        self._order: Array | Permutation
        self._order = generator.permutation(size) if size < TABLE else Permutation(size, generator)


def eval_windows(tokens: TokenArray | Array, window: int, limit: int | None = None) -> torch.Tensor:
    """Consecutive windows without overlap, int64 [N, window]; see `sliding_windows`."""
    return sliding_windows(tokens, window, window, limit)[0]


def sliding_windows(
    tokens: TokenArray | Array, window: int, stride: int, limit: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Windows every `stride` tokens, and how many tokens at the start of each are context only.

    Returns int64 [N, window] and [N]. The tokens after the context continue those of the window
    before, so every token counts once; the first window has no context. `limit` keeps at most that
    many windows, evenly spaced over the text, all with `window - stride` tokens of context, as
    nearly every window of the text has; None keeps as many as `EVALUATED` tokens have. Fewer than
    `stride` tokens at the end are left out.
    """
    if not 1 <= stride <= window:
        rule = f"must be at least 1 and at most the context of {window} tokens"
        raise UserError(f"stride {stride}: {rule}")
    if limit is not None and limit < 1:
        raise UserError(f"windows {limit}: must be at least 1")
    view = TokenArray.of(tokens)
    _check_length(len(view), window, "or its split all")
    num_windows = (len(view) - window) // stride + 1
    if limit is None and num_windows * stride > EVALUATED:
        limit = EVALUATED // stride
        log.info("a large text: %d windows of it are evaluated, evenly spaced", limit)
    if limit is not None and limit < num_windows:
        starts = np.arange(limit) * num_windows // limit * stride
        return view.windows(starts, window), torch.full((limit,), window - stride)
    # a view: overlapping windows share memory
    windows = torch.from_numpy(np.asarray(view).astype(np.int64)).unfold(0, window, stride)
    context = torch.full((num_windows,), window - stride)
    context[0] = 0
    return windows, context


def _check_length(num_tokens: int, window: int, remedy: str) -> None:
    if num_tokens < window:
        what = f"the text has {counted(num_tokens, 'token')}, fewer than a window of {window}"
        raise UserError(f"{what}: use a longer text, {remedy}")
