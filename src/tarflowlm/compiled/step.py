"""The functions of a step of a Transformer: products, norms, and `layers`.

`layers` computes what `transformer.layer` does. A sum is one chain of terms in a fixed order, so a
row has the same bits whatever the number of rows: a text is the same alone and beside others, and
its prompt may be read at once or in parts.

R = B N rows are N new positions of each of B texts. Numbers are float32, and matrices are [inputs,
outputs], so that the innermost loop runs over outputs.
"""

from typing import NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Integers = NDArray[np.int64]

CHAIN = {"contract", "nnan", "nsz"}
"""Sums keep their order; a product and a sum may be one operation."""
BY_ROW = {*CHAIN, "reassoc"}
"""Sums along a row may be split, in the same way for every row."""
EPS = np.float32(1e-5)
"""As in PyTorch's layer_norm."""


class LayerArrays(NamedTuple):
    """The weights of all layers of a Transformer, [layers, ...] as in `LayerWeights`."""

    taps: Floats
    """The taps of the inputs, the oldest first: [K, D], maybe empty."""
    attention_norm: Floats
    qkv: Floats
    """Queries and keys, then values: [layers, D, 3 D]."""
    scale: Floats
    """[layers, 2, E]."""
    out: Floats
    mlp_norm: Floats
    up: Floats
    """With the gate before it, if there is one: [layers, D, M or 2 M]."""
    down: Floats
    norm: Floats
    """The final norm, [D]."""


class InputArrays(NamedTuple):
    """The weights of an `InputMap`, and of the embedding of the tokens that latents decode to."""

    linear: Floats
    linear_bias: Floats
    lift: Floats
    """[C, D], or [C, 0] where the map is linear; so is `out`."""
    lift_bias: Floats
    out: Floats
    embedding: Floats
    """[P V, D], or [0, D]."""
    mean: Floats
    """The means of the components of latents, [d, V]."""
    precision: Floats
    """-1 / (2 s_k^2), [V]."""
    log_scale: Floats
    """-d log s_k, [V]."""


@njit(fastmath=CHAIN, error_model="numpy", cache=True, nogil=True)
def linear(x: Floats, weight: Floats, y: Floats) -> None:
    """y += x @ weight, for the first m columns of x [R, ...] and weight [m, n]."""
    m, n = weight.shape
    whole = m - m % 4
    for j in range(0, whole, 4):
        w0, w1, w2, w3 = weight[j], weight[j + 1], weight[j + 2], weight[j + 3]
        for r in range(len(x)):
            x0, x1, x2, x3 = x[r, j], x[r, j + 1], x[r, j + 2], x[r, j + 3]
            row = y[r]
            for i in range(n):
                row[i] = (((row[i] + x0 * w0[i]) + x1 * w1[i]) + x2 * w2[i]) + x3 * w3[i]
    for j in range(whole, m):
        for r in range(len(x)):
            for i in range(n):
                y[r, i] += x[r, j] * weight[j, i]


@njit(fastmath=CHAIN, error_model="numpy", cache=True, nogil=True)
def affine(x: Floats, weight: Floats, bias: Floats) -> Floats:
    """x @ weight + bias, [R, n]."""
    y = np.empty((len(x), len(bias)), np.float32)
    for r in range(len(x)):
        for i in range(len(bias)):
            y[r, i] = bias[i]
    linear(x, weight, y)
    return y


@njit(fastmath=BY_ROW, error_model="numpy", cache=True, nogil=True)
def normalise(x: Floats, scale: Floats, y: Floats) -> None:
    """y = layer_norm(x) * scale, along one row."""
    n = len(scale)
    mean = np.float32(0)
    for i in range(n):
        mean += x[i]
    mean /= np.float32(n)
    variance = np.float32(0)
    for i in range(n):
        variance += (x[i] - mean) * (x[i] - mean)
    factor = np.float32(1) / np.sqrt(variance / np.float32(n) + EPS)
    for i in range(n):
        y[i] = (x[i] - mean) * factor * scale[i]


@njit(fastmath=CHAIN, error_model="numpy", cache=True, nogil=True)
def exponentials(x: Floats, powers: NDArray[np.int32]) -> None:
    """x = exp(x) along one row, to two roundings, in loops over many lanes at a time.

    exp(x) = 2^k exp(r) with |r| <= log(2) / 2, by the series of exp(r); x is clamped to
    [-87, 88], where float32 ends. `powers` is memory for as many integers.
    """
    for i in range(len(x)):
        value = min(max(x[i], np.float32(-87.0)), np.float32(88.0))
        k = np.floor(value * np.float32(1.44269504) + np.float32(0.5))
        # log(2) in two parts, of which the first has few digits: k times it is exact
        r = (value - k * np.float32(0.693359375)) + k * np.float32(2.12194440e-4)
        series = np.float32(1 / 720) + r * np.float32(1 / 5040)
        series = np.float32(1 / 120) + r * series
        series = np.float32(1 / 24) + r * series
        series = np.float32(1 / 6) + r * series
        series = np.float32(0.5) + r * series
        x[i] = np.float32(1) + (r + r * r * series)
        powers[i] = (np.int32(k) + np.int32(127)) << np.int32(23)
    scale = powers[: len(x)].view(np.float32)
    for i in range(len(x)):
        x[i] *= scale[i]


@njit(fastmath=CHAIN, error_model="numpy", cache=True, nogil=True)
def gelu(x: Floats, room: Floats, powers: NDArray[np.int32]) -> None:
    """x = x Phi(x) along one row, with an error below 2e-7 (1 + |x|).

    Phi by formula 7.1.26 of Abramowitz and Stegun (1964). `room` is memory for as many numbers.
    """
    for i in range(len(x)):
        room[i] = np.float32(-0.5) * x[i] * x[i]
    exponentials(room[: len(x)], powers)
    for i in range(len(x)):
        t = np.float32(1) / (np.float32(1) + np.float32(0.3275911 * 0.70710678) * abs(x[i]))
        series = np.float32(-1.453152027) + t * np.float32(1.061405429)
        series = np.float32(1.421413741) + t * series
        series = np.float32(-0.284496736) + t * series
        series = np.float32(0.254829592) + t * series
        tail = np.float32(0.5) * t * series * room[i]  # Q(|x|)
        x[i] *= tail if x[i] < np.float32(0) else np.float32(1) - tail


@njit(fastmath=CHAIN, error_model="numpy", cache=True, nogil=True)
def swiglu(x: Floats, room: Floats, powers: NDArray[np.int32]) -> None:
    """The first half of x = silu(first half) * second half, along one row."""
    half = len(x) // 2
    for i in range(half):
        room[i] = -x[i]
    exponentials(room[:half], powers)
    for i in range(half):
        x[i] = x[i] / (np.float32(1) + room[i]) * x[half + i]


@njit(fastmath=BY_ROW, error_model="numpy", cache=True, nogil=True)
def attend(
    q: Floats, keys: Floats, values: Floats, weight: Floats, powers: NDArray[np.int32], y: Floats
) -> None:
    """y [E] = softmax(q k^T) v of one query, for keys and values [n, E]."""
    n = len(values)
    whole = n - n % 4
    for t in range(0, whole, 4):  # the query and the output are read once for four positions
        k0, k1, k2, k3 = keys[t], keys[t + 1], keys[t + 2], keys[t + 3]
        s0 = s1 = s2 = s3 = np.float32(0)
        for e in range(len(q)):
            s0 += q[e] * k0[e]
            s1 += q[e] * k1[e]
            s2 += q[e] * k2[e]
            s3 += q[e] * k3[e]
        weight[t], weight[t + 1], weight[t + 2], weight[t + 3] = s0, s1, s2, s3
    for t in range(whole, n):
        score = np.float32(0)
        for e in range(len(q)):
            score += q[e] * keys[t, e]
        weight[t] = score
    largest = weight[0]
    for t in range(n):
        largest = max(largest, weight[t])
    for t in range(n):
        weight[t] -= largest
    exponentials(weight[:n], powers)
    total = np.float32(0)
    for t in range(n):
        total += weight[t]
    for t in range(n):
        weight[t] /= total
    y[:] = 0
    for t in range(0, whole, 4):
        v0, v1, v2, v3 = values[t], values[t + 1], values[t + 2], values[t + 3]
        w0, w1, w2, w3 = weight[t], weight[t + 1], weight[t + 2], weight[t + 3]
        for e in range(len(y)):
            y[e] = (((y[e] + w0 * v0[e]) + w1 * v1[e]) + w2 * v2[e]) + w3 * v3[e]
    for t in range(whole, n):
        for e in range(len(y)):
            y[e] += weight[t] * values[t, e]


@njit(fastmath=CHAIN, error_model="numpy", cache=True, nogil=True)
def layers(
    x: Floats,
    w: LayerArrays,
    turns: Floats,
    inputs: Floats,
    keys: Floats,
    values: Floats,
    texts: Integers,
    start: int,
) -> Floats:
    """Features [R, D] of N positions from `start` of B texts, from their inputs x [B N, D].

    Those of text b are stored at texts[b] of `inputs` [texts, K - 1 + positions, D], where the
    Transformer has taps, and of `keys` and `values` [layers, texts, H, positions, E]. `turns` are
    the cosines and sines of their rotations, [positions, E / 2, 2]. Overwrites x.
    """
    rows, D = x.shape
    new = rows // len(texts)
    num_layers, _, H, _, E = keys.shape
    hidden = w.down.shape[1]
    inner = w.up.shape[2]
    normal = np.empty((rows, D), np.float32)
    qkv = np.empty((rows, 3 * D), np.float32)
    up = np.empty((rows, inner), np.float32)
    room = np.empty(max(inner, start + new), np.float32)
    powers = np.empty(max(inner, start + new), np.int32)
    taps = len(w.taps)
    if taps:
        for r in range(rows):
            own, at = inputs[texts[r // new]], start + r % new
            for i in range(D):
                own[at + taps - 1, i] = x[r, i]
                x[r, i] = 0
            for k in range(taps):
                for i in range(D):
                    x[r, i] += w.taps[k, i] * own[at + k, i]
    for index in range(num_layers):
        for r in range(rows):
            normalise(x[r], w.attention_norm[index], normal[r])
        qkv[:] = 0
        linear(normal, w.qkv[index], qkv)
        for r in range(rows):
            text, at = texts[r // new], start + r % new
            for h in range(2 * H):
                part = qkv[r, h * E : h * E + E]
                normalise(part, w.scale[index, h // H], part)
                for e in range(E // 2):
                    a, b = part[2 * e], part[2 * e + 1]
                    cos, sin = turns[at, e, 0], turns[at, e, 1]
                    part[2 * e] = a * cos - b * sin
                    part[2 * e + 1] = a * sin + b * cos
            for h in range(H):
                key, value = keys[index, text, h, at], values[index, text, h, at]
                for e in range(E):
                    key[e] = qkv[r, D + h * E + e]
                    value[e] = qkv[r, 2 * D + h * E + e]
        for r in range(rows):
            text, end = texts[r // new], start + r % new + 1
            for h in range(H):
                here = slice(h * E, h * E + E)
                past = keys[index, text, h, :end], values[index, text, h, :end]
                attend(qkv[r, here], past[0], past[1], room, powers, normal[r, here])
        linear(normal, w.out[index], x)
        for r in range(rows):
            normalise(x[r], w.mlp_norm[index], normal[r])
        up[:] = 0
        linear(normal, w.up[index], up)
        for r in range(rows):
            if inner > hidden:
                swiglu(up[r], room, powers)
            else:
                gelu(up[r], room, powers)
        linear(up, w.down[index], x)  # which reads the first M columns
    for r in range(rows):
        normalise(x[r], w.norm, normal[r])
    return normal


@njit(fastmath=CHAIN, error_model="numpy", cache=True, nogil=True)
def nearest(z: Floats, w: InputArrays, density: Floats) -> int:
    """argmax_k log N_k(z) of one vector z [d]; `density` is memory for V numbers."""
    density[:] = 0
    for i in range(len(z)):
        mean, here = w.mean[i], z[i]
        for k in range(len(density)):
            density[k] += (here - mean[k]) * (here - mean[k])
    best = 0
    for k in range(len(density)):
        density[k] = density[k] * w.precision[k] + w.log_scale[k]
    for k in range(len(density)):
        if density[k] > density[best]:
            best = k
    return best


@njit(fastmath=CHAIN, error_model="numpy", cache=True, nogil=True)
def map_inputs(z: Floats, w: InputArrays) -> Floats:
    """Inputs [R, D] of a Transformer from latents z [R, C], as `InputMap` and its block."""
    rows, D = len(z), w.linear.shape[1]
    x = affine(z, w.linear, w.linear_bias)
    if w.lift.shape[1]:
        lifted = affine(z, w.lift, w.lift_bias)
        room, powers = np.empty(D, np.float32), np.empty(D, np.int32)
        for r in range(rows):
            gelu(lifted[r], room, powers)
        linear(lifted, w.out, x)
    if len(w.embedding):
        d, num_tokens = w.mean.shape
        density = np.empty(num_tokens, np.float32)
        for r in range(rows):
            for place in range(z.shape[1] // d):
                token = nearest(z[r, place * d : place * d + d], w, density)
                of_token = w.embedding[place * num_tokens + token]
                for i in range(D):
                    x[r, i] += of_token[i]
    return x
