"""Draws from weights: what `requests.Adjustment` and Gumbel numbers do.

With E_k = -log(1 - u_k) an exponential number, the Gumbel number of a choice is g_k = -log E_k, so

    argmax_k (log w_k + g_k) = argmax_k (w_k / E_k)

and as E_k >= u_k, only choices with w_k / u_k above the best ratio so far need a logarithm.
"""

import math
from typing import NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

from tarflowlm.compiled.step import CHAIN, Floats, Integers, exponentials

FIRST_SHARE = 1 / 32
"""Tokens that are sorted for top-p have at least this times (1 - top-p) of the weight; if these do
not suffice, a sixteenth of it.
"""


class Limits(NamedTuple):
    """What is done to weights before a draw, in this order; see `requests.Adjustment`."""

    banned: int
    """-1: no token."""
    temperature: float
    top_k: int
    """The number of tokens: all."""
    top_p: float
    """1: all."""
    min_p: float


@njit(cache=True, nogil=True)
def mixed(z: np.uint64) -> np.uint64:
    """The finaliser of SplitMix64, as `sampling.Gumbel` has it."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


@njit(cache=True, nogil=True)
def uniforms(seed: int, place: int, first: int, u: Floats) -> None:
    """The numbers u_k of a row and a place for the choices from `first`, as `sampling.Gumbel`."""
    gamma = np.uint64(0x9E3779B97F4A7C15)
    stream = mixed(np.uint64(seed) + gamma * np.uint64(place + 1))
    for k in range(len(u)):
        bits = mixed(stream + gamma * np.uint64(first + k)) >> np.uint64(32)
        u[k] = (np.float32(bits) + np.float32(0.5)) * np.float32(2.0**-32)
        u[k] = min(u[k], np.float32(1 - 2.0**-24))


@njit(cache=True, nogil=True)
def winner(w: Floats, u: Floats) -> int:
    """argmax_k w_k / E_k; weights may be zero."""
    best, chosen = np.float32(0), 0
    for k in range(len(w)):
        if w[k] > best * u[k]:
            ratio = w[k] / np.float32(-math.log1p(-np.float64(u[k])))
            if ratio > best:
                best, chosen = ratio, k
    return chosen


@njit(cache=True, nogil=True)
def keep(w: Floats, least: float, count: int) -> None:
    """Set weights to zero, but `count` that are at least `least`; of equal ones the first stay."""
    equal = count
    for k in range(len(w)):
        equal -= w[k] > least
    for k in range(len(w)):
        if w[k] == least and equal > 0:
            equal -= 1
        elif w[k] <= least:
            w[k] = 0


@njit(cache=True, nogil=True)
def keep_mass(w: Floats, share: float) -> None:
    """Set weights to zero, but the fewest of the largest that together have this share.

    All tokens with at most (1 - share) / V of the weight have 1 - share of it together, so those
    above suffice; mostly few of them do.
    """
    total = np.float64(0)
    for k in range(len(w)):
        total += w[k]
    least = total * (1 - share) * FIRST_SHARE
    while True:
        mass, number = np.float64(0), 0
        for k in range(len(w)):
            if w[k] > least:
                mass += w[k]
                number += 1
        if mass >= share * total or least == 0:
            break
        least = least / 16 if least * len(w) * 16 > total * (1 - share) else np.float64(0)
    largest, index = np.empty(number, np.float32), 0
    for k in range(len(w)):
        if w[k] > least:
            largest[index] = w[k]
            index += 1
    largest.sort()
    mass, count = np.float64(0), 0
    while count < number and mass < share * total:
        count += 1
        mass += largest[number - count]
    keep(w, largest[number - count], count)


@njit(fastmath=CHAIN, cache=True, nogil=True)
def weigh(log_w: Floats, limits: Limits, powers: NDArray[np.int32]) -> None:
    """log_w becomes weights relative to the largest, of which those beyond the limits are zero."""
    n = len(log_w)
    if limits.banned >= 0:
        log_w[limits.banned] = -np.float32(3e38)
    largest = log_w[0]
    for k in range(n):
        largest = max(largest, log_w[k])
    factor = np.float32(1 / limits.temperature)
    for k in range(n):
        log_w[k] = (log_w[k] - largest) * factor
    exponentials(log_w, powers)
    if limits.banned >= 0:
        log_w[limits.banned] = 0
    if limits.top_k < n:
        largest = np.sort(log_w)[n - limits.top_k]
        keep(log_w, largest, limits.top_k)
    if limits.top_p < 1:
        keep_mass(log_w, limits.top_p)
    if limits.min_p > 0:
        for k in range(n):
            if log_w[k] < np.float32(limits.min_p):
                log_w[k] = 0


@njit(cache=True, nogil=True)
def draw(log_w: Floats, limits: Limits, seeds: Integers, place: int, first: int) -> Integers:
    """A choice of every row of log-weights [R, K], by the numbers of its seed [R] at a place.

    Overwrites `log_w`. Choices are numbered from `first`.
    """
    rows, choices = log_w.shape
    chosen = np.empty(rows, np.int64)
    u = np.empty(choices, np.float32)
    powers = np.empty(choices, np.int32)
    for r in range(rows):
        weigh(log_w[r], limits, powers)
        uniforms(seeds[r], place, first, u)
        chosen[r] = winner(log_w[r], u)
    return chosen
