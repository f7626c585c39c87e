"""Text to tokens on all cores, in order."""

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt

from tarflowlm.data.sources import Batch
from tarflowlm.data.tokenizer import Tokenizer

_IN_FLIGHT = 3
"""Batches at work: the `tokenizers` library spreads each over all cores, and the others keep the cores busy while
Python copies its result. Threads suffice, as the library works without the interpreter's lock."""


def encode_in_order(
    batches: Iterable[Batch], tokenizer: Tokenizer, dtype: np.dtype[Any]
) -> Iterator[tuple[Batch, npt.NDArray[Any]]]:
    """Every batch with the tokens of its texts, in the order of `batches`, which is read only a little ahead."""

    def encode(batch: Batch) -> npt.NDArray[Any]:
        return tokenizer.encode_each(batch.texts).astype(dtype)

    pending: deque[tuple[Batch, Future[npt.NDArray[Any]]]] = deque()
    pool = ThreadPoolExecutor(_IN_FLIGHT)
    try:
        for batch in batches:
            pending.append((batch, pool.submit(encode, batch)))
            if len(pending) > _IN_FLIGHT:
                first, tokens = pending.popleft()
                yield first, tokens.result()
        while pending:
            first, tokens = pending.popleft()
            yield first, tokens.result()
    finally:
        pool.shutdown(cancel_futures=True)
