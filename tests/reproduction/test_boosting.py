"""Second blocks on frozen models: exact maps, and what they learn."""

import math

import pytest
import torch
from torch.autograd.functional import jacobian

from helpers import tiny_flow
from reproduction.boosting import (
    Below,
    Known,
    Reader,
    Upper,
    evaluate,
    fit,
    map_loss,
    reader_loss,
    write,
)
from tarflowlm import BaselineConfig
from tarflowlm.config import OptimConfig
from tarflowlm.flow.numerics import standard_normal_log_prob
from tarflowlm.model import seeded
from tarflowlm.model_config import TransformerConfig

TRUNK = TransformerConfig(width=16, num_heads=2, mlp_ratio=1)
V, T, d = 4, 3, 2


@pytest.fixture
def below() -> Below:
    return Below(tiny_flow(couplings=("mixd",), vocab_size=V, latent_dim=d, context=T, seed=1))


def upper(below: Below, reads: str, maps: str, *, scale: float = 0.0) -> Upper:
    with seeded(2):
        reader = Reader(below, TRUNK, layers=1, reads=reads)
        block = Upper(below, reader.to(below.codebook.mean.dtype), maps)
        torch.nn.init.normal_(block.weights.weight, std=scale)
    return block.to(below.codebook.mean.dtype)


@pytest.mark.parametrize("reads", ["noise", "text"])
def test_a_map_redone_with_new_weights_is_triangular_with_the_density_of_these(below, reads):
    block = upper(below, reads, "redo", scale=1.0)
    tokens = torch.tensor([[2, 0, 3]])
    noise = torch.randn(1, T, d, generator=torch.Generator().manual_seed(0)).double()
    z = below.codebook.encode(tokens, noise).detach()
    features = below.model.prior.block(0).features
    coupling = below.model.prior.block(0).coupling

    def first(v: torch.Tensor) -> torch.Tensor:
        return below.model.prior(v.view(1, T, d))[0].flatten()

    def both(v: torch.Tensor) -> torch.Tensor:
        latents = v.view(1, T, d)
        first_features = features(latents)
        log_w = coupling.weight_head(first_features).log_softmax(-1)
        c = block.reader(Known(below, tokens, latents, first_features, log_w))
        return below.noise(latents, block.redone(c, log_w))[0].flatten()

    by_z = jacobian(both, z.flatten())
    by_u = by_z @ jacobian(first, z.flatten()).inverse()
    assert by_u.triu(1).abs().max() < 1e-9
    expected = torch.linalg.slogdet(by_z).logabsdet
    expected = expected + standard_normal_log_prob(both(z.flatten()).view(1, T, d))[0]
    found = block(below, tokens, noise).both.sum()
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_writing_inverts_both_blocks(below):
    block = upper(below, "text", "redo", scale=1.0)
    noise = torch.randn(2, T, d, generator=torch.Generator().manual_seed(1)).double()
    z = write(below, block, noise)
    known = below.known(below.codebook.decode(z), z)
    log_w = block.redone(block.reader(known), known.log_w)
    torch.testing.assert_close(below.noise(z, log_w)[0], noise)
    alone = write(below, None, noise)
    torch.testing.assert_close(below.model.prior(alone)[0], noise)
    assert not torch.allclose(alone, z)


@pytest.mark.parametrize("maps", ["mix1", "key", "redo"])
def test_every_block_starts_as_the_identity(below, maps):
    tokens = torch.randint(V, (6, T), generator=torch.Generator().manual_seed(1))
    gain, _ = evaluate(below.float(), upper(below, "text", maps), tokens).gain
    assert abs(gain) < 2e-3


def test_cells_hold_the_normal_distribution_of_their_tokens():
    """Their means and spreads give back mean 0 and variance 1."""
    below = Below(tiny_flow(couplings=("mixd",), vocab_size=V, latent_dim=1, context=T, seed=1))
    log_w = torch.randn(5, V, generator=torch.Generator().manual_seed(1)).double().log_softmax(-1)
    block = upper(below, "text", "cells")
    mean, log_std = block.cells(log_w)
    w = log_w[:, block.order].exp()
    torch.testing.assert_close((w * mean).sum(-1), torch.zeros(5).double(), rtol=0, atol=1e-6)
    square = (w * (mean.square() + (2 * log_std).exp())).sum(-1)
    torch.testing.assert_close(square, torch.ones(5).double(), rtol=0, atol=1e-4)


@pytest.mark.slow
def test_a_block_that_reads_tokens_learns_what_a_frozen_baseline_does_not_know():
    """Of a text of alternating tokens an untrained baseline knows nothing."""
    with seeded(0):
        model = BaselineConfig(vocab_size=V, context=8, trunk=TRUNK, layers=1).build()
    below = Below(model)
    text = torch.arange(400) % 2
    windows = text[:64].view(-1, 8)
    train = text.numpy()
    options = {"optim": OptimConfig(lr=1e-2), "steps": 80, "batch": 8, "seed": 0, "every": 20}

    def learn(make, loss):
        return fit(make, loss, below.channels, train, windows, **options)

    reader = learn(lambda: Reader(below, TRUNK, layers=1, reads="text"), reader_loss(below))
    weights = [p.clone() for p in reader.parameters()]
    result = evaluate(below, learn(lambda: Upper(below, reader, "redo"), map_loss(below)), windows)
    assert result.below.mean() == pytest.approx(math.log2(V), abs=0.05)
    # the first token of a window is not known
    assert result.by_head.mean() < 0.5
    assert result.both.mean() < 0.5
    for before, after in zip(weights, reader.parameters(), strict=True):
        assert torch.equal(before, after)
