"""One group of an autoregressive head (docs/math.md, eq. 10), for R positions at once.

M hidden units, A channels of an embedding, m channels and O outputs of a group; O_1 of the first
output.
"""

import math
from typing import NamedTuple

import numpy as np
from numba import njit

from tarflowlm.compiled.step import CHAIN, Floats, gelu, linear


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
    """Of all outputs, [G, M, O]."""
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
    rows = len(hidden)
    _, seen, M = w.cross.shape
    known = seen // w.embed.shape[2] if w.embed.shape[2] else 0
    before = min(g, known)
    active = np.empty((rows, M), np.float32)
    room, powers = np.empty(M, np.float32), np.empty(M, np.int32)
    out = np.empty((rows, w.biases.shape[1]), np.float32)
    for r in range(rows):
        for i in range(M):
            active[r, i] = hidden[r, g * M + i]
        for i in range(out.shape[1]):
            out[r, i] = w.biases[g, i]
    linear(embedded, w.cross[g, : before * w.embed.shape[2]], active)
    for r in range(rows):
        gelu(active[r], room, powers)
    linear(active, w.weights[g], out)
    first = w.evidence.shape[2]
    if first:
        part = shared.copy()
        linear(values, w.evidence[g, : before * (w.evidence.shape[1] // max(known, 1))], part)
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
    own = np.empty((rows, A), np.float32)
    room, powers = np.empty(A, np.float32), np.empty(A, np.int32)
    for r in range(rows):
        for i in range(m):
            values[r, g * m + i] = z[r, i]
            below = np.float32(math.expm1(-abs(z[r, i])))
            inputs[r, i] = z[r, i]
            inputs[r, m + i] = z[r, i] if z[r, i] > 0 else below
            inputs[r, 2 * m + i] = -z[r, i] if z[r, i] < 0 else below
        for i in range(A):
            own[r, i] = w.embed_bias[g, i]
    linear(inputs, w.embed[g], own)
    for r in range(rows):
        gelu(own[r], room, powers)
        for i in range(A):
            embedded[r, g * A + i] = own[r, i]
