"""Windows of tokens: a resumable random stream for training, consecutive ones for evaluation."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from tarflowlm.data.shards import TokenArray
from tarflowlm.errors import UserError


class WindowSampler:
    """An endless stream of batches of windows, fixed by `seed` alone.

    Epoch e uses a generator seeded with (seed, e) to draw an offset in [0, window) and a permutation of the
    non-overlapping windows from there on, so no token is seen twice in an epoch. The permutations of successive
    epochs form one sequence, cut into global batches of `world * batch` windows, of which rank r takes the r-th
    `batch`. A global batch may span two epochs.

    Every rank counts the windows of all ranks, so a state can be resumed with another number of ranks: the stream is
    the same for equal `world * batch`.

    Errors: UserError for a text shorter than a window, and for sizes out of range.
    """

    def __init__(
        self,
        tokens: TokenArray | npt.NDArray[Any],
        *,
        window: int,
        batch: int,
        seed: int,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        for name, value, minimum in (
            ("window", window, 1),
            ("batch", batch, 1),
            ("seed", seed, 0),
            ("world", world, 1),
        ):
            if value < minimum:
                raise UserError(f"{name}={value} must be {minimum} or more")
        assert 0 <= rank < world, (rank, world)
        self.tokens = TokenArray.of(tokens)
        _check_length(len(self.tokens), window)
        self.window, self.batch, self.seed, self.rank, self.world = window, batch, seed, rank, world
        self.epoch = 0
        """Completed passes over the text."""
        self.position = 0
        """Windows of the current epoch that were used, over all ranks."""
        self._starts = self._epoch_starts(0)

    def next(self) -> torch.Tensor:
        """The next batch of this rank: int64 [batch, window]."""
        starts = self._next_global_starts()[self.rank * self.batch : (self.rank + 1) * self.batch]
        return torch.from_numpy(self.tokens.windows(starts, self.window).astype(np.int64))

    def __next__(self) -> torch.Tensor:
        return self.next()

    def __iter__(self) -> Iterator[torch.Tensor]:
        return self

    def state_dict(self) -> dict[str, int]:
        """The position in the stream, and what the stream was made from; small JSON."""
        return {
            "epoch": self.epoch,
            "position": self.position,
            "seed": self.seed,
            "window": self.window,
            "num_tokens": len(self.tokens),
        }

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue where `state` was taken. UserError if that stream had another text, window or seed."""
        for name, ours in (("seed", self.seed), ("window", self.window), ("num_tokens", len(self.tokens))):
            if state[name] != ours:
                raise UserError(f"cannot resume the data stream: it had {name}={state[name]}, this run has {ours}")
        self.epoch, self.position = state["epoch"], state["position"]
        self._starts = self._epoch_starts(self.epoch)
        assert 0 <= self.position <= len(self._starts), state

    def _next_global_starts(self) -> npt.NDArray[np.int64]:
        parts: list[npt.NDArray[np.int64]] = []
        missing = self.world * self.batch
        while missing:
            if self.position == len(self._starts):
                self.epoch, self.position = self.epoch + 1, 0
                self._starts = self._epoch_starts(self.epoch)
            part = self._starts[self.position : self.position + missing]
            parts.append(part)
            self.position += len(part)
            missing -= len(part)
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _epoch_starts(self, epoch: int) -> npt.NDArray[np.int64]:
        generator = np.random.Generator(np.random.PCG64([self.seed, epoch]))
        # a text of less than two windows allows fewer offsets: one window must remain
        offset = int(generator.integers(min(self.window, len(self.tokens) - self.window + 1)))
        num_windows = (len(self.tokens) - offset) // self.window
        return offset + self.window * generator.permutation(num_windows).astype(np.int64)


def eval_windows(tokens: TokenArray | npt.NDArray[Any], window: int, limit: int | None = None) -> torch.Tensor:
    """Consecutive non-overlapping windows from the first token on: int64 [N, window].

    An incomplete last window is left out. `limit` keeps at most that many, evenly spaced over the text. UserError for
    a text shorter than a window, and a window or limit below 1.
    """
    if window < 1:
        raise UserError(f"window={window} must be 1 or more")
    return sliding_windows(tokens, window, window, limit)[0]


def sliding_windows(
    tokens: TokenArray | npt.NDArray[Any], window: int, stride: int, limit: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Windows every `stride` tokens, and how many leading tokens of each are context only: int64 [N, window], [N].

    The tokens after the context continue those of the window before, so every token counts once; the first window
    has no context. `limit` keeps at most that many windows, evenly spaced over the text, all with `window - stride`
    tokens of context, as nearly every window of the text has. Fewer than `stride` tokens at the end are left out.

    UserError for a text shorter than a window, a stride outside 1 .. window, and a limit below 1.
    """
    if not 1 <= stride <= window:
        raise UserError(f"stride {stride}: must be at least 1 and at most the context of {window} tokens")
    if limit is not None and limit < 1:
        raise UserError(f"windows {limit}: must be at least 1")
    view = TokenArray.of(tokens)
    _check_length(len(view), window)
    num_windows = (len(view) - window) // stride + 1
    if limit is None or limit >= num_windows:
        # a view: overlapping windows share memory
        windows = torch.from_numpy(np.asarray(view).astype(np.int64)).unfold(0, window, stride)
        context = torch.full((num_windows,), window - stride)
        context[0] = 0
        return windows, context
    starts = np.arange(limit) * num_windows // limit * stride
    windows = torch.from_numpy(view.windows(starts, window).astype(np.int64))
    return windows, torch.full((limit,), window - stride)


def _check_length(num_tokens: int, window: int) -> None:
    """UserError for a text without one complete window."""
    if num_tokens < window:
        raise UserError(
            f"the text has {num_tokens} tokens, fewer than one window of {window}: "
            "use a longer text or a smaller window"
        )
