"""One group of an autoregressive head (docs/math.md, eq. 10), for R positions at once.

M hidden units, A channels of an embedding, m channels and O outputs of a group; O_1 of the first
output.
"""

import math
from typing import NamedTuple

import numpy as np
from numba import njit

from tarflowlm.compiled.step import CHAIN, Floats, affine, gelu, linear


class HeadArrays(NamedTuple):
    """The weights of a head of G groups, K of which others see."""

    context: Floats
    """[D, G M]."""
    context_bias: Floats
    """[G M]."""
    shared: Floats
    """[D, O_1], or [D, 0] without linear paths."""
    cross: Floats
    """[G, K A, M]."""
    embed: Floats
    """[K, 3 m, A]."""
    embed_bias: Floats
    """[K, A]."""
    weights: Floats
    """The maps to all outputs, [G, M, O]."""
    biases: Floats
    """[G, O]."""
    evidence: Floats
    """[G, K m, O_1], or [G, 0, 0] without linear paths."""


@njit(fastmath=CHAIN, error_model="numpy", cache=True, nogil=True)
def group_outputs(
    g: int, w: HeadArrays, hidden: Floats, shared: Floats, embedded: Floats, values: Floats
) -> Floats:
    """The outputs [R, O] of group g.

    `hidden` [R, G M] and `shared` [R, O_1] come from the features, `embedded` [R, K A] and `values`
    [R, G m] from the groups before g.
    """
    rows, M = len(hidden), w.cross.shape[2]
    known, inputs, A = w.embed.shape
    before = min(g, known)
    active = np.empty((rows, M), np.float32)
    room, powers = np.empty(M, np.float32), np.empty(M, np.int32)
    for r in range(rows):
        for i in range(M):
            active[r, i] = hidden[r, g * M + i]
    linear(embedded, w.cross[g, : before * A], active)
    for r in range(rows):
        gelu(active[r], room, powers)
    out = affine(active, w.weights[g], w.biases[g])
    first = w.evidence.shape[2]
    if first:
        part = shared.copy()
        linear(values, w.evidence[g, : before * (inputs // 3)], part)
        for r in range(rows):
            for i in range(first):
                out[r, i] += part[r, i]
    return out


@njit(fastmath=CHAIN, error_model="numpy", cache=True, nogil=True)
def embed_group(g: int, w: HeadArrays, z: Floats, embedded: Floats, values: Floats) -> None:
    """Write the value z [R, m] of group g for the groups after it."""
    rows, m = z.shape
    A = w.embed.shape[2]
    inputs = np.empty((rows, 3 * m), np.float32)
    room, powers = np.empty(A, np.float32), np.empty(A, np.int32)
    for r in range(rows):
        for i in range(m):
            values[r, g * m + i] = z[r, i]
            below = np.float32(math.expm1(-abs(z[r, i])))
            inputs[r, i] = z[r, i]
            inputs[r, m + i] = z[r, i] if z[r, i] > 0 else below
            inputs[r, 2 * m + i] = -z[r, i] if z[r, i] < 0 else below
    own = affine(inputs, w.embed[g], w.embed_bias[g])
    for r in range(rows):
        gelu(own[r], room, powers)
        for i in range(A):
            embedded[r, g * A + i] = own[r, i]
