r"""The noise of real tokens under given weights of a tied Mix-d block, by several codes.

The choice of codes costs a block with sharp codes no bits: it changes the map u = f(z) alone. For
one number per token (d = 1) it is the inverse of the distribution function, as in Parallel Token
Prediction (arXiv 2512.21323), and the order of the codes is that of the function. Gumbel numbers
are the noise that any autoregressive model has.

Codes on a binary tree have +1 or -1 in the channel of each node above their token, and 0 behind
them. Channel i of such a code is a draw between two halves,

    u_i = Phi^-1(v_i),   v_i uniform in [0, p) for the left half and in [p, 1) for the right one,

where p is the mass of the left half within the node.
"""

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor

from tarflowlm.flow import numerics
from tarflowlm.flow.codebook import Codebook
from tarflowlm.flow.numerics import REFERENCE

LEAST = 1e-6
"""Uniform numbers stay as far from 0 and 1."""
WAVES = 5
"""Frequencies at which a uniform number is shown to a reader, besides the number itself."""


class Noise(ABC):
    """A noise from which a token follows, given its weights."""

    width: int
    """Numbers that a reader gets for each place."""

    @abstractmethod
    def of(self, tokens: Tensor, log_p: Tensor, generator: torch.Generator) -> Tensor:
        """Noise [n, *] of `tokens` [n] under log-weights [n, V], a draw given the token."""

    def shown(self, noise: Tensor) -> Tensor:
        """The numbers [n, width] that a reader gets."""
        return waves(noise)

    def match(self, noise: Tensor) -> Tensor | None:
        """How well each token suits the noise, [n, V], or None where no such number is natural."""
        return None


class NoNoise(Noise):
    width = 1

    def of(self, tokens: Tensor, log_p: Tensor, generator: torch.Generator) -> Tensor:
        return log_p.new_zeros(len(tokens), 1)

    def shown(self, noise: Tensor) -> Tensor:
        return noise


class Gumbel(Noise):
    """V numbers g with the token at the largest log p + g (Maddison et al. 2014)."""

    def __init__(self, vocab_size: int) -> None:
        self.width = vocab_size

    def of(self, tokens: Tensor, log_p: Tensor, generator: torch.Generator) -> Tensor:
        top = -torch.log(-torch.log(uniform(len(tokens), 1, generator=generator)))
        free = log_p - torch.log(-torch.log(uniform(*log_p.shape, generator=generator)))
        below = -torch.log(torch.exp(-top) + torch.exp(-free))
        return below.scatter(1, tokens[:, None], top) - log_p

    def shown(self, noise: Tensor) -> Tensor:
        return noise

    def match(self, noise: Tensor) -> Tensor:
        return noise


class InverseCdf(Noise):
    """One number in the cell of the token, with the cells in this `order` [V] of the tokens."""

    def __init__(self, order: Tensor) -> None:
        self.order, self.place = order, order.argsort()
        self.width = 1 + 2 * WAVES

    def of(self, tokens: Tensor, log_p: Tensor, generator: torch.Generator) -> Tensor:
        above = log_p.double().exp()[:, self.order].cumsum(-1)
        above = above / above[:, -1:]
        place = self.place[tokens][:, None]
        high = above.gather(1, place)
        low = torch.where(place > 0, above.gather(1, (place - 1).clamp_min(0)), 0.0)
        return torch.special.ndtri(within(low, high, uniform(len(tokens), 1, generator=generator)))


class Codes(Noise):
    """The mixture-Rosenblatt map with well separated codes in R^d, as a new model has them."""

    def __init__(self, vocab_size: int, dim: int) -> None:
        self.codebook = Codebook(vocab_size, dim).requires_grad_(False)
        self.width = dim * (1 + 2 * WAVES)

    def of(self, tokens: Tensor, log_p: Tensor, generator: torch.Generator) -> Tensor:
        book = self.codebook.mean, self.codebook.log_std
        eps = torch.randn(len(tokens), book[0].shape[1], generator=generator)
        z = self.codebook.encode(tokens, eps)
        return numerics.rosenblatt(z, log_p.float(), *book, maps=REFERENCE)[0]

    def match(self, noise: Tensor) -> Tensor:
        return noise @ self.codebook.mean.T


class Tree(Noise):
    """Codes on a binary tree, given as nested pairs of tokens."""

    def __init__(self, tree: "int | Pair") -> None:
        paths: dict[int, list[tuple[int, int, int]]] = {}
        self.order = torch.tensor(_lay_out(tree, 0, [], paths))
        self.depth = max(map(len, paths.values()))
        self.codes = torch.zeros(len(paths), self.depth)
        self.cells = torch.zeros(3, len(paths), self.depth, dtype=torch.long)
        place = self.order.argsort().tolist()
        for token, path in paths.items():
            for level, (low, middle, high) in enumerate(path):
                self.codes[token, level] = 1.0 if place[token] >= middle else -1.0
                self.cells[:, token, level] = torch.tensor((low, middle, high))
        self.width = self.depth * (1 + 2 * WAVES)

    def of(self, tokens: Tensor, log_p: Tensor, generator: torch.Generator) -> Tensor:
        below = torch.nn.functional.pad(log_p.double().exp()[:, self.order].cumsum(-1), (1, 0))
        low, middle, high = (below.gather(1, cell[tokens]) for cell in self.cells)
        left = torch.where(high > low, (middle - low) / (high - low).clamp_min(1e-300), 0.5)
        code = self.codes[tokens]
        first = torch.where(code > 0, left, 0.0)
        last = torch.where(code < 0, left, 1.0)
        return torch.special.ndtri(within(first, last, uniform(*left.shape, generator=generator)))

    def match(self, noise: Tensor) -> Tensor:
        return noise @ self.codes.T


Pair = tuple["int | Pair", "int | Pair"]
"""A node of a tree: its left and its right half."""


def _lay_out(
    tree: "int | Pair",
    start: int,
    above: list[tuple[int, int, int]],
    paths: dict[int, list[tuple[int, int, int]]],
) -> list[int]:
    """The tokens of a tree from left to right; `paths` gets the cells above each token."""
    if isinstance(tree, int):
        paths[tree] = above
        return [tree]
    middle = start + size_of(tree[0])
    cell = start, middle, middle + size_of(tree[1])
    left = _lay_out(tree[0], start, [*above, cell], paths)
    return left + _lay_out(tree[1], middle, [*above, cell], paths)


def size_of(tree: "int | Pair") -> int:
    """The number of tokens of a tree."""
    return 1 if isinstance(tree, int) else size_of(tree[0]) + size_of(tree[1])


def huffman(frequencies: Tensor) -> "int | Pair":
    """The tree that joins the two rarest halves again and again."""
    from heapq import heapify, heappop, heappush
    from itertools import count

    number = count(len(frequencies))
    heap: list[tuple[float, int, int | Pair]] = [
        (share, token, token) for token, share in enumerate(frequencies.tolist())
    ]
    heapify(heap)
    while len(heap) > 1:
        (one, _, left), (other, _, right) = heappop(heap), heappop(heap)
        heappush(heap, (one + other, next(number), (left, right)))
    return heap[0][2]


def readable_tree(p: Tensor, q: Tensor) -> "int | Pair":
    r"""A tree for a reader who knows only q [C, V] where the weights are p [C, V], in C contexts.

    With halves a and b such a reader takes the wrong side of a node with probability

        |p(a) / (p(a) + p(b)) - q(a) / (q(a) + q(b))|,

    which no other reader of the same q can go below. The tree joins the two halves for which this,
    times the mass p(a) + p(b) of the node, is least on average, again and again.
    """
    p, q = p.T.float().contiguous(), q.T.float().contiguous()
    halves: list[int | Pair] = list(range(len(p)))
    cost = torch.full((len(p), len(p)), math.inf)
    for row in range(len(p)):
        cost[row] = _errors(p, q, row)
    cost.fill_diagonal_(math.inf)
    for _ in range(len(p) - 1):
        a, b = divmod(int(cost.argmin()), len(p))
        halves[a] = (halves[a], halves[b])
        p[a] += p[b]
        q[a] += q[b]
        gone = cost[a].isinf()
        gone[b] = gone[a] = True
        cost[b] = cost[:, b] = math.inf
        cost[a] = torch.where(gone, math.inf, _errors(p, q, a))
        cost[:, a] = cost[a]
        last = a
    return halves[last]


def _errors(p: Tensor, q: Tensor, row: int) -> Tensor:
    """The cost [V] of joining half `row` with each half of p and q [V, C]."""
    mass = (p + p[row]).clamp_min(1e-12)
    return (p - q * (mass / (q + q[row]).clamp_min(1e-12))).abs().mean(-1)


def uniform(*shape: int, generator: torch.Generator) -> Tensor:
    """Uniform numbers in float64, away from 0 and 1."""
    numbers = torch.rand(*shape, generator=generator, dtype=torch.float64)
    return numbers.clamp(1e-12, 1 - 1e-12)


def within(low: Tensor, high: Tensor, share: Tensor) -> Tensor:
    """The numbers at these shares of their cells, away from 0 and 1."""
    return (low + (high - low) * share).clamp(LEAST, 1 - LEAST)


def waves(u: Tensor) -> Tensor:
    """Normal noise u [n, d], and sines and cosines of Phi(u): [n, d (1 + 2 WAVES)]."""
    angles = torch.special.ndtr(u)[..., None] * (math.pi * 2.0 ** torch.arange(WAVES))
    return torch.cat((u[..., None], angles.sin(), angles.cos()), -1).flatten(1)
