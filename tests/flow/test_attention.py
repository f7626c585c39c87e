"""Attention: rotary positions, and the same numbers from both of its implementations."""

from dataclasses import replace

import pytest
import torch

from helpers import TRUNK, normal, randomise
from tarflowlm import chunks
from tarflowlm.flow.attention import KeptAttention, rotate, rotations
from tarflowlm.flow.transformer import PreNormLayer


def test_attention_sees_distances_not_places():
    """Scores of rotated queries and keys depend on the difference of their positions alone."""
    turns = rotations(torch.arange(20), 4)
    q, k = (rotate(normal(1, 1, 1, 4, seed=s).repeat(20, 1, 1, 1), turns)[:, 0, 0] for s in (0, 1))
    scores = q @ k.T
    for distance in (0, 1, 5):
        along = scores.diagonal(-distance)
        torch.testing.assert_close(along, along[:1].expand_as(along), rtol=1e-5, atol=1e-6)
    assert (scores[:, 0] - scores[0, 0]).abs().max() > 1e-2


def test_rotation_turns_neighbouring_channels():
    x = normal(20, 2, 3, 6)
    turned = rotate(x, rotations(torch.arange(20), 6))
    wavelengths = 10_000.0 ** (torch.arange(3, dtype=torch.float64) / 3)
    angle = (torch.arange(20)[:, None] / wavelengths)[:, None, None]
    pairs = torch.complex(x[..., 0::2].contiguous(), x[..., 1::2].contiguous())
    expected = torch.view_as_real(pairs * torch.polar(torch.ones_like(angle), angle)).flatten(-2)
    torch.testing.assert_close(turned, expected, rtol=1e-5, atol=1e-5)


def test_a_compiler_gets_the_same_rotation_without_complex_numbers(monkeypatch):
    x, turns = normal(20, 2, 3, 6), rotations(torch.arange(20), 6)
    expected = rotate(x, turns)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    torch.testing.assert_close(rotate(x, turns), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_attention_that_keeps_its_weights_equals_that_of_pytorch(dtype, monkeypatch):
    monkeypatch.setattr(KeptAttention, "ROWS", 4)
    layer = randomise(PreNormLayer(replace(TRUNK, num_heads=2)))
    x = normal(30, 8).requires_grad_()
    if dtype != torch.float64:
        layer, x = layer.float(), x.detach().float().requires_grad_()
    leaves = [x, *layer.parameters()]
    turns = rotations(torch.arange(10), 4).repeat(3, 1, 1, 1)
    found = []
    for kept in (chunks.KEPT, 0):
        monkeypatch.setattr(chunks, "KEPT", kept)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            y = layer(x, turns, 10)
        found.append([y, *torch.autograd.grad(y.sin().sum(), leaves)])
    close = {torch.float64: 1e-6, torch.float32: 1e-5, torch.bfloat16: 0.2}[dtype]
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=close, atol=close)


def test_gradients_of_kept_attention(monkeypatch):
    monkeypatch.setattr(KeptAttention, "ROWS", 3)
    q, k, v = (normal(2, 7, 4, seed=seed).requires_grad_() for seed in range(3))
    assert torch.autograd.gradcheck(KeptAttention.apply, (q, k, v))
    y = KeptAttention.apply(q, k, v).square().sum()
    with pytest.raises(RuntimeError, match="attention in training"):
        torch.autograd.grad(y, q, create_graph=True)
