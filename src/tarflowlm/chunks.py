"""The number of rows that are computed at once: one rule, and every size that it is used with.

    rows = max(1, budget // elements of one row)

Rows do not influence each other, so no size changes a result by more than rounding, with one
exception: an evaluation draws noise batch by batch, so another size of batches gives other noise.
The noise of published numbers therefore depends on `EVALUATED_TOKENS`. `CACHED` was measured; a
size four times smaller or larger costs up to a fifth. The others are good to a factor of two.
"""

from collections.abc import Callable, Iterable, Iterator
from itertools import groupby
from typing import TypeVar

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

Result = TypeVar("Result")

CACHED = 2**16
"""Elements per thread of one buffer on a CPU: 256 KiB of float32, five to a cache of 2 MiB."""
HELD_CPU = 2**22
"""Largest [rows, components] tensor to materialise on a CPU, in elements: 16 MiB of float32."""
HELD_ACCELERATOR = 2**26
"""The same on an accelerator: 256 MiB fill it, and a large vocabulary takes some gigabytes."""
KEPT = 2**24
"""Largest result to keep for the backward, in elements, 64 MiB: a larger one is computed again."""
LOGITS = 2**27
"""The same for logits of a vocabulary, which cost more to compute: 512 MiB of float32."""

BOUND_TOKENS_CPU = 2048
"""Tokens whose bounds a CPU computes together: an activation of 4 D channels stays in the cache."""
EVALUATED_TOKENS = 8192
"""Tokens that an evaluation computes at once: enough for two cores or a small GPU."""
WRITTEN_TOKENS = 6144
"""Tokens that the command line writes at once, particles counted; more on a GPU."""


def rows_at_once(elements_per_row: int, budget: int) -> int:
    """Rows of `elements_per_row` that fit into `budget` elements; at least one."""
    return max(1, budget // max(1, elements_per_row))


def row_ranges(rows: int, elements_per_row: int, budget: int) -> Iterator[slice]:
    """Consecutive ranges that cover `rows`, each of `rows_at_once` but for the last."""
    size = rows_at_once(elements_per_row, budget)
    for start in range(0, rows, size):
        yield slice(start, min(rows, start + size))


def equal_ranges(values: Iterable[object], longest: int) -> Iterator[slice]:
    """Consecutive ranges of at most `longest` values that are equal."""
    start = 0
    for _, equal in groupby(values):
        end = start + len(list(equal))
        yield from (slice(i, min(i + longest, end)) for i in range(start, end, longest))
        start = end


def bound_rows(num_tokens: int, device: torch.device) -> int:
    """Texts of `num_tokens` whose bounds are computed together."""
    budget = BOUND_TOKENS_CPU if device.type == "cpu" else EVALUATED_TOKENS
    return rows_at_once(num_tokens, budget)


def written_rows(num_tokens: int, device: torch.device, *, cached: int, choices: int) -> int:
    """Texts of `num_tokens`, particles counted, that are written together.

    A token has `cached` keys and values. The next tokens of a text are drawn from `choices`,
    particles counted. On a GPU they take half of the memory that is free.
    """
    if device.type != "cuda":
        return rows_at_once(num_tokens, WRITTEN_TOKENS)
    free, _ = torch.cuda.mem_get_info(device)
    # float32; and the weights of the next token in some formats, with the numbers that draw it
    return rows_at_once(4 * num_tokens * cached + 64 * choices, free // 2)


def in_parts(
    function: Callable[..., Result], rows: int, *tensors: Tensor, keeps: bool = False
) -> list[Result]:
    """`function` of the tensors, at most `rows` rows at a time.

    The backward pass computes several parts again, unless each `keeps` its activations.
    """
    parts = list(zip(*(t.split(rows) for t in tensors), strict=True))
    if keeps or len(parts) == 1 or not torch.is_grad_enabled():
        return [function(*part) for part in parts]
    return [
        checkpoint(function, *part, use_reentrant=False, preserve_rng_state=False) for part in parts
    ]


def held(device: torch.device) -> int:
    """Largest [rows, components] tensor to materialise on a device, in elements."""
    return HELD_CPU if device.type == "cpu" else HELD_ACCELERATOR
