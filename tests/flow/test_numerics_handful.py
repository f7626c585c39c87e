"""The Mix-d inverse of a handful of rows, against `reference` in float64: sharp, overlapping and
hard codebooks.
"""

import math

import pytest
import torch
from numerics_cases import codebook_case

from tarflowlm.flow.numerics import cpu, few_rows, reference, rosenblatt, rosenblatt_inverse

DTYPES = [torch.float32, torch.float64]
BOUND = {torch.float32: 2e-4, torch.float64: 1e-10}


@pytest.fixture
def patience(monkeypatch):
    """No row is left out because the general path is faster."""
    monkeypatch.setattr(few_rows, "PATIENCE", math.inf)


def case(components, d, seed, dtype):
    """u, log_w, mean, log_std: scales from 1e-4 to 3 where the seed is odd, all sharp where it is a
    multiple of four.

    Weights down to e^-12, some of them zero as top-k leaves them, and ordinary noise with three
    rows far out.
    """
    u, log_w, mean, log_std = codebook_case(24, components, d, seed, torch.float64)
    g = torch.Generator().manual_seed(seed + 100)
    if seed % 2:
        log_std = torch.rand(components, generator=g, dtype=torch.float64) * 10 - 9
    elif seed % 4 == 0:
        log_std = log_std - 3.0
    log_w = log_w * 4
    log_w[::3, components // 2 + 1 :] = torch.finfo(torch.float32).min
    u[0] = torch.linspace(-8, 8, d, dtype=torch.float64)
    u[1] = torch.linspace(-900, 45, d, dtype=torch.float64)
    u[2] = torch.linspace(30, -45, d, dtype=torch.float64)
    return [t.to(dtype) for t in (u, log_w, mean, log_std)]


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("shape", [(1, 3), (2, 4), (27, 1), (27, 8), (90, 16)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_maps_back_to_the_noise(dtype, shape, seed, patience):
    """As well as the general path does it: what an ulp of z is worth depends on the scales."""
    u, *params = case(*shape, seed, dtype)
    general = cpu.by_channels(u, *params)
    z, left = few_rows.rosenblatt_inverse(u, *params)
    z[left] = general[left]
    error, usual = (
        ((rosenblatt(found, *params)[0] - u).abs() / (1 + u.abs())) for found in (z, general)
    )
    for rows in (slice(3), slice(3, None)):
        assert error[rows].max() <= 1.1 * usual[rows].max() + 8 * torch.finfo(dtype).eps
    assert error[3:].max() <= 2 * BOUND[dtype]


@pytest.mark.parametrize("where", range(4))
def test_not_a_number_and_infinity(where):
    """As the general path has them, and the other rows as if they were not there."""
    expected = cpu.by_channels(*case(5, 3, 2, torch.float32))
    for value in (math.nan, math.inf):
        inputs = case(5, 3, 2, torch.float32)
        inputs[where].view(-1)[3] = value
        z = rosenblatt_inverse(*inputs)
        torch.testing.assert_close(
            z, cpu.by_channels(*inputs), rtol=1e-5, atol=1e-5, equal_nan=True
        )
        if where < 2:
            torch.testing.assert_close(z[2:], expected[2:], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sharper", [0.0, 2.0, 4.0])
@pytest.mark.parametrize("shape", [(1, 3), (5, 3), (27, 8), (90, 16)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_equals_the_reference_in_latents(dtype, shape, sharper, patience):
    u, log_w, mean, log_std = codebook_case(24, *shape, seed=4, dtype=dtype)
    u[0] = torch.linspace(-6, 6, shape[1], dtype=dtype)
    book = log_w, mean, log_std - sharper
    exact = reference.rosenblatt_inverse(*(t.double() for t in (u, *book)))
    z, left = few_rows.rosenblatt_inverse(u, *book)
    assert set(left) <= {0}
    z[left] = cpu.by_channels(u[left], log_w[left], *book[1:])
    assert (z - exact).abs().max() <= BOUND[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_does_not_depend_on_the_others(dtype):
    """To the last bit, as long as all of them are solved here."""
    u, log_w, *book = case(27, 8, 4, dtype)
    together = rosenblatt_inverse(u, log_w, *book)[3:]
    alone = torch.cat(
        [rosenblatt_inverse(u[i : i + 1], log_w[i : i + 1], *book) for i in range(3, len(u))]
    )
    torch.testing.assert_close(alone, together, rtol=0, atol=0)
