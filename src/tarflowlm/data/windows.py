"""Windows of tokens: drawn without end for training, in order for evaluation."""

import logging
import mmap
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import numpy.typing as npt
import torch

from tarflowlm.errors import UserError, counted

Array = npt.NDArray[np.integer]
"""Tokens or indices, 1-d; tokens may be memory-mapped."""
SHUFFLED = 1 << 22
"""A text with fewer windows has its documents shuffled, too."""
EVALUATED = 1 << 24
"""The most tokens of a text that are evaluated, unless a number of windows is given."""

log = logging.getLogger("tarflowlm")


class WindowSampler:
    """An endless stream of batches of windows, fixed by `seed` alone.

    Epoch e uses a generator seeded with (seed, e) to draw an offset in [0, window) and a
    permutation of the non-overlapping windows from there on, so no token is seen twice in an epoch.
    In a text of fewer than `SHUFFLED` windows, documents that the token `end` follows are first put
    into an order of the epoch, with an end before the first one.

    The permutations of successive epochs form one sequence, cut into global batches of `world *
    batch` windows. Rank r takes the r-th `batch` of each. The stream is the same for equal `world *
    batch`, so another number of ranks can resume it. A thread reads the next batch in advance;
    `epoch` and `position` are the place after the batches that `next` has returned.
    """

    def __init__(
        self,
        tokens: Array,
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
        _check_length(len(tokens), window, "or a smaller window")
        self.tokens = tokens
        self.window = window
        self.batch = batch
        self.seed = seed
        self.rank = rank
        self.world = world
        self._identity = {"seed": seed, "window": window, "num_tokens": len(tokens)}
        self.epoch = 0  # completed passes over the text
        self.position = 0  # windows used in this epoch by all ranks
        starts = [np.zeros(1, np.int64)]  # of documents
        if end is not None and len(tokens) // window < SHUFFLED:
            size = 1 << 24  # tokens that are compared at once
            for first in range(0, len(tokens) - 1, size):
                block = tokens[first : min(first + size, len(tokens) - 1)]
                starts.append(np.flatnonzero(block == end) + (first + 1))
        self._starts = np.concatenate(starts)
        # From here on the text is read at random, where reading ahead would fetch several hundred
        # times the bytes of a window.
        owner: object = tokens
        while isinstance(owner, np.ndarray):
            owner = owner.base
        if isinstance(owner, mmap.mmap) and hasattr(owner, "madvise"):
            owner.madvise(mmap.MADV_RANDOM)
        self._begin_epoch(0)
        self._reader = ThreadPoolExecutor(1)
        self._ahead: Future[tuple[Array, int, int]] | None = None

    def next(self) -> torch.Tensor:
        """The next batch of this rank: int64 [batch, window]."""
        ahead = self._ahead or self._reader.submit(self._read, self.epoch, self.position)
        batch, self.epoch, self.position = ahead.result()
        self._ahead = self._reader.submit(self._read, self.epoch, self.position)
        return torch.from_numpy(batch)

    def state_dict(self) -> dict[str, int]:
        """Position in the stream, and its seed, window and number of tokens; small JSON."""
        return {"epoch": self.epoch, "position": self.position, **self._identity}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue at a saved `state`. UserError if it has another text, window or seed."""
        for name, ours in self._identity.items():
            if state[name] != ours:
                what = f"it had {name}={state[name]}, this run has {ours}"
                raise UserError(f"cannot resume the data stream: {what}")
        if self._ahead is not None:
            self._ahead.result()
            self._ahead = None
        self.epoch = state["epoch"]
        self.position = state["position"]
        self._begin_epoch(self.epoch)
        assert 0 <= self.position <= len(self._order), state

    def _read(self, epoch: int, position: int) -> tuple[Array, int, int]:
        """The batch at a place in the stream, and the place after it."""
        parts: list[Array] = []
        missing = self.world * self.batch
        first = self.rank * self.batch
        while missing:
            if position == len(self._order):
                epoch += 1
                position = 0
                self._begin_epoch(epoch)
            chosen = self._order[position : position + missing]
            own = chosen[max(0, first) : max(0, first + self.batch)]
            if len(own):
                places = self._offset + self.window * own[:, None] + np.arange(self.window)
                if len(self._starts) > 1:
                    # the shuffled text is never stored: each place is looked up in its document;
                    # the end before the first document is that of the last one
                    places = (places - 1) % len(self.tokens)
                    found = np.searchsorted(self._begins, places, side="right") - 1
                    places += self._starts[self._documents[found]] - self._begins[found]
                parts.append(self.tokens[places].astype(np.int64))
            position += len(chosen)
            missing -= len(chosen)
            first -= len(chosen)
        return np.concatenate(parts), epoch, position

    def _begin_epoch(self, epoch: int) -> None:
        generator = np.random.Generator(np.random.PCG64([self.seed, epoch]))
        length = len(self.tokens)
        if len(self._starts) > 1:
            self._documents = generator.permutation(len(self._starts))
            sizes = np.diff(self._starts, append=length)[self._documents]
            # where each of them begins in the text of this epoch
            self._begins = np.cumsum(sizes) - sizes
            length += 1
        # a text of less than two windows allows fewer offsets: one window must remain
        self._offset = int(generator.integers(min(self.window, length - self.window + 1)))
        self._order = generator.permutation((length - self._offset) // self.window)


def eval_windows(tokens: Array, window: int, limit: int | None = None) -> torch.Tensor:
    """Consecutive windows without overlap, int64 [N, window]; see `sliding_windows`."""
    return sliding_windows(tokens, window, window, limit)[0]


def sliding_windows(
    tokens: Array, window: int, stride: int, limit: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Windows every `stride` tokens, and how many tokens at the start of each are context only.

    Returns int64 [N, window] and [N]. The tokens after the context continue the window before, so
    every token counts once; the first window has no context. `limit` keeps at most this number of
    windows, evenly spaced over the text, all with `window - stride` tokens of context like nearly
    every window of the text; None keeps windows for at most `EVALUATED` tokens. Fewer than `stride`
    tokens at the end are left out.
    """
    if not 1 <= stride <= window:
        rule = f"must be at least 1 and at most the context of {window} tokens"
        raise UserError(f"stride {stride}: {rule}")
    if limit is not None and limit < 1:
        raise UserError(f"windows {limit}: must be at least 1")
    _check_length(len(tokens), window, "or its split all")
    num_windows = (len(tokens) - window) // stride + 1
    if limit is None and num_windows * stride > EVALUATED:
        limit = EVALUATED // stride
        log.info("a large text: %d windows of it are evaluated, evenly spaced", limit)
    if limit is not None and limit < num_windows:
        starts = np.arange(limit) * num_windows // limit * stride
        windows = tokens[starts[:, None] + np.arange(window)]
        return torch.from_numpy(windows.astype(np.int64)), torch.full((limit,), window - stride)
    # a view: overlapping windows share memory
    overlapping = torch.from_numpy(tokens.astype(np.int64)).unfold(0, window, stride)
    context = torch.full((num_windows,), window - stride)
    context[0] = 0
    return overlapping, context


def spans(
    length: int, context: int, *, patch: int, overlap: bool = True, given: int = 0
) -> list[tuple[int, int]]:
    """(start, end) of the windows of a text of `length` tokens.

    With `overlap` each begins with the last half window, in whole patches, of the one before. The
    first `given` tokens need no window: if they fill one, their last half window begins the first.
    """
    kept = context // patch // 2 * patch if overlap else 0
    start = given - kept if given >= context else 0
    found = [(start, min(start + context, length))]
    while found[-1][1] < length:
        start = found[-1][1] - kept
        found.append((start, min(start + context, length)))
    return found


def _check_length(num_tokens: int, window: int, remedy: str) -> None:
    if num_tokens < window:
        what = f"the text has {counted(num_tokens, 'token')}, fewer than a window of {window}"
        raise UserError(f"{what}: use a longer text, {remedy}")
