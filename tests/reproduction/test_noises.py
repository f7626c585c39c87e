"""The noise of tokens given their weights, and the trees of `python -m reproduction.readable`."""

import itertools
import math

import pytest
import torch

from reproduction.noises import Codes, Gumbel, InverseCdf, Tree, huffman, readable_tree

V = 7


def weights(rows: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, V, generator=generator).mul(2).log_softmax(-1)


def tree() -> Tree:
    return Tree(huffman(weights(1)[0].exp()))


@pytest.mark.parametrize(
    "noise",
    [InverseCdf(torch.tensor([3, 1, 4, 0, 6, 5, 2])), Codes(V, 2), tree()],
    ids=lambda noise: type(noise).__name__,
)
def test_noise_of_drawn_tokens_is_standard_normal(noise):
    generator = torch.Generator().manual_seed(1)
    log_p = weights(20_000)
    tokens = torch.multinomial(log_p.exp(), 1, generator=generator)[:, 0]
    u = noise.of(tokens, log_p, generator).double()
    error = 4 / math.sqrt(len(u))
    assert (u.mean(0).abs() < error).all()
    covariance = u.T @ u / len(u)
    assert (covariance - torch.eye(len(covariance))).abs().max() < 2 * error
    assert noise.shown(u[:5]).shape == (5, noise.width)


def test_gumbel_numbers_are_gumbel_and_choose_their_token():
    generator = torch.Generator().manual_seed(2)
    log_p = weights(20_000)
    tokens = torch.multinomial(log_p.exp(), 1, generator=generator)[:, 0]
    g = Gumbel(V).of(tokens, log_p, generator)
    assert torch.equal((log_p + g).argmax(-1), tokens)
    # P(g <= x) = exp(-exp(-x)) in every column
    for x in (-1.0, 0.0, 1.0, 3.0):
        assert ((g <= x).double().mean(0) - math.exp(-math.exp(-x))).abs().max() < 0.02


def test_a_tree_gives_back_its_tokens():
    found = tree()
    assert sorted(found.order.tolist()) == list(range(V))
    assert len({tuple(code) for code in found.codes.tolist()}) == V
    log_p = weights(V)
    tokens = torch.arange(V)
    u = found.of(tokens, log_p, torch.Generator().manual_seed(3))
    for token, numbers in zip(tokens.tolist(), torch.special.ndtr(u).tolist(), strict=True):
        alive = list(range(V))
        for level, number in enumerate(numbers):
            halves = [[k for k in alive if found.codes[k, level] == side] for side in (-1, 1)]
            if not halves[0]:
                break
            mass = [log_p[token, half].exp().sum().item() for half in halves]
            alive = halves[int(number >= mass[0] / sum(mass))]
        assert alive == [token]


def test_huffman_s_tree_is_the_shortest():
    shares = [0.4, 0.3, 0.2, 0.1]
    found = Tree(huffman(torch.tensor(shares)))
    lengths = found.codes.ne(0).sum(1).tolist()
    assert lengths == [1, 2, 3, 3]


def errors_of(found: Tree, p: torch.Tensor, q: torch.Tensor) -> float:
    """The wrong sides that a reader of q takes, summed over the nodes above the tokens."""
    total = 0.0
    for level in range(found.depth):
        nodes = {tuple(code[:level].tolist()) for code in found.codes if code[level] != 0}
        for node in nodes:
            below = [
                k
                for k in range(len(found.codes))
                if tuple(found.codes[k, :level].tolist()) == node and found.codes[k, level] != 0
            ]
            left = [k for k in below if found.codes[k, level] < 0]
            of_p = p[:, left].sum(-1) / p[:, below].sum(-1)
            of_q = q[:, left].sum(-1) / q[:, below].sum(-1)
            total += (p[:, below].sum(-1) * (of_p - of_q).abs()).mean().item()
    return total


def test_a_readable_tree_keeps_together_what_the_reader_knows():
    p, q = weights(50).exp()[:, :4], weights(50, 5).exp()[:, :4]
    # the reader knows how 0 and 1 share their mass, and how 2 and 3 do
    for a, b in ((0, 1), (2, 3)):
        both = q[:, a] + q[:, b]
        share = p[:, a] / (p[:, a] + p[:, b])
        q[:, a], q[:, b] = both * share, both * (1 - share)
    p, q = p / p.sum(-1, keepdim=True), q / q.sum(-1, keepdim=True)
    found = errors_of(Tree(readable_tree(p, q)), p, q)
    others = [
        errors_of(Tree(((a, b), (c, d))), p, q) for a, b, c, d in itertools.permutations(range(4))
    ]
    assert found == pytest.approx(min(others), rel=1e-5)
