"""Muon in a precision of its choice equals PyTorch's."""

import pytest
import torch
from torch import nn

from tarflowlm.training.muon import COEFFICIENTS, STEPS, Muon, orthogonalise

SHAPES = [(6, 6), (12, 5), (5, 12), (33, 16)]


def parameters() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


def take_steps(optimizer: torch.optim.Optimizer, params: list[nn.Parameter]) -> None:
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator)
        optimizer.step()


def test_bfloat16_equals_the_muon_of_pytorch():
    ours, theirs = parameters(), parameters()
    options = {"lr": 0.01, "weight_decay": 0.1, "momentum": 0.95}
    take_steps(Muon(ours, precision="bfloat16", **options), ours)
    take_steps(torch.optim.Muon(theirs, adjust_lr_fn="match_rms_adamw", **options), theirs)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_singular_vectors_stay_and_values_come_near_one(precision):
    matrix = torch.randn(24, 16, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    found = orthogonalise(matrix.to(getattr(torch, precision))).double()
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    inside = left.T @ found @ right.T
    assert (values > 0.01 * values[0]).all()
    assert (inside - inside.diagonal().diag()).abs().max() < (
        1e-4 if precision == "float32" else 0.05
    )
    # the polynomial of five steps maps (0.01, 1] into this interval
    assert ((inside.diagonal() > 0.6) & (inside.diagonal() < 1.3)).all()


@pytest.mark.parametrize("smallest", [-1, -4, -8])
def test_short_cut_for_long_rows_equals_the_plain_iteration(smallest):
    """Singular values from 1 down to 10^smallest."""
    generator = torch.Generator().manual_seed(4)
    left, _ = torch.linalg.qr(torch.randn(16, 16, generator=generator, dtype=torch.float64))
    right, _ = torch.linalg.qr(torch.randn(64, 16, generator=generator, dtype=torch.float64))
    matrix = left @ torch.logspace(0, smallest, 16, dtype=torch.float64).diag() @ right.T
    plain, (a, b, c) = matrix / matrix.norm(), COEFFICIENTS
    for _ in range(STEPS):
        gram = plain @ plain.T
        plain = a * plain + (b * gram + c * gram @ gram) @ plain
    for given, expected in ((matrix, plain), (matrix.T, plain.T)):
        for dtype, atol in ((torch.float64, 1e-10), (torch.float32, 1e-3)):
            found = orthogonalise(given.to(dtype)).double()
            torch.testing.assert_close(found, expected, rtol=0, atol=atol)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_batches_of_equal_shapes_equal_a_loop(shape):
    generator = torch.Generator().manual_seed(2)
    matrices = torch.randn(3, *shape, generator=generator, dtype=torch.float64)
    alone = torch.stack([orthogonalise(matrix) for matrix in matrices])
    torch.testing.assert_close(orthogonalise(matrices), alone, rtol=0, atol=1e-12)


def test_stacked_matrices_are_orthogonalised_apart():
    generator = torch.Generator().manual_seed(0)
    parts = [nn.Parameter(torch.randn(4, 5, generator=generator)) for _ in range(3)]
    stack = nn.Parameter(torch.cat([p.detach() for p in parts]))
    for p in parts:
        p.grad = torch.randn(p.shape, generator=generator)
    stack.grad = torch.cat([p.grad for p in parts])
    Muon(parts, precision="float32", lr=0.01).step()
    Muon([stack], precision="float32", stacked=[stack], lr=0.01).step()
    torch.testing.assert_close(stack, torch.cat(list(parts)), rtol=1e-6, atol=1e-6)
